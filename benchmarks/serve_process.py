"""Servers in processes of their own: started, stopped while another one is measured, and ended."""

import json
import os
import select
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.family import Family
from config import ROOT, UserError

START_S = 600.0  # some compile for minutes the first time


class ServerProcess(Family):
    """command: what starts it. ready: the path that answers 200 when it serves. Its own family of processes."""

    def __init__(self, name: str, command: Sequence[str | Path], url: str, ready: str, **environment: str) -> None:
        self.name, self.url = name, url
        self.started_s = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | environment,
        )  # fmt: skip
        try:
            self.wait_for(ready)
        except BaseException:
            self.close()
            raise
        self.ready_s = time.perf_counter() - self.started_s

    def wait_for(self, ready: str) -> None:
        while time.perf_counter() - self.started_s < START_S:
            if self.process.poll() is not None:
                raise UserError(f"{self.name} ended with status {self.process.returncode} before it served anything.")
            with suppress(OSError), urllib.request.urlopen(self.url + ready, timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.05)
        raise UserError(f"{self.name} did not serve within {START_S:.0f} s.")

    def get(self, path: str) -> Any:
        """The JSON that it answers."""
        with urllib.request.urlopen(self.url + path, timeout=START_S) as answer:
            return json.load(answer)


class OurService(ServerProcess):
    """serve.py on a free port, as a user starts it. program: what else starts it, after `python`."""

    def __init__(self, model: str | None, *options: str, program: Sequence[str] = ("serve.py",)) -> None:
        command = [sys.executable, *program, "--port", "0", "--log-file", os.devnull, *options]
        command += ["--model", model] if model else []
        self.name, self.started_s = "this service", time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline() if ready else ""
        self.ready_s = time.perf_counter() - self.started_s
        if " at http://" not in line:
            self.close()
            raise UserError(f"serve.py did not start: try {' '.join(command[:2])} by hand.")
        self.url = line.rsplit(" at ", 1)[1].strip()
