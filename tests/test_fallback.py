"""Another server in the engine's place: a golden one whose answers and faults are known, and one that keeps what it is
asked. B74 of the fault matrix: a fallback that fails too.
"""

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from service_kit import CONTEXT, Served, chat_body, raw_request, read_until, served
from step_kit import break_engine, figure, one_step, settled, text_of

from config import UserError
from lab import wire
from load.answers import text as golden_text
from load.golden import serve
from load.script import Script
from service.breaker import State
from service.settings import ServeConfig

pytestmark = pytest.mark.slow

QUICK = Script(first_s=0.005, gap_s=0.001)
BEFORE = ["refuse", "500", "503", "wrong_model", "hang", "tls"]  # faults that show before the first byte
MIDWAY = ["die", "cut", "no_done", "malformed", "error_event", "hang_midway"]


@contextlib.contextmanager
def behind(folder, url: str, **more: Any) -> Iterator[Served]:
    """A service with another server in reserve."""
    wishes = {"fallback_url": f"{url}/v1", "fallback_model": "golden", "fallback_timeout": 0.5} | more
    with served(folder, **wishes) as here:
        yield here
        here.house.serving.relief.engine.force(None)  # the last probe wants the engine
        here.admission.closed = None


def open_circuit(here: Served) -> None:
    here.house.serving.relief.engine.force(State.FORCED_OPEN)


# ---- it fails


@pytest.mark.parametrize("fault", BEFORE)
def test_b74_where_the_fallback_fails_too_the_open_circuit_is_told(checkpoint_folder, fault: str):
    with serve(Script(first_s=0.005, gap_s=0.001, fault=fault)) as golden:
        url = golden.url.replace("http:", "https:") if fault == "tls" else golden.url
        with behind(checkpoint_folder, url, fallback_timeout=0.2) as here:
            break_engine(here)
            for stream in (False, True):
                refused = here.chat(stream=stream)
                assert (refused.status, refused.error["code"]) == (503, "circuit_open")
                assert 5000 < int(refused.headers["retry-after-ms"]) <= 15000 and "x-degraded" not in refused.headers
                assert "golden" not in refused.body.decode() and "connect" not in refused.body.decode()
            assert settled(here)[-1]["fallback_error"]
            assert here.house.serving.relief.fallback.breaker.good.count(False) == 2
            assert here.ask("/health/ready").status == 200  # its own circuit is closed as yet


def test_b74_a_fallback_that_keeps_failing_is_not_asked_any_more(checkpoint_folder):
    with serve(Script(fault="503")) as golden, behind(checkpoint_folder, golden.url) as here:
        open_circuit(here)
        for _ in range(25):
            assert here.chat().error["code"] == "circuit_open"
        assert len(golden.served) == 20
        assert figure(here, "breaker_state", name="fallback", state="open") == 1
        ready = here.ask("/health/ready")
        assert (ready.status, ready.json["reason"]) == (503, "the circuit is open")


@pytest.mark.parametrize("fault, stream", [("malformed", False), ("error_event", False), ("not_a_stream", True)])
def test_b74_garbage_instead_of_an_answer_is_no_answer(checkpoint_folder, fault: str, stream: bool):
    script = Script(first_s=0.005, gap_s=0.001, fault=fault)
    with serve(script) as golden, behind(checkpoint_folder, golden.url) as here:
        open_circuit(here)
        refused = here.chat(stream=stream)
        assert (refused.status, refused.error["code"]) == (503, "circuit_open")
        assert here.house.serving.relief.fallback.breaker.good.count(False) == 1


# ---- it answers


@pytest.fixture
def golden():
    with serve(QUICK) as found:
        yield found


@pytest.mark.parametrize("chat", [True, False])
def test_the_other_servers_answer_is_passed_on_whole_and_as_a_stream(checkpoint_folder, golden, chat: bool):
    with behind(checkpoint_folder, golden.url, tokens_per_minute=1000) as here:
        open_circuit(here)
        ask = here.chat if chat else here.complete
        whole = ask(max_tokens=12)
        stream = ask(max_tokens=12, stream=True, stream_options={"include_usage": True})
        assert whole.headers["x-degraded"] == stream.headers["x-degraded"] == "model=golden"
        said = [one["choices"][0] for one in stream.events[:-1] if one["choices"]]
        joined = "".join(one["delta"].get("content", "") if chat else one["text"] for one in said)
        choice = whole.json["choices"][0]
        assert joined == (choice["message"]["content"] if chat else choice["text"]) == golden_text(12)
        assert said[-1]["finish_reason"] == choice["finish_reason"] == "length" and stream.events[-1] == "[DONE]"
        for answer in (whole.json, stream.events[-2]):
            assert answer["usage"]["completion_tokens"] == 12 and answer["usage"]["timing"]["fallback"] > 0
            assert answer["model"] == "golden" and answer["id"] != "golden-0"
            parts = dict(answer["usage"]["timing"])
            total = parts.pop("total")
            assert abs(sum(parts.values()) - total) < 1e-4 and abs(parts["unexplained"]) < 0.02
        lines = settled(here)
        assert [line["degraded"] for line in lines[-2:]] == ["model=golden"] * 2
        assert figure(here, "degraded_requests_total", rung="model") == 2 and figure(here, "degraded", rung="model")
        spent = sum(line["prompt_tokens"] + line["completion_tokens"] for line in lines)
        assert abs(int(here.chat(max_tokens=1).headers["x-ratelimit-remaining-tokens"]) - (1000 - spent)) < 60
        assert not here.house.serving.relief.fallback.calls and here.bridge.count("requests") == 1


