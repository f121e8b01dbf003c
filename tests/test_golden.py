"""The golden server does what its script says, and its stamps are true: the load generator is held against it."""

import contextlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from config import ROOT, UserError
from load.answers import Asked, plan, text
from load.clock import new_loop
from load.connection import CHAT, COMPLETIONS
from load.golden import Golden, GoldenConfig, serve, started, words
from load.script import NULL, Fault, Script

pytestmark = pytest.mark.slow

QUICK = Script(first_s=0.02, gap_s=0.005)
SLACK_S = 0.3  # how late a busy machine may make anything: ten times what it should
PATIENCE_S = 20.0


def body_of(path: str = CHAT, tokens: int = 5, stream: bool = True, **more: Any) -> dict[str, Any]:
    prompt = (
        {"messages": [{"role": "user", "content": "one two three"}]} if path == CHAT else {"prompt": "one two three"}
    )
    asks = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return {"model": "any", "max_tokens": tokens} | prompt | asks | more


def request(path: str, body: dict[str, Any], *headers: str) -> bytes:
    raw = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(raw)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + raw


def connect(golden: Golden) -> socket.socket:
    place = urlsplit(golden.url)
    return socket.create_connection((place.hostname, place.port), timeout=PATIENCE_S)


def raw_answer(golden: Golden, body: dict[str, Any], path: str = CHAT) -> tuple[bytes, bool]:
    """All bytes until the server closes, and whether it did so by a reset."""
    found = b""
    with connect(golden) as connection:
        connection.sendall(request(path, body, "Connection: close"))
        try:
            while piece := connection.recv(65536):
                found += piece
        except ConnectionResetError:
            return found, True
    return found, False


def answer(golden: Golden, body: dict[str, Any], path: str = CHAT) -> tuple[int, dict[str, str], bytes]:
    """By Python's own client."""
    connection = http.client.HTTPConnection(urlsplit(golden.url).netloc, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(body))
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()


def events(raw: bytes) -> list[Any]:
    whole = raw.decode().split("\n\n")
    assert whole.pop() == "", "the last event is whole"
    assert all(one.startswith("data: ") for one in whole)
    return [one[6:] if one == "data: [DONE]" else json.loads(one[6:]) for one in whole]


def said(found: list[Any]) -> list[str]:
    """The pieces of text of a stream."""
    choices = [choice for event in found if event != "[DONE]" for choice in event.get("choices", [])]
    pieces = [choice["text"] if "text" in choice else choice["delta"].get("content") for choice in choices]
    return [piece for piece in pieces if piece]


