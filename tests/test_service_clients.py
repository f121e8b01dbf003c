"""Fault matrix B5: clients that leave, stop reading or read slowly. The numbers are the matrix's."""

import asyncio
import socket
import struct
import threading
import time

import pytest
from service_kit import PATIENCE_S, chat_body, events_of, raw_request, read_all, read_until, served

from service.connection import MOST_PIPELINED
from service.errors import ApiError
from service.life import Life
from service.schemas import ChatRequest, validated

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
NEIGHBOUR = {"text": "the neighbour", "max_tokens": 40}
LONG = "x" * 400  # a prompt for which a step of 64 tokens is too short
BIG = {"stream": True, "n": 6, "max_tokens": 480, "logprobs": True, "top_logprobs": 2}  # about a megabyte of events
TWICE = BIG | {"stream": False, "n": 2, "max_tokens": 400}  # 200 kB at once: a little more than the kernel takes


def text_of(reply) -> str:
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["message"]["content"]


def number_of(job) -> int:
    return job.answers[0].request.number


def stepped(here, steps: int) -> None:
    """Let a held engine do so many steps. It has done them, and is held in the next one, when this returns."""
    end = here.runner.steps + steps
    here.runner.allow(steps)
    here.until(lambda: here.runner.steps == end)
    here.until(lambda: here.bridge.count("steps") == end)


def slow_reader(here, **wishes) -> socket.socket:
    """A connection with little room for what it has not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", here.port))
    connection.sendall(raw_request(CHAT, chat_body("slow", **wishes)))
    return connection


def other_end(here, connection: socket.socket):
    """The service's transport on this connection."""
    mine = connection.getsockname()

    def found():
        every = [one.transport for one in list(here.server.server_state.connections)]
        return [transport for transport in every if transport.get_extra_info("peername") == mine]

    return here.until(found)[0]


def logged(here, **known):
    """The log line of the one request of which these things are true, once it is written."""

    def found():
        return [line for line in here.lines() if all(line.get(name) == value for name, value in known.items())]

    (line,) = here.until(found)
    return line


# ---- 60, 61: leaving


@pytest.mark.parametrize("stream", [False, True])
def test_b60_who_leaves_the_queue_is_never_computed(checkpoint_folder, stream: bool):
    with served(checkpoint_folder, max_running=1) as here:
        here.runner.hold()
        first = here.later(here.chat, **NEIGHBOUR)
        here.until(lambda: here.bridge.engine.answers)
        connection = here.send_chat("leaving", stream=stream)
        number = number_of(here.until(lambda: here.jobs[1:])[0])
        connection.close()
        here.until(lambda: len(here.jobs) == 1, "for its place to be free, though the engine is in a step")
        assert here.admission.answers == 1
        begin = len(here.runner.seen)
        here.runner.go()
        assert first.result().status == 200
        assert not any(number in step for step in here.runner.seen[begin:])
        line = logged(here, outcome="cancelled")
        assert (line["status"], line["error_code"], line["completion_tokens"]) == (499, "client_left", 0)
        assert not here.bridge.wasted


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode", "cached"])
def test_b61_who_leaves_is_computed_for_two_steps_at_most_and_its_neighbour_does_not_notice(
    checkpoint_folder, phase: str, stream: bool
):
    with served(checkpoint_folder) as here:
        alone = text_of(here.chat(**NEIGHBOUR))
        if phase == "cached":
            here.chat(LONG, max_tokens=1)
        here.runner.hold()
        neighbour = here.later(here.chat, **NEIGHBOUR)
        here.until(lambda: here.bridge.engine.answers)
        connection = here.send_chat("short" if phase == "decode" else LONG, max_tokens=60, stream=stream)
        job = here.until(lambda: here.jobs[1:])[0]
        stepped(here, 4 if phase != "cached" else 1)
        request = job.answers[0].request
        if phase == "decode":
            assert job.stream.delivered == 3
        else:
            assert 0 < request.computed < len(request.prompt) or request.reused > 64
            assert (request.reused > 64) == (phase == "cached")
        connection.close()
        here.until(lambda: len(here.jobs) == 1)
        begin = len(here.runner.seen)
        stepped(here, 4)
        assert sum(request.number in step for step in here.runner.seen[begin:]) <= 1, "only the step that had begun"
        assert not request.blocks and request.finish_reason == "cancelled"
        here.runner.go()
        assert text_of(neighbour.result()) == alone
        assert here.bridge.wasted == {"disconnect": request.spent}
        assert logged(here, outcome="cancelled")["error_code"] == "client_left"