def test_who_accepts_no_other_model_is_told_that_the_circuit_is_open(checkpoint_folder, golden):
    with behind(checkpoint_folder, golden.url) as here:
        open_circuit(here)
        for said in ("none", "max_tokens,cached"):
            assert here.chat(headers={"X_Allow_Degraded": said}).error["code"] == "circuit_open"
        assert here.chat(headers={"X_Allow_Degraded": "model"}).status == 200
        assert here.chat(headers={"X_Allow_Degraded": "some"}).status == 400
        assert len(golden.served) == 1


def test_a_full_house_sends_newcomers_there_and_is_refused_itself_when_that_fails(checkpoint_folder, golden):
    with behind(checkpoint_folder, golden.url, max_running=1, max_queued=1) as here:
        here.runner.hold()
        inside = [here.later(here.chat, f"number {i}") for i in range(2)]
        here.until(lambda: len(here.jobs) == 2)
        assert here.chat().headers["x-degraded"] == "model=golden"
        golden.script = Script(fault="500")
        assert here.chat().error["code"] == "server_overloaded"
        here.admission.closed = "drain"
        assert here.chat().error["code"] == "server_shutting_down" and len(golden.served) == 2
        here.admission.closed = None
        here.runner.go()
        assert all("x-degraded" not in one.result().headers for one in inside)


def test_token_ids_are_not_handed_on(checkpoint_folder, golden):
    """They mean something else to another model."""
    with behind(checkpoint_folder, golden.url) as here:
        open_circuit(here)
        assert here.complete([1, 2, 3]).error["code"] == "circuit_open"
        assert here.chat(logit_bias={"5": 1}).error["code"] == "circuit_open"
        assert here.complete("text").status == 200 and len(golden.served) == 1


# ---- it breaks midway


@pytest.mark.parametrize("fault", MIDWAY)
def test_b74_a_stream_that_breaks_there_ends_with_an_error_and_never_with_done(checkpoint_folder, fault: str):
    script = Script(first_s=0.005, gap_s=0.005, fault=fault, after=3)
    with serve(script) as golden, behind(checkpoint_folder, golden.url, fallback_timeout=0.3) as here:
        open_circuit(here)
        broken = here.chat(max_tokens=8, stream=True)
        assert broken.status == 200 and b"[DONE]" not in broken.body
        error = broken.events[-1]["error"]
        assert (error["code"], error["type"]) == ("fallback_failed", "server_error") and "golden" not in str(error)
        assert golden_text(3) in "".join(
            one["choices"][0]["delta"].get("content", "") for one in broken.events[:-1] if one["choices"]
        )
        line = settled(here)[-1]
        assert line["outcome"] == "upstream_error" and line["fallback_error"] and len(golden.served) == 1
        assert here.house.serving.relief.fallback.breaker.good.count(False) == 1


def test_a_client_that_leaves_ends_the_other_servers_work_too(checkpoint_folder):
    with serve(Script(first_s=0.005, gap_s=0.05)) as golden, behind(checkpoint_folder, golden.url) as here:
        open_circuit(here)
        with here.send_chat(max_tokens=400, stream=True) as connection:
            read_until(connection, b"caf")
        waiting = here.send_chat(max_tokens=400)
        here.until(lambda: len(golden.served) == 2)
        waiting.close()
        here.until(lambda: [one.left for one in golden.served] == [True, True])
        assert {line["outcome"] for line in settled(here)[-2:]} == {"cancelled"}
        assert not here.house.serving.relief.fallback.breaker.good, "that is nobody's fault"


def test_a_drain_tells_streams_from_there_as_well(checkpoint_folder):
    with serve(Script(first_s=0.005, gap_s=0.05)) as golden, behind(checkpoint_folder, golden.url) as here:
        open_circuit(here)
        with here.send_chat(max_tokens=400, stream=True) as connection:
            read_until(connection, b"caf")
            assert here.house.serving.busy
            here.server.loop.call_soon_threadsafe(here.house.serving.end_all)
            assert b"[DONE]" not in read_until(connection, b'"code":"server_shutting_down"')