# ---- what it says


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_is_role_text_reason_usage_and_done(path: str):
    with serve(QUICK) as golden:
        status, headers, raw = answer(golden, body_of(path), path)
    *found, reason, usage, done = events(raw)
    assert (status, headers["content-type"], done) == (200, "text/event-stream", "[DONE]")
    if path == CHAT:
        assert found.pop(0)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert said(found) == ["The", " café", " 你好", ' "said"', "\n\n"]
    assert reason["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_answer_in_one_piece_is_the_joined_stream_and_takes_as_long(path: str):
    with serve(QUICK) as golden:
        _, _, raw = answer(golden, body_of(path, stream=False), path)
        (record,) = golden.served
    choice, usage = json.loads(raw)["choices"][0], json.loads(raw)["usage"]
    assert (choice["message"]["content"] if path == CHAT else choice["text"]) == text(5)
    assert usage == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert record.tokens == [5]
    assert 0 <= record.written_s[0] - record.arrival_s - 0.04 < SLACK_S


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(0, 40), per_chunk=st.integers(1, 9), role=st.booleans(), chat=st.booleans())
def test_the_pieces_joined_are_the_text_and_their_tokens_the_usage(null, tokens, per_chunk, role, chat):
    null.script = replace(NULL, tokens=tokens, per_chunk=per_chunk, role_chunk=role)
    path = CHAT if chat else COMPLETIONS
    _, _, raw = answer(null, body_of(path, tokens=7), path)
    found = events(raw)
    assert "".join(said(found)) == text(tokens)
    assert len(said(found)) == -(-tokens // per_chunk)
    assert null.served[-1].tokens == [len_of(piece, per_chunk, tokens, i) for i, piece in enumerate(said(found))]
    assert sum(null.served[-1].tokens) == tokens == found[-2]["usage"]["completion_tokens"]
    assert ("assistant" in raw.decode()) == (role and chat)


def len_of(piece: str, per_chunk: int, tokens: int, i: int) -> int:
    """The tokens of piece i, found by its text."""
    size = min(per_chunk, tokens - i * per_chunk)
    assert piece == text(size, i * per_chunk)
    return size


@pytest.fixture
def null():
    with serve(NULL) as golden:
        yield golden


def test_usage_comes_to_who_asks_and_only_where_the_script_has_it(null):
    assert b"usage" not in answer(null, body_of(stream_options=None))[2]
    null.script = replace(NULL, usage=False)
    assert b"usage" not in answer(null, body_of())[2]


def test_prompts_given_as_tokens_or_as_parts_are_counted(null):
    for prompt, tokens in (([5, 6, 7, 8], 4), (["a b", "c"], 3), ("a b", 2)):
        raw = answer(null, body_of(COMPLETIONS, prompt=prompt), COMPLETIONS)[2]
        assert events(raw)[-2]["usage"]["prompt_tokens"] == tokens


def test_the_queue_is_told_in_the_head_and_in_the_usage_and_the_head_waits_for_it():
    with serve(replace(QUICK, first_s=0.06, queue_s=0.05)) as golden:
        with connect(golden) as connection:
            connection.sendall(request(CHAT, body_of(), "Connection: close"))
            first = connection.recv(65536)
            seen_s = time.perf_counter()
        _, headers, raw = answer(golden, body_of())
    assert b"Server-Timing: queue;dur=50.000" in first
    assert seen_s - golden.served[0].arrival_s >= 0.05
    assert headers["server-timing"] == "queue;dur=50.000"
    assert events(raw)[-2]["usage"]["timing"] == {"queue": 0.05}


def test_models_metrics_and_health(null):
    answer(null, body_of())
    pages = {}
    for path in ("/v1/models", "/metrics", "/health", "/served", "/nothing"):
        connection = http.client.HTTPConnection(urlsplit(null.url).netloc, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("GET", path)
            reply = connection.getresponse()
            pages[path] = reply.status, reply.read().decode()
    assert [one["id"] for one in json.loads(pages["/v1/models"][1])["data"]] == ["golden"]
    families = {one.name: one.samples[0].value for one in text_string_to_metric_families(pages["/metrics"][1])}
    assert families == {"llmserve_requests_running": 0, "llmserve_prompt_tokens": 3, "llmserve_generated_tokens": 5}
    assert json.loads(pages["/health"][1]) == {"status": "ok"}
    assert json.loads(pages["/served"][1])[0]["tokens"] == [1] * 5
    assert pages["/nothing"][0] == 404


@pytest.mark.parametrize("raw", [b"{", b"[]", b"{}", b'{"messages": 1}', b'{"messages": [], "max_tokens": "x"}'])
def test_what_is_no_request_is_400(null, raw: bytes):
    connection = http.client.HTTPConnection(urlsplit(null.url).netloc, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("POST", CHAT, raw)
        assert connection.getresponse().status == 400
    assert answer(null, body_of())[0] == 200, "and the next one is served"


# ---- when


def test_the_pieces_come_at_the_moments_of_the_script_and_lateness_does_not_add_up():
    with serve(Script(first_s=0.05, gap_s=0.01)) as golden:
        answer(golden, body_of(tokens=30))
        (record,) = golden.served
    late_s = [moment - record.arrival_s - 0.05 - 0.01 * i for i, moment in enumerate(record.written_s)]
    assert len(late_s) == 30
    assert all(0 <= one < SLACK_S for one in late_s)
    assert min(late_s[20:]) < 0.01, "thirty sleeps, each a little late, would have added up"


def test_a_client_never_sees_a_piece_before_it_was_written():
    seen_s, found = [], b""
    with serve(QUICK) as golden:
        with connect(golden) as connection:
            sent_s = time.perf_counter()
            connection.sendall(request(CHAT, body_of(tokens=8), "Connection: close"))
            while piece := connection.recv(65536):
                now_s, found = time.perf_counter(), found + piece
                seen_s += [now_s] * (found.count(b'"delta":{"content"') - len(seen_s))
        (record,) = golden.served
    assert sent_s <= record.arrival_s <= record.written_s[0]
    assert all(written <= seen for written, seen in zip(record.written_s, seen_s, strict=True))
    assert all(before <= after for before, after in pairwise(record.written_s))
    assert record.written_s[-1] <= record.end_s and not record.left


def test_requests_in_flight_together_each_have_their_own_clock():
    with serve(Script(first_s=0.3, gap_s=0.0)) as golden:
        start_s = time.perf_counter()
        asking = [threading.Thread(target=answer, args=(golden, body_of())) for _ in range(10)]
        [one.start() for one in asking]
        [one.join() for one in asking]
        took_s = time.perf_counter() - start_s
    assert took_s < 10 * 0.3, "one after the other"
    assert len(golden.served) == 10
    assert all(one.written_s[0] - one.arrival_s >= 0.3 for one in golden.served)


def test_requests_sent_at_once_on_one_connection_are_answered_in_order(null):
    with connect(null) as connection:
        last = request(CHAT, body_of(tokens=3, stream=False), "Connection: close")
        connection.sendall(b"".join(request(CHAT, body_of(tokens=n, stream=False)) for n in (1, 2)) + last)
        raw = b"".join(iter(lambda: connection.recv(65536), b""))
    assert raw.count(b"HTTP/1.1 200") == 3
    assert [sum(one.tokens) for one in null.served] == [1, 2, 3]


def test_a_request_in_crumbs_is_one_request(null):
    with connect(null) as connection:
        for byte in request(CHAT, body_of(), "Connection: close"):
            connection.sendall(bytes([byte]))
        raw = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b"[DONE]" in raw and len(null.served) == 1


def test_a_long_answer_to_a_slow_reader_comes_whole(null):
    with connect(null) as connection:
        connection.sendall(request(CHAT, body_of(tokens=40_000), "Connection: close"))
        wait_for(lambda: null.served and null.served[0].written_s)
        time.sleep(SLACK_S)  # every buffer on the way is full by now
        assert len(null.served[0].written_s) < 40_000
        raw = b"".join(iter(lambda: connection.recv(65536), b""))
    assert raw.count(b'"delta":{"content"') == 40_000 and raw.endswith(b"0\r\n\r\n")


def test_a_client_that_leaves_is_seen():
    with serve(Script(first_s=PATIENCE_S)) as golden:
        with connect(golden) as connection:
            connection.sendall(request(CHAT, body_of()))
            wait_for(lambda: golden.served)
        wait_for(lambda: golden.served[0].end_s)
        assert golden.served[0].left and golden.served[0].written_s == []


def wait_for(condition: Any) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def test_the_loop_waits_for_less_than_a_millisecond_where_it_is_asked_to():
    """epoll rounds every wait up to a whole millisecond."""
    loop = new_loop()

    async def waits() -> list[float]:
        found = []
        for _ in range(200):
            begin_s, waited = time.perf_counter(), loop.create_future()
            loop.call_at(loop.time() + 0.0001, waited.set_result, None)
            await waited
            found.append(time.perf_counter() - begin_s)
        return found

    try:
        found = loop.run_until_complete(waits())
    finally:
        loop.close()
    assert min(found) >= 0.0001
    assert min(found) < 0.001


# ---- what goes wrong


def faulty(fault: Fault, **more: Any) -> Script:
    return replace(QUICK, fault=fault, **more)


def test_refuse_is_a_port_on_which_nobody_listens():
    with serve(faulty(Fault.REFUSE)) as golden, pytest.raises(ConnectionRefusedError):
        connect(golden)


def test_tls_is_an_address_that_promises_it_and_a_port_that_does_not():
    with serve(faulty(Fault.TLS)) as golden:
        assert golden.url.startswith("https://")
        connection = http.client.HTTPSConnection(urlsplit(golden.url).netloc, timeout=PATIENCE_S)
        with contextlib.closing(connection), pytest.raises(ssl.SSLError):
            connection.request("GET", "/health")


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [(Fault.WRONG_MODEL, 404, "model_not_found"), (Fault.TOO_MANY, 429, "rate_limit_exceeded"),
     (Fault.UNAVAILABLE, 503, "overloaded")],
)  # fmt: skip
@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_is_json_with_retry_after_where_it_can_help(fault: Fault, status: int, code: str, stream: bool):
    with serve(faulty(fault, retry_after_s=7)) as golden:
        found, headers, raw = answer(golden, body_of(stream=stream))
    assert (found, json.loads(raw)["error"]["code"]) == (status, code)
    assert headers.get("retry-after") == (None if status == 404 else "7")


def test_a_fault_may_end_after_so_many_requests():
    with serve(faulty(Fault.UNAVAILABLE, times=2)) as golden:
        assert [answer(golden, body_of())[0] for _ in range(4)] == [503, 503, 200, 200]
        assert [one.status for one in golden.served] == [503, 503, 200, 200]


def test_500_is_a_page_in_html():
    with serve(faulty(Fault.HTML_500)) as golden:
        status, headers, raw = answer(golden, body_of())
    assert (status, headers["content-type"], raw[:6]) == (500, "text/html", b"<html>")


@pytest.mark.parametrize("stream", [True, False])
def test_hang_reads_the_request_and_says_nothing(stream: bool):
    with serve(faulty(Fault.HANG)) as golden, connect(golden) as connection:
        connection.sendall(request(CHAT, body_of(stream=stream)))
        wait_for(lambda: golden.served)
        connection.settimeout(SLACK_S)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_hang_midway_says_two_pieces_and_then_nothing():
    with serve(faulty(Fault.HANG_MIDWAY)) as golden, connect(golden) as connection:
        connection.sendall(request(CHAT, body_of()))
        found = b""
        while b"caf" not in found:
            found += connection.recv(65536)
        connection.settimeout(SLACK_S)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    assert found.count(b'"delta":{"content"') == 2


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize(("fault", "reset"), [(Fault.DIE, True), (Fault.CUT, False)])
def test_die_and_cut_break_off_after_so_many_pieces(fault: Fault, reset: bool, after: int):
    with serve(faulty(fault, after=after)) as golden:
        raw, was_reset = raw_answer(golden, body_of())
        (record,) = golden.served
    assert was_reset is reset
    assert raw.count(b'"delta":{"content"') == after == len(record.written_s)
    assert b"[DONE]" not in raw and not raw.endswith(b"0\r\n\r\n")
    assert record.end_s is not None and not record.left


@pytest.mark.parametrize(("fault", "reset"), [(Fault.DIE, True), (Fault.CUT, False)])
def test_an_answer_in_one_piece_breaks_off_in_its_middle(fault: Fault, reset: bool):
    with serve(faulty(fault)) as golden:
        raw, was_reset = raw_answer(golden, body_of(stream=False))
    head, _, body = raw.partition(b"\r\n\r\n")
    assert was_reset is reset and 0 < len(body) < int(head.rpartition(b"Content-Length: ")[2].split(b"\r\n")[0])


@pytest.mark.parametrize("script", [faulty(Fault.NO_DONE), replace(QUICK, done=False)])
def test_no_done_is_a_whole_stream_without_its_last_event(script: Script):
    with serve(script) as golden:
        raw, was_reset = raw_answer(golden, body_of())
    assert b"[DONE]" not in raw and raw.endswith(b"0\r\n\r\n") and not was_reset
    assert raw.count(b'"delta":{"content"') == 5 and b'"usage"' in raw


def test_malformed_is_one_broken_event_among_whole_ones():
    with serve(faulty(Fault.MALFORMED)) as golden:
        _, _, raw = answer(golden, body_of())
    found = raw.decode().split("\n\n")
    broken = [i for i, one in enumerate(found) if one == 'data: {"choices": [{"delta']
    assert broken == [3], "after the role and two pieces"
    del found[3]
    assert "".join(said(events("\n\n".join(found).encode()))) == text(5)


def test_an_error_event_ends_the_stream_in_order():
    with serve(faulty(Fault.ERROR_EVENT)) as golden:
        status, _, raw = answer(golden, body_of())
    *found, error, done = events(raw)
    assert (status, len(said(found)), done) == (200, 2, "[DONE]")
    assert error["error"]["code"] == "internal_error"


@pytest.mark.parametrize("script", [faulty(Fault.NOT_A_STREAM), replace(QUICK, stream=False)])
def test_not_a_stream_answers_in_one_piece(script: Script):
    with serve(script) as golden:
        _, headers, raw = answer(golden, body_of())
    assert headers["content-type"] == "application/json"
    assert json.loads(raw)["choices"][0]["message"]["content"] == text(5)


@pytest.mark.parametrize("stream", [True, False])
def test_empty_has_not_one_token(stream: bool):
    with serve(faulty(Fault.EMPTY)) as golden:
        _, _, raw = answer(golden, body_of(stream=stream))
        (record,) = golden.served
    assert sum(record.tokens) == 0
    if stream:
        assert said(events(raw)) == [] and raw.count(b'"content":""') == 4
        assert events(raw)[-2]["usage"]["completion_tokens"] == 0
    else:
        assert json.loads(raw)["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("stream", [True, False])
def test_slow_headers_begin_at_once_and_end_with_the_first_token(stream: bool):
    with serve(faulty(Fault.SLOW_HEADERS, first_s=0.5)) as golden:
        with connect(golden) as connection:
            connection.sendall(request(CHAT, body_of(stream=stream), "Connection: close"))
            first = connection.recv(65536)
            seen_s = time.perf_counter()
            raw = first + b"".join(iter(lambda: connection.recv(65536), b""))
        (record,) = golden.served
    assert seen_s - record.arrival_s < 0.5 <= record.written_s[0] - record.arrival_s
    assert len(first) == 40 and b"\r\n\r\n" not in first
    assert text(5).replace('"', '\\"').replace("\n", "\\n")[:3].encode() in raw


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_has_a_plan_for_streams_and_for_single_bodies(fault: Fault):
    for stream in (True, False):
        asked = Asked(chat=True, stream=stream, usage=True, model="any", prompt_tokens=3, new_tokens=5)
        found = plan(faulty(fault), asked)
        moments = [step.at_s for step in found.steps]
        assert moments == sorted(moments), "what is due later never waits for nothing"
        assert fault.meaning


# ---- as a process of its own


def test_one_in_its_own_process_tells_its_truth_and_ends_with_the_block():
    with started(replace(QUICK, per_chunk=2, role_chunk=False)) as golden:
        before_s = time.perf_counter()
        raw = answer(golden, body_of())[2]
        after_s = time.perf_counter()
        (record,) = golden.served
    assert said(events(raw)) == ["The café", ' 你好 "said"', "\n\n"] and b"assistant" not in raw
    assert record.tokens == [2, 2, 1]
    assert before_s <= record.arrival_s <= record.written_s[-1] <= after_s, "the two clocks are one"
    with pytest.raises(OSError):
        connect(golden)


def test_the_leash_ends_it_when_its_starter_is_gone():
    command = [sys.executable, "-m", "load.golden", "--null", "--port", "0", "--leash"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 0


def test_its_address_is_its_only_line_and_ctrl_c_ends_it_in_silence():
    command = [sys.executable, "-m", "load.golden", "--null", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        rest, complaints = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, rest, complaints) == (0, "", "")


def test_a_port_that_is_taken_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as other:
        command = [sys.executable, "-m", "load.golden", "--port", str(other.getsockname()[1])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "name another one with --port" in done.stderr


@given(
    st.builds(
        Script,
        first_s=st.floats(9, 99), gap_s=st.floats(0, 1), tokens=st.none() | st.integers(0, 99),
        per_chunk=st.integers(1, 9), role_chunk=st.booleans(), usage=st.booleans(), done=st.booleans(),
        stream=st.booleans(), queue_s=st.none() | st.floats(0, 9), fault=st.none() | st.sampled_from(Fault),
        after=st.integers(0, 9), times=st.none() | st.integers(0, 9), retry_after_s=st.integers(0, 99),
    )
)  # fmt: skip
def test_every_script_can_be_said_on_the_command_line(script: Script):
    again = GoldenConfig.from_cli("", words(script))
    assert all(getattr(again, name) == value for name, value in vars(script).items())


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [("--tokens x", "--tokens"), ("--queue-s -1", "--queue-s"), ("--queue-s nan", "--queue-s"),
     ("--queue-s 1", "--queue-s 1 is a part of --first-s"),
     ("--times 0.5", "--times"), ("--fault none", "--fault"), ("--first-s nan", "--first-s"),
     ("--per-chunk 0", "--per-chunk")],
)  # fmt: skip
def test_a_wrong_word_is_one_sentence(flags: str, wrong: str):
    with pytest.raises(UserError, match=wrong):
        GoldenConfig.from_cli("", flags.split())
