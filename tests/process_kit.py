"""serve.py as a process of its own: started with a folder, asked over sockets, ended by signals."""

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from service_kit import Reply, events_of, raw_request

from config import ROOT

SMALL = ("--native", "wait", "--threads", "1", "--kv-memory", "0.02", "--served-name", "tiny")


class Process:
    """Started at once; ready() waits for its first screen. environment: variables more than this process has."""

    def __init__(self, folder: Path, *arguments: str, place: Path, **environment: str) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.stderr_file = place / "stderr"
        own = {name: value for name, value in os.environ.items() if not name.startswith("LLM_INFER_")}
        command = [sys.executable, "serve.py", "--model", str(folder), *SMALL, *arguments]
        if "--port" not in arguments:
            command += ["--port", "0"]
        with self.stderr_file.open("wb") as stderr:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env=own | {"LLM_INFER_CACHE": os.environ["LLM_INFER_CACHE"]} | environment,
            )  # fmt: skip
        self.key = environment.get("LLM_INFER_API_KEY")
        self.screen, self.port = "", 0

    def ready(self) -> "Process":
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.screen += line
            if line.startswith("curl "):
                self.port = int(re.search(r"http://[^/ ]+:(\d+)", self.screen)[1])
                return self
        raise AssertionError(f"no address came: {self.stderr}")

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()

    # ---- asking

    def ask(self, path: str, body: Any = None, timeout: float = 30.0, **headers: str) -> Reply:
        """One request on a connection of its own."""
        raw = None if body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | self.authorised()
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request("GET" if raw is None else "POST", path, raw, given)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, found, answer.read())

    def authorised(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def open(self, path: str, body: Any, version: str = "1.1") -> socket.socket:
        """A request on a bare connection, whose answer nobody has read yet."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        headers = [f"{name}: {value}" for name, value in self.authorised().items()]
        connection.sendall(raw_request(path, body, *headers, version=version))
        return connection

    def metrics(self) -> dict[str, Any]:
        """The families by name, from a parser that is not ours."""
        return {one.name: one for one in text_string_to_metric_families(self.ask("/metrics").body.decode())}

    def figure(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        samples = [one for family in self.metrics().values() for one in family.samples if one.name == name]
        return sum(one.value for one in samples if labels.items() <= one.labels.items())

    # ---- ending

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.popen.send_signal(number)

    def ended(self, within_s: float) -> int:
        """Its exit status, which must come in that time."""
        return self.popen.wait(within_s)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        self.popen.stdout.close()


@contextlib.contextmanager
def started(folder: Path, *arguments: str, place: Path, **environment: str) -> Iterator[Process]:
    process = Process(folder, *arguments, place=place, **environment)
    try:
        yield process.ready()
    finally:
        process.close()


def pasted(process: Process) -> dict[str, Any]:
    """The choice that the last line of the first screen brings in a shell; by hand where there is no curl."""
    line = process.screen.splitlines()[-1]
    if shutil.which("curl"):
        variables = {"LLM_INFER_API_KEY": process.key or "", "PATH": os.environ["PATH"]}
        ran = subprocess.run(["bash", "-c", f"{line} --silent --show-error"], capture_output=True, env=variables)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)["choices"][0]
    words = shlex.split(line)
    return process.ask("/v1" + words[1].partition("/v1")[2], json.loads(words[-1])).json["choices"][0]


def longer(folder: Path, place: Path, context: int) -> Path:
    """A copy of a checkpoint that says it can take so many tokens: Llama's weights do not depend on it."""
    place.mkdir()
    for file in folder.iterdir():
        text = file.read_bytes()
        if file.name == "config.json":
            text = json.dumps(json.loads(text) | {"max_position_embeddings": context}).encode()
        (place / file.name).write_bytes(text)
    return place


def joined(events: list[Any]) -> dict[str, Any]:
    """A stream's chunks as the whole answer that they make: per choice text, tokens, reason; and the usage."""
    assert events[-1] == "[DONE]", events[-1]
    found: dict[str, Any] = {"choices": {}, "usage": None}
    for event in events[:-1]:
        if event.get("usage"):
            assert event["choices"] == []
            found["usage"] = event["usage"]
        for piece in event["choices"]:
            mine = found["choices"].setdefault(piece["index"], {"text": "", "tokens": [], "reason": None})
            assert mine["reason"] is None, "something came after the end"
            mine["text"] += piece["delta"].get("content", "") if "delta" in piece else piece["text"]
            mine["tokens"] += tokens_of(piece)
            mine["reason"] = piece["finish_reason"]
    return found


def whole(answer: dict[str, Any]) -> dict[str, Any]:
    """The same of an answer that came in one piece."""
    choices = {
        choice["index"]: {
            "text": choice["message"]["content"] if "message" in choice else choice["text"],
            "tokens": tokens_of(choice),
            "reason": choice["finish_reason"],
        }
        for choice in answer["choices"]
    }
    return {"choices": choices, "usage": answer["usage"]}


def tokens_of(piece: dict[str, Any]) -> list[Any]:
    """Token texts and rounded log probabilities, in either endpoint's form."""
    told = piece["logprobs"]
    if told is None:
        return []
    if "content" in told:
        return [(one["token"], round(one["logprob"], 3), len(one["top_logprobs"])) for one in told["content"]]
    return [(t, round(p, 3), len(top)) for t, p, top in zip(*(told[name] for name in COLUMNS), strict=True)]


COLUMNS = ("tokens", "token_logprobs", "top_logprobs")


def until(condition: Any, what: str = "", patience_s: float = 20.0, every_s: float = 0.01) -> Any:
    end = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain {what}"
        time.sleep(every_s)
    return found


def body_of(raw: bytes) -> bytes:
    """The body of a raw answer, taken out of its chunks where it has some."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head.lower():
        return rest
    found = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        found += rest[: int(size or b"0", 16)]
        rest = rest[int(size or b"0", 16) + 2 :]
    return found


def raw_events(raw: bytes) -> list[Any]:
    return events_of(body_of(raw))