def test_b61_who_leaves_while_its_prompt_is_tokenised_never_reaches_the_engine(checkpoint_folder, monkeypatch):
    with served(checkpoint_folder) as here:
        prompts, begun, going_on = here.house.serving.prompts, threading.Event(), threading.Event()
        encode = prompts.encode

        def slowly(asked):
            begun.set()
            going_on.wait(20)
            return encode(asked)

        monkeypatch.setattr(prompts, "encode", slowly)
        connection, requests = here.send_chat("leaving"), here.bridge.count("requests")
        here.until(begun.is_set)
        assert here.admission.answers == 1 and not here.jobs
        connection.close()
        here.until(lambda: not here.admission.inside, "for its place to be free")
        going_on.set()
        monkeypatch.undo()
        assert here.chat().status == 200
        assert here.bridge.count("requests") == requests + 1, "only the one that stayed"
        assert "tokens" not in logged(here, outcome="cancelled")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 5])
def test_b61_all_of_several_answers_are_given_up(checkpoint_folder, steps: int, stream: bool):
    """The others wait for the first to compute the prompt: before that they are in no queue of the engine's."""
    with served(checkpoint_folder, max_running=8) as here:
        alone = text_of(here.chat(**NEIGHBOUR))
        here.runner.hold()
        neighbour = here.later(here.chat, **NEIGHBOUR)
        here.until(lambda: here.bridge.engine.answers)
        connection = here.send_chat("four", n=4, max_tokens=60, stream=stream)
        job = here.until(lambda: here.jobs[1:])[0]
        stepped(here, steps)
        assert (job.stream.delivered > 8) == (steps == 5) and here.admission.answers == 5
        connection.close()
        here.until(lambda: len(here.jobs) == 1)
        begin = len(here.runner.seen)
        stepped(here, 4)
        for answer in job.answers:
            assert sum(answer.request.number in step for step in here.runner.seen[begin:]) <= 1
            assert answer.request.finish_reason == "cancelled" and not answer.request.blocks
        here.runner.go()
        assert text_of(neighbour.result()) == alone and here.admission.answers == 0


# ---- 62, 63: storms, and half of a connection


def test_b62_a_storm_of_connections_that_are_reset_leaves_nothing_behind(checkpoint_folder):
    with served(checkpoint_folder, max_queued=60) as here:
        here.runner.pace_s = 0.001
        whole = [raw_request(CHAT, chat_body(f"{i}", max_tokens=30, stream=bool(i % 2))) for i in range(2)]
        for i in range(200):
            connection = here.open()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall((b"", whole[0][:100], whole[0], whole[1])[i % 4])
            if i % 8 > 3:
                time.sleep(0.002)  # some get as far as the engine
            connection.close()
        begin = time.monotonic()
        here.until(lambda: here.idle() and not here.server.server_state.connections)
        assert time.monotonic() - begin < 5
        assert here.chat().status == 200
        assert here.outcomes()["cancelled"] > 20


def test_b62_behind_an_answer_that_nobody_reads_nothing_is_begun(checkpoint_folder):
    with served(checkpoint_folder, max_running=6) as here, slow_reader(here, **BIG | {"stream": False}) as connection:
        connection.sendall(raw_request(CHAT, chat_body("second", stream=True, max_tokens=2)))
        mine = other_end(here, connection).get_protocol()
        here.until(lambda: mine.to_start is not None, "for the second one's turn")
        assert here.received == 2 and not here.admission.inside
        connection.close()
        here.until(lambda: mine.to_start is None)


GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"


def test_b62_a_hundred_refused_requests_in_one_piece_are_all_answered_and_of_thousands_no_more(checkpoint_folder):
    """Each that waits for those before it takes memory, and a piece of the network's may hold ten thousand."""
    with served(checkpoint_folder, api_key="k") as here, here.open() as connection:
        connection.sendall(GET * (1 + MOST_PIPELINED))
        answers = b""
        while answers.count(b"HTTP/1.1 401") < 1 + MOST_PIPELINED:
            answers += read_until(connection, b"}}")
        assert b"connection: close" not in answers.lower()
        connection.sendall(GET * 5000)
        last = read_all(connection)
        assert last.count(b"HTTP/1.1 401") == last.count(b'"invalid_api_key"') == 1 + MOST_PIPELINED
        assert last.lower().count(b"connection: close") == 1, "the last one says that no more are taken"
        here.until(lambda: here.outcomes().get("client_error") == 2 * (1 + MOST_PIPELINED))


def test_b17_of_those_that_wait_behind_an_answer_a_hundred_are_kept(checkpoint_folder):
    with served(checkpoint_folder) as here, here.open() as connection:
        here.runner.hold()
        connection.sendall(raw_request(CHAT, chat_body()) + GET * 5000)
        mine = here.until(lambda: [one for one in list(here.server.server_state.connections) if one.deaf])[0]
        here.until(lambda: here.jobs)
        assert len(mine.pipeline) == MOST_PIPELINED
        here.runner.go()
        answers = read_all(connection)
    assert answers.count(b"HTTP/1.1 200") == 1 + MOST_PIPELINED
    assert answers.endswith(b"]}") and answers.lower().count(b"connection: close") == 1


def test_b64_who_does_not_read_refusals_either_is_told_no_more_of_them(checkpoint_folder):
    with served(checkpoint_folder, api_key="k") as here, slow_reader(here) as connection:
        transport, most = other_end(here, connection), 0
        mine = transport.get_protocol()
        for i in range(60):
            connection.sendall(GET * 10)
            here.until(lambda i=i: mine.deaf or mine.flow.write_paused or here.received > 1 + 10 * i)
            most = max(most, transport.get_write_buffer_size())
        here.until(lambda: sum(here.outcomes().values()) == here.received)
        assert 32 << 10 < most < 160 << 10, "601 answers would be twice as much"
        answers = read_all(connection)
        assert 100 < answers.count(b"HTTP/1.1 401") < 601 and answers.lower().count(b"connection: close") == 1


def test_b63_half_a_connection_is_none(checkpoint_folder):
    """The matrix wants a full reply for a client that closes its sending half and reads on. TCP cannot tell it from one
    that has closed altogether before something is written, and 60 and 61 want that one given up at once, also where
    nothing is written for long. So both are taken as gone; no client of HTTP/1.1 that is in use does this.
    """
    with served(checkpoint_folder) as here:
        here.runner.hold()
        for stream in (False, True):
            connection = here.send_chat("half", stream=stream)
            here.until(lambda: here.jobs)
            connection.shutdown(socket.SHUT_WR)
            here.until(lambda: not here.jobs)
            with connection:
                answer = read_all(connection)
            assert b"[DONE]" not in answer and b'finish_reason":"' not in answer, "nothing looks complete"
        here.runner.go()
        here.until(lambda: here.outcomes().get("cancelled") == 2)


# ---- 64, 65: reading slowly, or not at all


