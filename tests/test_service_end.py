"""How serve.py ends: told by a signal, in the middle of whatever it does. Numbers are the fault matrix's."""

import contextlib
import json
import signal
import socket
import time

import pytest
from process_kit import Process, longer, pasted, until
from service_kit import Later, chat_body, read_all, read_until

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
NEW = 1200  # tokens that take seconds
STREAM = {"max_tokens": NEW, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def doomed(checkpoint_folder, tmp_path_factory):
    """Those that tests end, started side by side."""
    wishes = {
        "idle": ("--log-file", "/dev/full"), "patient": (), "hasty": ("--drain-timeout", "0.5"),
        "twice": ("--max-running", "1"),
        "interrupted": ("--host", "0.0.0.0"),
    }  # fmt: skip
    place = tmp_path_factory.mktemp("doomed")
    folder = longer(checkpoint_folder, place / "tiny", 100_000)
    with contextlib.ExitStack() as stack:
        found = {}
        for name, arguments in wishes.items():
            found[name] = Process(folder, "--native", "off", *arguments, place=place / name)
            stack.callback(found[name].close)
        yield {name: process.ready() for name, process in found.items()}


def running_stream(process: Process) -> socket.socket:
    """A long stream that has begun to speak."""
    connection = process.open(CHAT, chat_body("count", **STREAM))
    read_until(connection, b'"content":"')
    return connection


def test_who_opens_the_door_to_all_without_a_key_is_warned_and_served(doomed):
    assert "0.0.0.0 is open to others" in doomed["interrupted"].stderr
    assert "is open to others" not in doomed["patient"].stderr
    assert pasted(doomed["interrupted"])["message"]["role"] == "assistant"


def test_b72_b73_a_log_that_cannot_be_written_is_counted_and_sigterm_ends_an_idle_one(doomed):
    process = doomed["idle"]
    assert [process.ask(CHAT, chat_body(str(i))).status for i in range(5)] == [200] * 5
    until(lambda: process.figure("llmserve_log_lines_lost_total") == 5)
    process.signal()
    assert process.ended(5) == 0
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(("name", "number"), [("patient", signal.SIGTERM), ("interrupted", signal.SIGINT)])
def test_b73_a_signal_lets_nobody_in_and_finishes_what_runs(doomed, name: str, number: int):
    process = doomed[name]
    with running_stream(process) as connection:
        process.signal(number)
        until(lambda: process.ask("/health/ready").status == 503)
        assert process.ask("/health/ready").json["reason"] == "drain"
        refused = process.ask(CHAT, chat_body())
        assert (refused.status, refused.error["code"]) == (503, "server_shutting_down")
        assert refused.headers["x-should-retry"] == "true" and "retry-after" in refused.headers
        assert process.ask("/health/live").status == 200 and process.ask("/health").json["status"] == "draining"
        rest = read_all(connection)
    assert rest.count(b"data: [DONE]") == 1 and b'"completion_tokens":%d,' % NEW in rest
    assert process.ended(5) == 0
    assert "Traceback" not in process.stderr
    lines = [json.loads(line) for line in process.stderr.splitlines() if '"event":"request"' in line]
    assert (lines[-1]["outcome"], lines[-1]["completion_tokens"]) == ("ok", NEW)
    assert [line["outcome"] for line in lines].count("shed_drain") == 1


def test_b73_who_is_not_done_when_the_time_is_over_is_told(doomed):
    process = doomed["hasty"]
    with running_stream(process) as connection:
        process.signal()
        begin = time.monotonic()
        rest = read_all(connection)
    assert process.ended(10) == 0
    assert 0.5 <= time.monotonic() - begin < 0.5 + 2 + 3
    assert_told_of_the_end(rest)


def test_b73_a_second_signal_ends_it_at_once(doomed):
    process = doomed["twice"]
    with running_stream(process) as connection:
        waiting = Later(lambda: process.ask(CHAT, chat_body("waits", **STREAM)))
        until(lambda: process.ask("/health").json["now"]["waiting"] == 1)
        process.signal()
        until(lambda: process.ask("/health/ready").status == 503)
        process.signal()
        begin = time.monotonic()
        rest = read_all(connection)
    assert process.ended(5) == 0
    assert time.monotonic() - begin < 4
    assert_told_of_the_end(rest)
    unheard = waiting.result()
    assert (unheard.status, unheard.error["code"]) == (503, "server_shutting_down"), "nothing of it had been sent"
    assert unheard.headers["x-should-retry"] == "true" and unheard.headers["retry-after"]
    assert "Traceback" not in process.stderr


def assert_told_of_the_end(rest: bytes) -> None:
    assert b"[DONE]" not in rest and b'"finish_reason":"' not in rest
    events = [line for line in rest.splitlines() if line.startswith(b"data: ")]
    error = json.loads(events[-1].removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == ("server_shutting_down", "overloaded_error")
