"""Two replicas behind HAProxy, and a bad network between the two: delayed, slow, or cut in the middle."""

import contextlib
import http.server
import json
import shutil
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from service_kit import chat_body

from experiments.replicas import Balancer, Replica, until
from lab import client
from lab.availability import kind_of
from lab.client import Body, Trace
from load import server

CHAT = "/v1/chat/completions"
BACK_S = 60.0  # for a replica to be started again, on a busy machine
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST, as a cut line or a dead host's return does


def needs_haproxy() -> None:
    if not (shutil.which("haproxy") or Path("/usr/sbin/haproxy").exists()):
        pytest.skip("haproxy is not installed here (Debian: apt-get install haproxy)")


@dataclass
class House:
    """balancer: the one in front of all. place: where logs go."""

    balancer: Balancer
    replicas: dict[str, Replica]
    place: Path

    def heal(self) -> "House":
        """Both replicas run and have their share."""
        for replica in self.replicas.values():
            if replica.process.poll() is not None:
                replica.start()
            replica.process.send_signal(signal.SIGCONT)
        for name, replica in self.replicas.items():
            until(replica.ready, f"{name} to be ready", BACK_S)
            self.await_state(name, "UP", BACK_S)
        return self

    def await_state(self, name: str, state: str, patience_s: float = 20.0) -> None:
        until(lambda: self.balancer.state(name) == state, f"{name} to be {state}", patience_s)

    def signal(self, name: str, number: int) -> None:
        self.replicas[name].process.send_signal(number)

    def figure(self, name: str, metric: str) -> float:
        """A replica's own figure, by our name for it."""
        return (server.metrics(self.replicas[name].url, {}) or {})[metric]

    def line(self, client_id: str) -> dict[str, Any] | None:
        """What a replica wrote into its log about a client's request, once it has."""
        lines = [line for one in self.replicas.values() for line in one.log.read_text().splitlines()]
        mine = f'"client_request_id":"{client_id}"'
        return next((json.loads(line) for line in lines if mine in line), None)

    @contextlib.contextmanager
    def another(self, first: int | None = None, **environment: str) -> Iterator[Balancer]:
        """A balancer of its own before the same replicas. first: the port at which it finds the first of them."""
        ports = [replica.port for replica in self.replicas.values()]
        addresses = [f"127.0.0.1:{port}" for port in ([first, *ports[1:]] if first else ports)]
        found = Balancer(addresses, self.place / "another.log", environment)
        try:
            found.start()
            until(lambda: all(row["status"] == "UP" for row in found.table().values()), "both to be up", 20.0)
            yield found
        finally:
            found.close()


def bodies(count: int, new: int = 200) -> list[Body]:
    """Every other one a stream."""
    return [chat_body(f"number {i}", max_tokens=new, ignore_eos=True, stream=i % 2 == 0) for i in range(count)]


def asked(url: str, all_of: Sequence[Body], every_s: float) -> list[Trace]:
    return client.open_loop(url + CHAT, all_of, [i * every_s for i in range(len(all_of))])


def asked_at_once(url: str, all_of: Sequence[Body]) -> list[Trace]:
    return client.closed_loop(url + CHAT, all_of, len(all_of))


def under_load(
    url: str, act: Callable[[], Any], *, count: int = 40, every_s: float = 0.08, new: int = 200
) -> list[Trace]:
    """The ends of requests that come all the time, while after a third of them something happens."""
    error: list[BaseException] = []

    def later() -> None:
        time.sleep(count * every_s / 3)
        try:
            act()
        except BaseException as one:
            error.append(one)

    thread = threading.Thread(target=later)
    thread.start()
    traces = asked(url, bodies(count, new), every_s)
    thread.join()
    if error:
        raise error[0]
    return traces


def kinds(traces: Sequence[Trace]) -> Counter[str]:
    return Counter(map(kind_of, traces))


def served_by(traces: Sequence[Trace]) -> set[str | None]:
    return {trace.headers.get("x-served-by") for trace in traces}


@contextlib.contextmanager
def answering(pages: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A replica of pages only, and its port among them: path -> (status, text), to be changed at any time."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = pages[self.path]
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as there:
        thread = threading.Thread(target=there.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        pages["port"] = there.server_address[1]
        try:
            yield pages
        finally:
            there.shutdown()
            thread.join()


# ---- a bad network


@dataclass(eq=False)
class Pipe:
    """A port that leads to another one. delay_s: of every packet. bytes_per_s: of each direction; 0 = all it can."""

    target: int
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    ends: list[socket.socket] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.in_thread(self.accept)

    def in_thread(self, work: Callable[..., None], *given: Any) -> None:
        thread = threading.Thread(target=work, args=given, daemon=True)
        self.threads.append(thread)
        thread.start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target), timeout=30)
                self.ends += [near, far]
                self.in_thread(self.pump, near, far)
                self.in_thread(self.pump, far, near)

    def pump(self, here: socket.socket, there: socket.socket) -> None:
        with contextlib.suppress(OSError):  # cut, or closed by one of the two
            while piece := here.recv(4096):
                time.sleep(self.delay_s + (len(piece) / self.bytes_per_s if self.bytes_per_s else 0))
                there.sendall(piece)
            there.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Every connection, at once."""
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.ends.clear()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.cut()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


@contextlib.contextmanager
def piped(house: House, name: str = "replica-1", **bad: float) -> Iterator[tuple[Pipe, Balancer]]:
    """A balancer that reaches one of the replicas through a bad network, and the other one as it is."""
    pipe = Pipe(house.replicas[name].port, **bad)
    try:
        with house.another(pipe.port) as balancer:
            yield pipe, balancer
    finally:
        pipe.close()
