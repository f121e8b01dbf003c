"""Fault matrix B4: more than there is room for, too late, too large. The numbers are the matrix's."""

import threading
import time
from statistics import quantiles

import pytest
from service_kit import Later, chat_body, raw_request, read_until, served

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
DETAILS = {"limit_hit", "requests", "queue_depth", "queued_tokens", "drain_rate_tok_s", "retry_after_s"}
SLACK = 10  # times what the matrix allows: tests share their cores


def counted(owner, name: str, monkeypatch) -> list:
    """Calls of owner.name, each with what it returned or raised."""
    calls, real = [], getattr(owner, name)

    def wrapped(*arguments, **named):
        found = None
        try:
            found = real(*arguments, **named)
            return found
        finally:
            calls.append(found)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


def together(count: int, ask) -> list:
    """The results of ask(i), all begun at the same moment."""
    barrier = threading.Barrier(count)

    def one(i: int):
        barrier.wait()
        return ask(i)

    return [later.result() for later in [Later(lambda i=i: one(i)) for i in range(count)]]


def texts(reply) -> list[str]:
    return [choice["message"]["content"] for choice in reply.json["choices"]]


# ---- 51, 52: too many at once, and for long


def test_b51_of_a_burst_exactly_as_many_come_in_as_there_are_places(checkpoint_folder, monkeypatch):
    with served(checkpoint_folder) as here:
        here.runner.hold()
        tokenised = counted(here.house.serving.prompts, "encode", monkeypatch)
        burst = Later(lambda: together(80, lambda i: here.chat(f"number {i}")))
        here.until(lambda: here.outcomes().get("shed_queue") == 72)
        here.until(lambda: here.admission.answers == 8 and len(tokenised) == 8, "4 slots and 4 places in the queue")
        here.runner.go()
        replies = burst.result()
        refused = [reply for reply in replies if reply.status == 503]
        assert len(refused) == 72 and sum(reply.status == 200 for reply in replies) == 8
        assert len(tokenised) == 8, "of those who were refused nothing is tokenised"
        for reply in refused:
            assert (reply.error["code"], reply.error["type"]) == ("server_overloaded", "overloaded_error")
            details = reply.error["details"]
            assert set(details) >= DETAILS and details["limit_hit"] == "requests"
            assert details["requests"] == 8 and details["queue_depth"] <= 8
            assert reply.headers["x-should-retry"] == "true"
            assert 400 <= int(reply.headers["retry-after-ms"]) <= 72_000
            assert int(reply.headers["retry-after"]) * 1000 >= int(reply.headers["retry-after-ms"])
        again = [int(reply.headers["retry-after-ms"]) for reply in refused]
        assert len(set(again)) > 30 and max(again) > 1.2 * min(again), "they do not all come back together"
        waits = [line["t_total"] for line in here.lines() if line["status"] == 503]
        assert len(waits) == 72 and quantiles(waits, n=100)[98] < 0.05 * SLACK


def test_b51_bodies_that_are_still_to_come_keep_nobody_out(checkpoint_folder):
    """Else a handful of connections that promise a body and do not send it would fill the house."""
    whole = raw_request(CHAT, chat_body("late"))
    with served(checkpoint_folder) as here:
        slow = [here.open() for _ in range(20)]
        for connection in slow:
            connection.sendall(whole[:-5])
        here.until(lambda: here.received == 21)
        assert here.admission.at_door == 0 and here.chat().status == 200
        here.runner.hold()
        for connection in slow:
            connection.sendall(whole[-5:])
        here.until(lambda: here.outcomes().get("shed_queue") == 12 and here.admission.answers == 8)
        here.runner.go()
        answers = [read_until(connection, b"}}") for connection in slow]
        assert sum(b" 200 " in answer for answer in answers) == 8
        for connection in slow:
            connection.close()