def test_while_the_other_server_thinks_the_client_hears_that_somebody_is_there(checkpoint_folder):
    script = Script(first_s=0.005, gap_s=0.6, tokens=2)
    with serve(script) as golden, behind(checkpoint_folder, golden.url, fallback_timeout=5, heartbeat=0.1) as here:
        open_circuit(here)
        assert b": still here\n\n" in here.chat(stream=True).body


# ---- what it is told


class Asked(BaseHTTPRequestHandler):
    """Keeps what it is asked, and answers with what its server has to say."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        time.sleep(self.server.pause_s)
        with contextlib.suppress(OSError):
            self.send_response(self.server.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(self.server.says)))
            self.end_headers()
            self.wfile.write(self.server.says)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def other():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    server.asked, server.says, server.status, server.pause_s = [], b"{}", 200, 0.0
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def answer(**more: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}} | more).encode()


def test_it_is_told_the_time_left_and_not_to_hand_it_on_and_nothing_about_the_user(
    checkpoint_folder, other, monkeypatch
):
    monkeypatch.setenv("LLM_INFER_FALLBACK_KEY", "their-secret")
    other.says = answer(secret_inside="here", system_fingerprint="theirs")
    with behind(checkpoint_folder, other.url, api_key="our-secret") as here:
        open_circuit(here)
        ours = {"Authorization": "Bearer our-secret"}
        body = chat_body("hello", user="me", metadata={"a": "b"}, temperature=0.5, seed=3)
        del body["max_tokens"]
        found = here.ask("/v1/chat/completions", body, X_Request_Deadline_Ms="9000", **ours)
        assert found.json["choices"][0]["message"]["content"] == "yes" and found.json["usage"]["total_tokens"] == 4
        assert b"secret" not in found.body and b"theirs" not in found.body
        (path, headers, sent), = other.asked  # fmt: skip
        assert path == "/v1/chat/completions" and 1000 < int(headers["x-request-deadline-ms"]) <= 9000
        assert headers["authorization"] == "Bearer their-secret" and headers["x-allow-degraded"] == "none"
        assert sent == {"model": "golden", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5,
                        "seed": 3, "max_tokens": CONTEXT - 1}  # fmt: skip
        assert b"their-secret" not in here.ask("/config", **ours).body and "their-secret" not in here.log.getvalue()


def test_over_tls_it_must_be_who_it_says_it_is(checkpoint_folder, other, tmp_path, monkeypatch):
    """With a certificate that somebody vouches for it is asked; without, it hears nothing of what was asked."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl that makes a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate], check=True, capture_output=True,
    )  # fmt: skip
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate, key)
    other.socket, other.says = theirs.wrap_socket(other.socket, server_side=True), answer()
    other.handle_error = lambda *_: None  # who does not trust it leaves in the middle of the handshake
    for vouched, name, status in (
        (None, "localhost", 503),
        (certificate, "127.0.0.1", 503),
        (certificate, "localhost", 200),
    ):
        monkeypatch.setattr(wire, "tls_context", lambda vouched=vouched: ssl.create_default_context(cafile=vouched))
        other.asked.clear()
        with behind(checkpoint_folder, f"https://{name}:{other.server_port}", fallback_timeout=5.0) as here:
            open_circuit(here)
            assert here.chat().status == status, (vouched, name)
        assert len(other.asked) == (status == 200)


@pytest.mark.parametrize(
    "says, status, counts",
    [
        (b"<html>", 200, True),
        (b'{"choices": 5, "usage": {}}', 200, True),
        (b'{"choices": [{"message": "x"}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}', 200, True),
        (answer(usage=None), 200, True),
        (answer(choices=[{"message": {"content": "\ud83d"}, "finish_reason": "stop"}]), 200, True),
        (answer(choices=[{"index": 2**70, "message": {"content": "x"}, "finish_reason": "stop"}]), 200, True),
        (answer(usage={"prompt_tokens": -1, "completion_tokens": "1"}), 200, True),
        (b"[" * 100_000, 200, True),
        (answer(), 302, True),
        (answer(), 401, True),
        (answer(), 400, False),
    ],
)
def test_b74_what_is_no_answer_of_openais_is_none(checkpoint_folder, other, says, status, counts):
    """Only a request that the other server finds wrong says nothing about that server."""
    other.says, other.status = says, status
    with behind(checkpoint_folder, other.url) as here:
        open_circuit(here)
        assert here.chat().error["code"] == "circuit_open"
        assert here.house.serving.relief.fallback.breaker.good.count(False) == counts


