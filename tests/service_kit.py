"""A service for tests: real connections in this process, and an engine whose steps a test can hold, fail and count."""

import asyncio
import contextlib
import http.client
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.engine import Engine
from engine.kv_blocks import Blocks
from engine.request import Choice
from engine.scheduler import Scheduler
from service.admission import Rates
from service.app import make_app
from service.assembly import Model, assembled
from service.house import House
from service.prompts import Prompts
from service.server import Server
from service.settings import ServeConfig

CONTEXT, END, NAME = 512, 256, "tiny"
LETTER_A = 64  # the token of "a" in the test tokenizer, whose tokens are GPT-2's letters for bytes in their order
PATIENCE_S = 20.0  # for anything that should take milliseconds
PROBES = ("/health", "/health/live", "/health/ready", "/metrics")


def next_letter(tokens: list[int]) -> int:
    """What the test's network answers: a small letter that depends on every token before it."""
    return LETTER_A + hash(tuple(tokens)) % 26


class Runner:
    """Tokens by next_letter(). hold() stops it before its next step, allow(n) lets n steps pass, go() all of them.

    faults: request number, or "step N" -> what is raised there. says: a request's tokens -> its next one, where given.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.faults: dict[Any, Exception] = {}
        self.pace_s = 0.0
        self.held = False
        self.permits = threading.Semaphore(0)
        self.in_step = threading.Event()
        self.says: Callable[[list[int], int], int | None] = lambda _tokens, _prompt: None
        self.seen: list[list[int]] = []  # the request numbers of every step

    def run(self, slices):
        self.in_step.set()
        if self.held:
            self.permits.acquire()
        if self.pace_s:
            time.sleep(self.pace_s)
        self.steps += 1
        self.seen.append([part.request.number for part in slices])
        if (fault := self.faults.pop(f"step {self.steps}", None)) is not None:
            raise fault
        return [self.one(part) for part in slices]

    def one(self, part):
        request = part.request
        if request.number in self.faults:
            return self.faults[request.number]
        if not part.last:
            return None
        token = self.says(request.tokens, len(request.prompt))
        token = next_letter(request.tokens) if token is None else token
        top = ((token, -0.1), (98, -2.5))[: request.sampling.logprobs or 0]
        return Choice(token, None if request.sampling.logprobs is None else -0.1, top)

    def forget(self, request) -> None:
        pass

    def hold(self) -> None:
        self.held = True

    def allow(self, steps: int) -> None:
        for _ in range(steps):
            self.permits.release()

    def go(self) -> None:
        self.held = False
        self.permits.release()


@dataclass
class Reply:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The data of every event; "[DONE]" as it stands, comments left out."""
        return events_of(self.body)