def test_b52_sustained_overload_never_overfills_the_queue_and_who_is_admitted_is_served(checkpoint_folder, monkeypatch):
    """In steps and not in seconds: the minute, and goodput against the most there is, are python -m benchmarks's."""
    with served(checkpoint_folder) as here:
        here.runner.pace_s = 0.004
        inside, enter, came, submit = [], here.admission.enter, [], here.bridge.submit

        def watched(**wishes):
            ticket = enter(**wishes)
            inside.append((here.admission.answers, here.admission.tokens))
            return ticket

        def noted(*given):
            came.append(here.runner.steps)
            return submit(*given)

        monkeypatch.setattr(here.admission, "enter", watched)
        monkeypatch.setattr(here.bridge, "submit", noted)
        before = here.runner.steps

        def insist(i: int):
            replies = []
            while len(inside) < 250:
                replies.append(here.chat(f"client {i}", max_tokens=8))
            return replies

        replies = [reply for many in together(16, insist) for reply in many]
        served_well = [reply for reply in replies if reply.status == 200]
        assert {reply.status for reply in replies} == {200, 503}, "twice as many as there are places"
        assert len(served_well) == len(inside), "everyone admitted is served"
        assert all(reply.json["usage"]["completion_tokens"] == 8 for reply in served_well)
        assert max(answers for answers, _ in inside) == 8 and max(tokens for _, tokens in inside) <= 4 * 512
        steps = here.runner.seen[before:]
        full = sum(len(step) == 4 for step in steps)
        assert full > 0.5 * len(steps), "and the slots are in use meanwhile"
        first = {}
        for i, step in enumerate(steps):
            for number in step:
                first.setdefault(number, before + i)
        waited = [first[number] - step for number, step in zip(sorted(first), came, strict=True)]
        assert max(waited) <= 3 * (1 + 8), "four run before the last in the queue, a prompt and 8 tokens each"


# ---- 53, 54: nobody starves


def test_b53_neither_the_tiny_nor_the_huge_starve(checkpoint_folder):
    with served(checkpoint_folder, max_queued=60, max_queued_tokens=100_000) as here:
        here.runner.hold()
        connections = []

        def send(text: str, **wishes) -> None:
            connections.append(here.send_chat(text, **wishes))
            here.until(lambda: len(here.jobs) == len(connections))

        for i in range(25):
            send(f"{i}")
        send("x" * 450, max_tokens=20)
        for i in range(25):
            send(f"{i}")
        numbers = [job.answers[0].request.number for job in here.jobs]
        begin, huge = len(here.runner.seen), numbers[25]
        here.runner.go()
        assert all(b" 200 " in read_until(connection, b'"usage"') for connection in connections)
        for connection in connections:
            connection.close()
        steps = here.runner.seen[begin:]
        found = {number: [i for i, step in enumerate(steps) if number in step] for number in numbers}
        first = [found[number][0] for number in numbers]
        assert first == sorted(first), "nobody overtakes"
        for number, mine in found.items():
            assert mine == list(range(mine[0], mine[-1] + 1)), "who has begun is in every step until it ends"
            assert len(mine) <= (10 + 20 if number == huge else 4 + 2), "its prompt in some pieces, and each new token"
        assert len(steps) <= 8 + 50 * 6 / 3, "8 for the huge prompt, and some three of the others at a time"


