"""A server whose delays are known: a load generator that cannot measure this one cannot measure any.

It speaks OpenAI's protocol and computes nothing; every piece of an answer is written at a moment that its script
names, and the moments at which it really was written are kept and told at /served. With --null it has no delays: then
the client is the slowest part, and what it reaches is its ceiling.

    python3 -m load.golden --first-s 0.05 --gap-s 0.01   # 50 ms to the first token, 10 ms between two
    python3 -m load.golden --null --port 0               # as fast as the client reads, on a free port
    python3 -m load.golden --fault cut --after 3         # what breaks, and how: see --fault
"""

import asyncio
import contextlib
import gc
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from config import ROOT, UserError, dashed, knob
from lab import console
from load.answers import Asked, Plan, plan
from load.clock import new_loop
from load.connection import Connection, Served
from load.script import MODEL, Fault, Script

KEPT = 50_000  # requests whose stamps are remembered
BACKLOG = 4096  # connections that wait to be taken


class Golden:
    """The server. url: its address. Requests are remembered in the order of their arrival."""

    def __init__(self, script: Script, host: str = "127.0.0.1", port: int = 0) -> None:
        self.script = script
        self.nobody = script.fault == Fault.REFUSE  # the port is taken, so that nobody else listens there either
        self.socket = socket.socket() if self.nobody else socket.create_server((host, port), backlog=BACKLOG)
        if self.nobody:
            self.socket.bind((host, port))
        scheme = "https" if script.fault == Fault.TLS else "http"
        self.url = f"{scheme}://{host}:{self.socket.getsockname()[1]}"
        self.records: deque[Served] = deque(maxlen=KEPT)
        self.connections: set[Connection] = set()
        self.asked = self.prompt_tokens = self.new_tokens = 0
        self.loop = new_loop()
        self.ended = asyncio.Event()

    @property
    def served(self) -> list[Served]:
        return list(self.records)

    def run(self) -> None:
        """Until stop()."""
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self.live())

    async def live(self) -> None:
        server = None if self.nobody else await self.loop.create_server(
            lambda: Connection(self), sock=self.socket, backlog=BACKLOG
        )  # fmt: skip
        await self.ended.wait()
        if server is not None:
            server.close()
        self.socket.close()
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # they are told

    def stop(self) -> None:
        """From any thread."""
        self.loop.call_soon_threadsafe(self.ended.set)

    def plan(self, asked: Asked) -> Plan:
        """The answer to the next request."""
        self.asked += 1
        script = self.script
        if script.times is not None and self.asked > script.times:
            script = replace(script, fault=None)
        return plan(script, asked)

    def page(self, path: str) -> tuple[str, bytes, str] | None:
        """(status, body, content type) of what can be looked up."""
        kind = "application/json"
        if path == "/v1/models":
            return "200 OK", json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode(), kind
        if path == "/served":
            return "200 OK", json.dumps([asdict(one) for one in self.records]).encode(), kind
        if path == "/metrics":
            return "200 OK", self.metrics().encode(), "text/plain; version=0.0.4"
        return ("200 OK", b'{"status":"ok"}', kind) if path == "/health" else None

    def metrics(self) -> str:
        """Under the names that the kit's own service has for the same."""
        running = sum(connection.plan is not None for connection in self.connections)
        values = (("requests_running", "gauge", running), ("prompt_tokens_total", "counter", self.prompt_tokens),
                  ("generated_tokens_total", "counter", self.new_tokens))  # fmt: skip
        return "".join(f"# TYPE llmserve_{name} {kind}\nllmserve_{name} {value}\n" for name, kind, value in values)


# ---- running one


@contextlib.contextmanager
def serve(script: Script | None = None) -> Iterator[Golden]:
    """One on a thread of this process. Its moments suffer where the other threads compute: see started()."""
    golden = Golden(script or Script())
    thread = threading.Thread(target=golden.run, name="golden")
    thread.start()
    try:
        yield golden
    finally:
        golden.stop()
        thread.join()


@dataclass(frozen=True)
class Elsewhere:
    """One in a process of its own. Its clock is ours: perf_counter counts from the machine's start."""

    url: str
    pid: int

    @property
    def served(self) -> list[Served]:
        with urllib.request.urlopen(f"{self.url}/served", timeout=30) as answer:
            return [Served(**one) for one in json.load(answer)]


@contextlib.contextmanager
def started(script: Script | None = None) -> Iterator[Elsewhere]:
    """One in a process of its own, which ends with this block, or when this process does."""
    command = [sys.executable, "-m", "load.golden", "--port", "0", "--leash", *words(script or Script())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        try:
            url = process.stdout.readline().strip()
            if not url:  # it has said why on stderr
                raise RuntimeError(f"the golden server did not start: {' '.join(command)}")
            yield Elsewhere(url, process.pid)
        finally:
            process.terminate()


def words(script: Script) -> list[str]:
    """The command line that makes this script."""
    found = []
    for one in fields(Script):
        value = getattr(script, one.name)
        if value != one.default:
            flags = {value: flag for flag, value in one.metadata.get("flags", {}).items()}
            found.append(flags[value] if flags else f"--{dashed(one.name)}={value}")
    return found


@dataclass(frozen=True)
class GoldenConfig(Script):
    """A script and where it is served."""

    null: bool = knob(False, "no delays at all")
    host: str = knob("127.0.0.1", "the address to listen on")
    port: int = knob(8001, "the port to listen on; 0 takes a free one", least=0, most=65535)
    leash: bool = knob(False, "end when standard input does: with whoever started it")

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        still = {"first_s": 0.0, "gap_s": 0.0} if given.get("null") else {}
        return super().completed(given) | still


def main() -> int:
    faults = "".join(f"\n    {fault:<13} {fault.meaning}" for fault in Fault)
    settings = GoldenConfig.from_cli(f"{__doc__}\nfaults:{faults}\n")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection is a file
    try:
        golden = Golden(settings, settings.host, settings.port)
    except OSError as error:
        raise UserError(f"Port {settings.port} of {settings.host} cannot be had ({error.strerror}): "
                        "name another one with --port or --host.") from error  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):
        golden.loop.add_signal_handler(number, golden.stop)
    if settings.leash:
        golden.loop.add_reader(sys.stdin, golden.stop)
    print(golden.url, flush=True)
    gc.freeze()  # what is loaded stays: the collector need not look through it while answers are due
    golden.run()
    return 0


if __name__ == "__main__":
    console.run(main)
