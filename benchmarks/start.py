"""Offline, the card stands on the screen within 15 s; a hub that never answers costs 5 s, not minutes."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.claim import Claim
from config import ROOT, PromptConfig, cache_dir


def timed_start(*arguments: str, **environment: str) -> tuple[dict[str, float], dict]:
    """Run infer.py: seconds until each heading appeared on its stdout, and its record."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "infer.py", "--json", str(record), *arguments],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | environment,
        )  # fmt: skip
        seen = {line[4:-1]: time.perf_counter() - start for line in process.stdout if line.startswith("### ")}
        if process.wait() != 0:
            raise RuntimeError(f"infer.py {' '.join(arguments)} left with status {process.returncode}")
        return seen, json.loads(record.read_text())


def claims(config: PromptConfig) -> list[Claim]:
    quick = ["--quick"] if config.quick else []
    seen, record = timed_start("--model", config.model, *quick, HF_HUB_OFFLINE="1")
    every = [record["cold"], *record["runs"], record["runs"][0]]  # the warm-up is not recorded: taken as a first run
    runs = sum(run["total"] for run in every)
    stats = seen["STATS"] - runs
    found = [
        Claim("start to card, offline", "≤ 15 s", f"{seen['Card']:.1f} s", seen["Card"] <= 15),
        Claim("start to STATS, offline", "≤ 15 s + the runs", f"{stats:.1f} s + {runs:.1f} s of runs", stats <= 15),
    ]
    with socket.create_server(("127.0.0.1", 0)) as silent, tempfile.TemporaryDirectory() as home:
        # A listening socket that nobody accepts from: connections are made, and never answered.
        hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        silent_hub = {"HF_ENDPOINT": hub, "HF_HOME": home, "HF_HUB_CACHE": home, "HF_HUB_OFFLINE": "0"}
        (cache_dir() / "hub-unreachable.json").unlink(missing_ok=True)
        _, record = timed_start("--quick", **silent_hub)
        waited = dict(record["ledger"])["find the weights"]
        _, record = timed_start("--quick", **silent_hub)
        again = dict(record["ledger"])["find the weights"]
    text = f"{waited:.2f} s to find the weights, {again:.2f} s at the second start"
    found.append(Claim("a hub that never answers", "≤ 5 s, once an hour", text, 1 < waited <= 5.1 and again < 1))
    return found