@pytest.mark.parametrize("pace_s", [0.0, 0.002])  # all is computed when it is noticed, or not yet
def test_b64_who_stops_reading_is_closed_and_holds_up_nobody(checkpoint_folder, pace_s: float):
    with served(checkpoint_folder, max_running=8, send_timeout=0.5) as here:
        alone = text_of(here.chat(**NEIGHBOUR))
        here.runner.pace_s = pace_s
        begin, pending = time.monotonic(), []
        with slow_reader(here, **BIG) as connection:
            transport = other_end(here, connection)
            here.until(lambda: here.jobs)
            here.until(lambda: pending.append(transport.get_write_buffer_size()) or pending[-1] > 32 << 10)
            while here.house.serving.jobs:
                pending.append(transport.get_write_buffer_size())
                before = time.monotonic()
                assert text_of(here.chat(**NEIGHBOUR)) == alone
                assert time.monotonic() - before < 1.0, "others wait for their own tokens only"
            assert 0.5 < time.monotonic() - begin < 0.5 * 10
            assert 32 << 10 < max(pending) < 220 << 10, "its buffer, and an event of all that is new in one answer"
            line = logged(here, error_code="client_stalled")
            assert (line["outcome"], line["status"]) == ("cancelled", 499) and line["t_send_blocked"] > 0.4
            assert b"[DONE]" not in read_all(connection)


def test_b64_the_rest_of_a_whole_answer_is_not_kept_for_ever_either(checkpoint_folder):
    """It is too little for the connection to be called full, and a close that waits until it is read would hang."""
    with served(checkpoint_folder, max_running=8, send_timeout=0.5) as here:
        for new in (400, 300, 480, 200):  # how much the kernel takes is its own business
            with slow_reader(here, **TWICE | {"max_tokens": new}) as connection:
                transport, lines = other_end(here, connection), len(here.lines())
                here.until(lambda lines=lines: len(here.lines()) > lines)
                if 0 < transport.get_write_buffer_size() < 64 << 10:
                    here.until(lambda: not here.server.server_state.connections)
                    return
    pytest.skip("none of these answers leaves a little over, here")


def test_b64_an_answer_that_is_read_late_but_in_time_does_not_end_the_connection(checkpoint_folder):
    """And the time of one answer on it is not that of the next."""
    with served(checkpoint_folder, send_timeout=1.0) as here, slow_reader(here, **TWICE) as connection:
        for answers in (1, 2):
            here.until(lambda answers=answers: len(here.lines()) == 1 + answers)
            time.sleep(0.55)  # twice: more than the limit
            assert b" 200 " in read_until(connection, b'"usage"')
            if answers == 1:
                connection.sendall(raw_request(CHAT, chat_body("again", **TWICE)))


def test_b65_a_long_answer_on_a_slow_line_may_take_longer_as_long_as_it_gets_on(checkpoint_folder):
    with served(checkpoint_folder, max_running=8, send_timeout=1.0) as here:
        begin, raw = time.monotonic(), b""
        with slow_reader(here, **BIG | {"stream": False}) as connection:
            while not raw.endswith(b"}"):
                for _ in range(30):
                    raw += connection.recv(2048)
                time.sleep(0.1)
        assert b'"usage"' in raw[-1000:] and time.monotonic() - begin > 1.5


def test_b64_an_answer_that_is_only_to_be_read_keeps_nobody_out(checkpoint_folder):
    with served(checkpoint_folder, max_running=6, max_queued=2) as here, slow_reader(here, **BIG):
        here.until(lambda: here.jobs)
        here.until(lambda: here.admission.answers == here.admission.tokens == 0, "for the engine to have done its part")
        assert len(here.house.serving.jobs) == 1
        assert here.chat(n=8, max_tokens=8).status == 200, "all places are there"


def test_b65_byte_by_byte_the_whole_stream_arrives_and_the_slot_is_free_long_before(checkpoint_folder):
    with served(checkpoint_folder, send_timeout=0.5) as here:
        whole = text_of(here.chat("slow", max_tokens=30))
        with slow_reader(here, stream=True, max_tokens=30) as connection:
            raw = b""
            while not raw.endswith(b"0\r\n\r\n"):
                raw += connection.recv(1)
                if len(raw) < 200:
                    time.sleep(0.005)
                elif len(raw) == 200:
                    assert here.idle(), "what is left lies in buffers, and nothing is computed any more"
        assert content_of(unchunked(raw)) == whole


def unchunked(raw: bytes) -> bytes:
    """The body of a chunked answer."""
    rest, body = raw.split(b"\r\n\r\n", 1)[1], b""
    while rest:
        size, rest = rest.split(b"\r\n", 1)
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