def events_of(raw: bytes) -> list[Any]:
    data = [block[6:] for block in raw.decode().split("\n\n") if block.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


@dataclass
class Served:
    """A running service: ask it over a socket, look into it through `house`, hold its engine through `runner`."""

    house: House
    runner: Runner
    log: io.StringIO
    port: int
    server: Server
    received: int = 0  # HTTP requests that reached the application
    replies: list[Reply] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # what the web server logged as an error of the application

    # ---- asking

    def ask(
        self, path: str, body: Any = None, method: str | None = None, timeout: float = PATIENCE_S, **headers: str
    ) -> Reply:
        """One request on a connection of its own. body: an object for JSON, or bytes as they are."""
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if raw is not None else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method or ("GET" if raw is None else "POST"), path, raw, given)
            answer = connection.getresponse()
            found = Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()
        self.replies.append(found)
        return found

    def chat(self, text: str = "hello", **wishes: Any) -> Reply:
        headers = wishes.pop("headers", {})
        return self.ask("/v1/chat/completions", chat_body(text, **wishes), **headers)

    def complete(self, prompt: Any = "hello", **wishes: Any) -> Reply:
        headers = wishes.pop("headers", {})
        return self.ask("/v1/completions", {"model": NAME, "prompt": prompt, "max_tokens": 4, **wishes}, **headers)

    def later(self, ask: Callable[..., Reply], *arguments: Any, **wishes: Any) -> "Later":
        """The same, in a thread."""
        return Later(lambda: ask(*arguments, **wishes))

    def open(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def send_chat(self, text: str = "hello", **wishes: Any) -> socket.socket:
        """A chat request on a bare connection, whose answer nobody has read yet."""
        connection = self.open()
        connection.sendall(raw_request("/v1/chat/completions", chat_body(text, **wishes)))
        return connection

    # ---- waiting and looking

    def until(self, condition: Callable[[], Any], what: str = "") -> Any:
        """What the condition gives, as soon as it is true."""
        end = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert time.monotonic() < end, f"waited {PATIENCE_S:.0f} s in vain {what}"
            time.sleep(0.002)
        return found

    @property
    def bridge(self):
        return self.house.serving.bridge

    @property
    def admission(self):
        return self.house.serving.admission

    @property
    def jobs(self) -> list[Any]:
        """Admitted requests that have been handed to the engine, in that order."""
        found = [job for job in list(self.house.serving.jobs) if job.answers]
        return sorted(found, key=lambda job: job.answers[0].request.number)

    def lines(self, event: str = "request") -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [line for line in found if line["event"] == event]

    def outcomes(self) -> dict[str, int]:
        """Requests by outcome, from the metrics, as far as there were any."""
        found: dict[str, int] = {}
        for metric in self.house.books.metrics.requests.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total") and sample.value:
                    found[sample.labels["outcome"]] = found.get(sample.labels["outcome"], 0) + int(sample.value)
        return found

    def idle(self) -> bool:
        engine = self.bridge.engine
        return not (self.admission.inside or self.house.serving.jobs or engine.answers or engine.inbox)


class Later:
    """A call in a thread; result() waits for it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.found: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, args=(call,), daemon=True)
        self.thread.start()

    def run(self, call: Callable[[], Any]) -> None:
        try:
            self.found = call()
        except BaseException as error:
            self.error = error

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def result(self) -> Any:
        self.thread.join(PATIENCE_S)
        assert self.done, "no answer came"
        if self.error is not None:
            raise self.error
        return self.found


def chat_body(text: str = "hello", **wishes: Any) -> dict[str, Any]:
    return {"model": NAME, "max_tokens": 4, "messages": [{"role": "user", "content": text}], **wishes}


def raw_request(path: str, body: Any, *headers: str, version: str = "1.1") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/{version}",
        "Host: here",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


def read_all(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            found += piece
    return found


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    found = b""
    while mark not in found:
        piece = connection.recv(65536)
        assert piece, found
        found += piece
    return found


@contextlib.contextmanager
def served(
    folder: Path, *, kv_blocks: int = 256, memory_used: Callable[[], float] = lambda: 0.0,
    make_engine: Callable[[], Engine] | None = None, **settings: Any,
) -> Iterator[Served]:  # fmt: skip
    """A service on a free port, its invariants checked when the test is done with it.

    memory_used: the share of the machine's memory, whatever that has left. make_engine: another engine than the one of
    letters, which `runner` then knows nothing of.
    """
    wishes = {"port": 0, "served_name": NAME, "max_running": 4, "max_tokens": 64, "max_queued": 4} | settings
    config, runner, log = ServeConfig(**wishes), Runner(), io.StringIO()
    prompts = Prompts(folder)

    def engine() -> Engine:
        scheduler = Scheduler(Blocks(kv_blocks), max_running=config.max_running, max_tokens=config.max_tokens)
        return Engine(
            runner, scheduler, eos_ids=frozenset({END}), context=CONTEXT, vocabulary=257, decode=prompts.decode
        )

    about = {"name": NAME, "hash": "0" * 12, "kernel": "test", "weights": "none", "device": "cpu"}
    model = Model(make_engine or engine, prompts, Rates(1e-4, 1e-5, 1e6), about)
    house = assembled(config, model, log=log, memory_used=memory_used)
    app, addresses = make_app(house), []
    holder: list[Served] = []

    born = app.born

    def counted(scope: dict, headers: dict[str, str]) -> Any:
        holder[0].received += 1
        return born(scope, headers)

    app.born = counted
    server = Server(app, house, addresses.append)
    found = Served(house, runner, log, 0, server)
    holder.append(found)
    listener = Listener(found.errors)
    logging.getLogger("uvicorn.error").addHandler(listener)
    loop_thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    loop_thread.start()
    found.until(lambda: addresses, "for the service to start")
    found.port = int(addresses[0].rsplit(":", 1)[1])
    before = Baseline.of(found)
    probe = found.chat("the probe", temperature=0, headers=key_of(found)).json["choices"]
    try:
        yield found
        check_invariants(found, before, probe)
    finally:
        logging.getLogger("uvicorn.error").removeHandler(listener)
        runner.go()
        server.should_exit = True
        loop_thread.join(PATIENCE_S)
        assert not loop_thread.is_alive(), "the service did not end"


class Listener(logging.Handler):
    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(self.format(record))


@dataclass(frozen=True)
class Baseline:
    threads: int
    tasks: int
    files: int

    @classmethod
    def of(cls, served: Served) -> "Baseline":
        tasks = len(asyncio.all_tasks(served.server.loop))
        return cls(threading.active_count(), tasks, sum(1 for _ in Path("/proc/self/fd").iterdir()))


def check_invariants(served: Served, before: Baseline, probe: Any) -> None:
    """What must be true after every case, whatever happened in it (i1 to i7 of the fault matrix)."""
    assert not served.errors, served.errors[0]
    served.runner.go()
    served.until(served.idle, "for the service to be idle")
    admission = served.admission
    closed, admission.closed = admission.closed, None
    if not served.bridge.ending and served.server.draining is None:
        again = served.chat("the probe", temperature=0, headers=key_of(served))
        assert again.json["choices"] == probe, "i4: the same prompt has another answer now"
    admission.closed = closed
    served.until(served.idle)
    served.until(lambda: sum(served.outcomes().values()) == served.received, "i5: for an outcome of every request")
    state = served.bridge.seen()
    assert (state.running, state.waiting) == (0, 0), "i1"
    assert state.kv_held == 0, "i2: blocks are still held"
    served.bridge.engine.scheduler.check()
    assert served.bridge.count("computed") == served.bridge.useful + sum(served.bridge.wasted.values()), "i2: tokens"
    served.until(lambda: within(Baseline.of(served), before), f"i3: {Baseline.of(served)} from {before}")
    lines = served.lines()
    ids = [line["request_id"] for line in lines]
    assert len(ids) == len(set(ids)), "i6: two lines for one request"
    quiet = sum(line["status"] != 200 or line["route"] not in ("health", "metrics") for line in lines)
    assert quiet == len(lines) <= served.received, "i6"
    for reply in served.replies:
        assert b"Traceback" not in reply.body and b".py" not in reply.body, "i6: insides in a reply"
        assert reply.headers.get("x-request-id"), "i7"


def key_of(served: Served) -> dict[str, str]:
    key = served.house.serving.settings.api_key
    return {"Authorization": f"Bearer {key}"} if key else {}


def within(now: Baseline, before: Baseline) -> bool:
    pairs = ((now.threads, before.threads), (now.tasks, before.tasks), (now.files, before.files))
    return all(one <= other + 2 for one, other in pairs)