def test_the_clients_time_may_end_while_the_other_server_works(checkpoint_folder, other):
    other.pause_s = 1.0
    with behind(checkpoint_folder, other.url, fallback_timeout=20) as here:
        open_circuit(here)
        late = here.chat(headers={"X_Request_Deadline_Ms": "300"})
        assert (late.status, late.error["code"]) == (504, "deadline_exceeded")
        assert settled(here)[-1]["outcome"] == "timeout"
        assert not here.house.serving.relief.fallback.breaker.good


# ---- the first rung


def test_where_the_queue_is_half_full_answers_are_capped_unless_the_client_objects(checkpoint_folder):
    with served(checkpoint_folder, degrade_max_tokens=3, max_running=2, max_queued=4) as here:
        here.runner.hold()
        objects = {"X_Allow_Degraded": "none"}
        inside = [here.later(here.chat, f"number {i}", max_tokens=8, headers=objects) for i in range(4)]
        here.until(lambda: len(here.jobs) == 4)
        while len(here.bridge.engine.scheduler.running) < 2:
            one_step(here)
        here.until(lambda: here.house.serving.feel() or here.house.serving.relief.ladder.tight)
        capped = here.later(here.chat, max_tokens=8)
        whole = here.later(here.chat, max_tokens=8, headers=objects)
        here.until(lambda: len(here.jobs) == 6)
        assert figure(here, "degraded", rung="max_tokens") == 1 and here.ask("/health").json["degraded"] == [
            "max_tokens"
        ]
        here.runner.go()
        assert capped.result().headers["x-degraded"] == "max_tokens=3"
        assert capped.result().json["choices"][0]["finish_reason"] == "length"
        assert text_of(whole.result())[:3] == text_of(capped.result()) and len(text_of(whole.result())) == 8
        assert "x-degraded" not in whole.result().headers
        assert {len(text_of(one.result())) for one in inside} == {8}
        assert [line["degraded"] for line in settled(here) if "degraded" in line] == ["max_tokens=3"]
        assert figure(here, "degraded_requests_total", rung="max_tokens") == 1
        here.until(here.idle)
        here.house.serving.relief.ladder.tight = False


def test_a_single_request_in_an_idle_house_is_not_capped(checkpoint_folder):
    """It counted itself as one that waits, and a queue of two places was half full."""
    with served(checkpoint_folder, degrade_max_tokens=3, max_running=1, max_queued=1) as here:
        for _ in range(5):
            assert "x-degraded" not in here.chat(max_tokens=8).headers


# ---- settings


def test_a_fallback_needs_a_model_and_an_address_without_secrets():
    with pytest.raises(UserError, match="belong together"):
        ServeConfig(fallback_url="http://host/v1")
    for url in ("host:8000", "ftp://host/v1", "http://user:word@host/v1", "http://host/v1?key=x", "http:///v1",
                "http://host:99999/v1", "http://host:x/v1", "http://[host/v1"):  # fmt: skip
        with pytest.raises(UserError, match="FALLBACK_KEY"):
            ServeConfig(fallback_url=url, fallback_model="small")
    for name in ("模型", "two\nlines"):
        with pytest.raises(UserError, match="printable ASCII"):
            ServeConfig(fallback_url="http://host/v1", fallback_model=name)


def test_an_answer_that_cannot_be_told_after_all_ends_its_call(checkpoint_folder, golden):
    with behind(checkpoint_folder, golden.url) as here:
        open_circuit(here)
        here.house.serving.relief.fallback.model = "模型"  # fits into no header
        assert here.chat(stream=True).status == 500
        assert not here.house.serving.relief.fallback.calls
        here.until(lambda: here.errors)  # what the server logged
        assert "UnicodeEncodeError" in here.errors.pop()


def test_a_client_with_too_little_time_is_no_fault_of_the_other_server(checkpoint_folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        with behind(checkpoint_folder, url, fallback_timeout=5.0) as here:
            open_circuit(here)
            reply = here.chat(headers={"X-Request-Deadline-Ms": "300"})
            assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
            assert not here.house.serving.relief.fallback.breaker.good, "neither well nor badly"


@pytest.mark.parametrize("wish, state", [("off", State.DISABLED), ("open", State.FORCED_OPEN)])
def test_the_breaker_can_be_switched(checkpoint_folder, golden, wish: str, state: State):
    there = {"fallback_url": f"{golden.url}/v1", "fallback_model": "golden"}
    with served(checkpoint_folder, breaker=wish, **there) as here:
        assert here.house.serving.relief.engine.state is state
        assert ("x-degraded" in here.chat().headers) == (wish == "open")


def test_raw_clients_read_the_stream_as_it_comes(checkpoint_folder, golden):
    with behind(checkpoint_folder, golden.url) as here:
        open_circuit(here)
        with here.open() as connection:
            connection.sendall(raw_request("/v1/chat/completions", chat_body(stream=True), version="1.0"))
            head = read_until(connection, b"[DONE]")
        assert b"x-degraded: model=golden" in head and b"text/event-stream" in head