def content_of(body: bytes) -> str:
    """The text of a stream that came to its end."""
    *events, done = events_of(body)
    assert done == "[DONE]"
    return "".join(one["choices"][0]["delta"].get("content", "") for one in events)


def test_b65_a_slow_reader_does_not_outlive_its_deadline(checkpoint_folder):
    """There is always something new when it comes back from writing, so that nothing is ever waited for."""
    with served(checkpoint_folder) as here:
        serving, here.runner.pace_s = here.house.serving, 0.01
        asked, _ = validated(ChatRequest, chat_body(max_tokens=450), ignore_unknown=False)

        async def read() -> int:
            life = Life(serving.clock, "slow", serving.clock())
            job = await serving.admit(asked, life, "", 2.0, False)
            try:
                async for _ in serving.follow(job):
                    await asyncio.sleep(0.02)
            except ApiError as why:
                assert why.code == "deadline_exceeded"
                return why.details["completion_tokens"]
            finally:
                serving.close(job)

        assert 20 < asyncio.run_coroutine_threadsafe(read(), here.server.loop).result(20) < 400


# ---- 66: what stands between us and the client


def test_b66_nothing_between_may_hold_a_stream_back(checkpoint_folder):
    with served(checkpoint_folder, heartbeat=0.1) as here:
        here.runner.hold()
        with here.open() as connection:
            body = chat_body(stream=True)
            connection.sendall(raw_request(CHAT, body, "Accept-Encoding: gzip, deflate, br, zstd"))
            raw = read_until(connection, b": still here\n\n\r\n")
            head, _ = raw.split(b"\r\n\r\n", 1)
            headers = head.lower().split(b"\r\n")
            assert b"x-accel-buffering: no" in headers and b"cache-control: no-cache" in headers
            assert b"content-type: text/event-stream; charset=utf-8" in headers
            assert not any(line.startswith((b"content-encoding", b"content-length")) for line in headers)
            raw += read_until(connection, b": still here\n\n\r\n")  # and again
            assert b"data:" not in raw and here.runner.steps == 4, "all this before the first token"
            here.runner.go()
            raw += read_until(connection, b"\r\n0\r\n\r\n")
        assert content_of(unchunked(raw)) == text_of(here.chat())
        assert events_of(unchunked(raw))[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        plain = here.chat(headers={"Accept_Encoding": "gzip"})
        assert "content-encoding" not in plain.headers and text_of(plain)


def test_b66_of_a_stream_nothing_is_sent_before_its_first_token(checkpoint_folder):
    """So that a proxy may still give it to another server. Then who speaks comes along with the first of the text."""
    with served(checkpoint_folder) as here:
        here.runner.hold()
        with here.send_chat(stream=True) as connection:
            here.until(lambda: here.jobs)
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(PATIENCE_S)
            here.runner.allow(1)
            head, first = read_until(connection, b"}]}\n\n\r\n").split(b"\r\n\r\n", 1)
            assert b" 200 " in head and b"queue;dur=" in head and b"prefill;dur=" in head
            opening, text = (one["choices"][0]["delta"] for one in events_of(first.partition(b"\r\n")[2]))
            assert opening == {"role": "assistant", "content": ""} and len(text["content"]) == 1
            here.runner.go()
            assert b"[DONE]" in read_until(connection, b"\r\n0\r\n\r\n")


def test_b66_what_fails_after_a_sign_of_life_is_an_event(checkpoint_folder):
    with served(checkpoint_folder, heartbeat=0.1) as here:
        here.runner.hold()
        with here.send_chat(stream=True) as connection:
            assert b" 200 " in read_until(connection, b": still here\n\n\r\n")
            here.runner.faults[1] = RuntimeError("broken")
            here.runner.go()
            raw = read_until(connection, b"\r\n0\r\n\r\n")
        assert b'"code":"engine_error"' in raw and b"[DONE]" not in raw and b'"role"' not in raw
        here.until(lambda: here.outcomes().get("engine_error") == 1)