def test_b54_of_two_keys_one_floods_and_the_other_is_served(checkpoint_folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("flood\nquiet\n")
    wishes = {"api_key": "owner", "api_keys_file": str(keys), "max_queued": 20, "max_queued_tokens": 600}
    with served(checkpoint_folder, **wishes) as here:
        here.runner.pace_s, over = 0.0005, threading.Event()

        def ask(key: str, new: int):
            return here.complete([70] * 20, max_tokens=new, headers={"Authorization": f"Bearer {key}"})

        def flood(_):
            found = []
            while not over.is_set():
                found.append(ask("flood", 30).status)
                time.sleep(0.005)
            return found

        flooding = Later(lambda: together(14, flood))
        here.until(lambda: here.outcomes().get("shed_queue", 0) > 20)
        mine = [ask("quiet", 20) for _ in range(20)]
        over.set()
        theirs = [status for many in flooding.result() for status in many]
        assert sum(reply.status == 200 for reply in mine) >= 0.9 * 20, mine[-1].body
        assert set(theirs) == {200, 503}


# ---- 55, 56: deadlines


@pytest.mark.parametrize("header", [{"x_request_deadline_ms": "20"}, {"x_stainless_read_timeout": "0.02"}])
def test_b55_a_deadline_that_cannot_be_met_is_refused_at_once_with_the_numbers(checkpoint_folder, monkeypatch, header):
    with served(checkpoint_folder) as here:
        tokenised = counted(here.house.serving.prompts, "encode", monkeypatch)
        alone = here.chat("hello", max_tokens=450, headers=header)  # nobody else is there: its own steps are too many
        here.runner.hold()
        others = [here.later(here.chat, f"{i}", max_tokens=450) for i in range(4)]
        here.until(lambda: len(here.jobs) == 4)
        computed = here.bridge.count("computed")
        behind = here.chat("hello", max_tokens=1, headers=header)
        for reply in (alone, behind):
            assert (reply.status, reply.error["code"]) == (503, "deadline_unreachable")
            details = reply.error["details"]
            assert set(details) >= DETAILS | {"predicted_wait_s", "deadline_s"} and details["limit_hit"] == "deadline"
            assert 0 <= details["deadline_s"] <= 0.02 and reply.headers["x-should-retry"] == "false"
            assert reply.headers["retry-after"]
        assert behind.error["details"]["predicted_wait_s"] > 0.02
        assert here.bridge.count("computed") == computed and len(tokenised) == 4
        here.until(lambda: here.outcomes().get("shed_deadline") == 2)
        here.runner.go()
        assert {other.result().status for other in others} == {200}


def test_b55_a_streams_read_timeout_is_about_silence_which_heartbeats_break(checkpoint_folder):
    with served(checkpoint_folder, heartbeat=0.1) as here:
        here.runner.hold()
        asked = here.later(here.chat, stream=True, max_tokens=450, headers={"x_stainless_read_timeout": "0.02"})
        here.until(lambda: here.bridge.engine.answers)
        time.sleep(0.1)
        here.runner.go()
        assert asked.result().events[-1] == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", ["header", "queue_timeout"])
def test_b56_a_deadline_that_passes_in_the_queue(checkpoint_folder, limit: str, stream: bool):
    settings = {"queue_timeout": 0.2} if limit == "queue_timeout" else {}
    header = {"x_request_deadline_ms": "200"} if limit == "header" else {}
    with served(checkpoint_folder, max_running=1, **settings) as here:
        here.runner.hold()
        first = here.later(here.chat, "first", max_tokens=20)
        here.until(lambda: here.bridge.engine.answers)
        begin = time.monotonic()
        late = here.chat("late", max_tokens=2, stream=stream, headers=header)
        assert 0.15 < time.monotonic() - begin < 0.2 * SLACK
        assert (late.status, late.error["code"]) == (504, "deadline_exceeded"), "a stream too: nothing was said yet"
        assert late.error["details"] == {"prompt_tokens": len("[user] late[assistant] "), "completion_tokens": 0}
        assert "never left the queue" in late.error["message"]
        assert late.headers["x-should-retry"] == "false" and "retry-after" not in late.headers
        begin = len(here.runner.seen)
        here.runner.go()
        assert first.result().status == 200, "one that has begun may take longer than the queue's patience"
        assert {number for step in here.runner.seen[begin:] for number in step} == {1}, "the late one is never computed"
        here.until(lambda: here.outcomes().get("timeout") == 1)


@pytest.mark.parametrize(
    ("stream", "header"),
    [
        (False, {"x_request_deadline_ms": "700"}), (False, {"x_stainless_read_timeout": "0.7"}),
        (True, {"x_request_deadline_ms": "700"}),
    ],
)  # fmt: skip
def test_b56_a_deadline_that_passes_while_tokens_come(checkpoint_folder, stream: bool, header):
    with served(checkpoint_folder) as here:
        here.runner.hold()
        neighbour = here.later(here.chat, "neighbour", max_tokens=40)
        here.until(lambda: here.bridge.engine.answers)
        late = here.later(here.chat, "late", max_tokens=200, stream=stream, headers=header)
        job = here.until(lambda: here.jobs[1:])[0]
        here.runner.allow(6)  # the neighbour's first, then five with both in them
        here.until(lambda: job.stream.delivered == 5)
        reply = late.result()
        error = reply.events[-1]["error"] if stream else reply.error
        assert reply.status == (200 if stream else 504) and error["code"] == "deadline_exceeded"
        assert error["details"] == {"prompt_tokens": len("[user] late[assistant] "), "completion_tokens": 5}
        if stream:
            told = [one["choices"][0] for one in reply.events[:-1]]
            assert len("".join(one["delta"].get("content") or "" for one in told)) == 5
            assert "[DONE]" not in reply.events and all(one["finish_reason"] is None for one in told)
        begin = len(here.runner.seen)
        here.runner.allow(5)
        here.until(lambda: len(here.runner.seen) == begin + 5)
        mine = [job.answers[0].request.number in step for step in here.runner.seen[begin:]]
        assert sum(mine) <= 1, "only the step that had begun"
        assert not job.answers[0].request.blocks and here.admission.answers == 1
        here.runner.go()
        assert neighbour.result().json["usage"]["completion_tokens"] == 40
        here.until(lambda: here.bridge.wasted)
        assert set(here.bridge.wasted) == {"deadline"}


# ---- 57: retries come last


def test_b57_in_overload_retries_are_shed_first(checkpoint_folder):
    with served(checkpoint_folder, max_queued=200, max_queued_tokens=100_000) as here:
        here.runner.hold()
        connections = []

        def send(count: int, *headers: str) -> None:
            for i in range(count):
                connections.append(here.open())
                connections[-1].sendall(raw_request(CHAT, chat_body(f"{i}", max_tokens=1), *headers))

        send(95)
        here.until(lambda: here.admission.answers == 95)
        send(40, "x-stainless-retry-count: 2")
        here.until(lambda: here.outcomes().get("shed_queue") == 30)
        assert here.admission.answers == 105, "a tenth of those admitted lately"
        send(5)
        here.until(lambda: here.admission.answers == 110)
        here.runner.go()
        here.until(lambda: here.outcomes().get("ok") == 111)  # and the probe
        refused = [answer for answer in map(received, connections) if b" 503 " in answer]
        assert len(refused) == 30 and all(b'"limit_hit":"retries"' in answer for answer in refused)
        assert all(b"server_overloaded" in answer and b"x-should-retry: true" in answer for answer in refused)
        assert sum(bool(line["retry"]) for line in here.lines() if line["status"] == 200) == 10


def received(connection) -> bytes:
    """What has come on a connection that stays open."""
    with connection:
        return connection.recv(65536)


# ---- 58, 59: memory


def test_b58_when_kv_memory_is_short_the_youngest_starts_over_and_all_finish(checkpoint_folder):
    with served(checkpoint_folder, kv_blocks=16, isolate_keys=True) as here:
        asked = [f"story {i}" for i in range(8)]
        alone = [texts(here.chat(text, max_tokens=90)) for text in asked]
        assert not here.bridge.wasted
        here.runner.hold()
        laters, requests = [], []
        for text in asked:
            laters.append(here.later(here.chat, text, max_tokens=90))
            requests.append(here.until(lambda: here.jobs[len(requests) :])[0].answers[0].request)
        here.runner.go()
        replies = [later.result() for later in laters]
        assert [reply.status for reply in replies] == [200] * 8
        assert [texts(reply) for reply in replies] == alone
        assert {reply.json["choices"][0]["finish_reason"] for reply in replies} == {"length"}
        assert requests[0].preemptions == 0 < here.bridge.engine.scheduler.preemptions
        ends = [request.timeline.finished for request in requests]
        assert ends == sorted(ends), "who starts over keeps his place"
        assert set(here.bridge.wasted) == {"preempt"} and here.bridge.wasted["preempt"] > 0
        here.until(lambda: len(here.lines()) == 1 + 16)
        assert sum(line["preemptions"] for line in here.lines()) == here.bridge.engine.scheduler.preemptions
        assert b'llmserve_wasted_tokens_total{reason="preempt"}' in here.ask("/metrics").body


def test_b59_short_of_memory_it_sheds_and_recovers_by_itself(checkpoint_folder):
    used = [0.5]
    with served(checkpoint_folder, memory_used=lambda: used[0]) as here:
        here.runner.hold()
        inside = here.later(here.chat, "inside", max_tokens=20)
        here.until(lambda: here.bridge.engine.answers)
        used[0] = 0.96
        here.until(lambda: here.admission.closed)
        reply = here.chat("outside")
        assert (reply.status, reply.error["code"]) == (503, "server_overloaded")
        assert reply.error["details"]["limit_hit"] == "memory" and reply.headers["x-should-retry"] == "true"
        assert 4000 <= int(reply.headers["retry-after-ms"]) <= 6000
        here.until(lambda: here.outcomes().get("shed_memory") == 1)
        ready, health = here.ask("/health/ready"), here.ask("/health")
        assert (ready.status, ready.json["reason"]) == (503, "memory")
        assert (health.status, health.json["status"]) == (200, "degraded") and here.ask("/health/live").status == 200
        used[0] = 0.93
        here.house.watch.guard_memory()
        assert here.admission.closed == "memory", "not open and shut with every look"
        here.runner.go()
        assert inside.result().status == 200, "who is inside is served"
        used[0] = 0.9
        here.until(lambda: here.admission.closed is None)
        assert here.chat("again").status == 200 and here.ask("/health/ready").status == 200
