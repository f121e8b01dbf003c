"""Replicas of serve.py, and HAProxy in front of them with deploy/haproxy/haproxy.cfg: started, killed, looked at."""

import contextlib
import csv
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config import ROOT, UserError

CONFIG = ROOT / "deploy" / "haproxy" / "haproxy.cfg"
NAMES = ("replica-1", "replica-2")
START_S = 300.0  # for a model to be loaded
POLL_S = 0.01


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on: all held at once, so that each is another one."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in held]


def until(condition: Callable[[], bool], what: str, patience_s: float = START_S) -> None:
    """UserError when it does not come true."""
    end_s = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end_s:
            raise UserError(f"Waited {patience_s:.0f} s in vain for {what}: look at its log.")
        time.sleep(POLL_S)


def last_words(log: Path) -> str:
    """The end of a log, which itself may lie in a folder that ends with the run."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return lines[-1] if lines else "none"


@dataclass(eq=False)
class Replica:
    """One serve.py, always at the same port. log: where what it says on stderr goes."""

    name: str
    port: int
    arguments: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """In a session of its own: a terminal's Ctrl-C is for who measures, who then ends it."""
        command = [sys.executable, "serve.py", "--port", str(self.port), *self.arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
            )

    def ready(self) -> bool:
        """Whether it takes requests. UserError when it has ended instead."""
        if self.process is None or self.process.poll() is not None:
            status = self.process and self.process.returncode
            raise UserError(f"{self.name} did not start (status {status}). Its last words: {last_words(self.log)}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health/ready", timeout=1) as answer:
            return answer.status == 200
        return False

    def kill(self) -> None:
        """As a machine that loses its power would end it, and waited for: its connections are reset by then."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@dataclass(eq=False)
class Balancer:
    """HAProxy with the project's own configuration. addresses: of the replicas."""

    addresses: Sequence[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.port, self.stats_port = free_ports(2)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """UserError: there is no HAProxy, or it does not start."""
        program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise UserError("HAProxy is not installed here: apt-get install haproxy (Debian), then again.")
        places = dict(zip(("REPLICA_1", "REPLICA_2"), self.addresses, strict=True))
        bound = {"LB_BIND": f"127.0.0.1:{self.port}", "LB_STATS_BIND": f"127.0.0.1:{self.stats_port}"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [program, "-db", "-f", str(CONFIG)], stdout=log, stderr=log, start_new_session=True,
                env=os.environ | places | bound | self.environment,
            )  # fmt: skip
        until(self.answers, "HAProxy", 10.0)

    def answers(self) -> bool:
        if self.process.poll() is not None:
            raise UserError(f"HAProxy did not start (status {self.process.returncode}): {self.log} says why.")
        with contextlib.suppress(OSError):
            return bool(self.table())
        return False

    def table(self) -> dict[str, dict[str, str]]:
        """What HAProxy says of each of its parts: name -> column -> value. OSError."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.stats_port}/;csv", timeout=2) as page:
            rows = csv.DictReader(io.StringIO(page.read().decode().removeprefix("# ")))
            return {row["svname"]: row for row in rows if row["pxname"] == "replicas"}

    def state(self, name: str) -> str:
        """UP, DOWN, NOLB (lives, and gets no new requests), or on its way: "UP 1/2"."""
        return self.table()[name]["status"]

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def pair(arguments: Sequence[str], place: Path) -> Iterator[tuple[Balancer, dict[str, Replica]]]:
    """Two replicas that take requests, and the balancer that knows it. All end with the block. UserError."""
    ports = free_ports(len(NAMES))
    replicas = {
        name: Replica(name, port, arguments, place / f"{name}.log") for name, port in zip(NAMES, ports, strict=True)
    }
    balancer = Balancer([f"127.0.0.1:{port}" for port in ports], place / "haproxy.log")
    try:
        for replica in replicas.values():
            replica.start()
        for replica in replicas.values():
            until(replica.ready, replica.name)
        balancer.start()
        yield balancer, replicas
    finally:
        for replica in replicas.values():
            replica.kill()
        balancer.close()
