"""Fault matrix B6: what breaks inside, who is told, and what goes on. Numbers are the matrix's."""

import signal
import threading
import time

import pytest
from service_kit import Served, read_all, read_until, served
from step_kit import figure, number_of, one_step, running, settled, text_of

from engine.request import BadLogits

pytestmark = pytest.mark.slow


@pytest.fixture
def here(checkpoint_folder):
    with served(checkpoint_folder) as found:
        yield found


# ---- one request's own fault


def test_b68_b72_one_requests_fault_is_its_own(here):
    alone = text_of(here.chat("neighbour", max_tokens=8))
    here.runner.hold()
    asked = [here.later(here.chat, text, max_tokens=8) for text in ("neighbour", "broken")]
    running(here, 2)
    here.runner.faults[number_of(here, "broken")] = BadLogits("the network's output is nan: secret insides")
    here.runner.go()
    good, bad = (one.result() for one in asked)
    assert text_of(good) == alone
    assert (bad.status, bad.error["code"], bad.error["type"]) == (500, "engine_error", "server_error")
    assert bad.headers["x-should-retry"] == "true" and b"secret" not in bad.body
    line = next(line for line in settled(here) if line["outcome"] == "engine_error")
    assert "BadLogits" in line["error"] and "secret insides" in line["error"]
    assert line["request_id"] == bad.headers["x-request-id"]
    assert here.bridge.restarts == 0 and here.ask("/health/ready").status == 200


def test_b68_a_stream_that_fails_says_so_and_never_that_it_is_done(here):
    here.runner.hold()
    with here.send_chat(stream=True, max_tokens=8) as connection:
        running(here, 1)
        one_step(here)
        read_until(connection, b'"content":"')
        here.runner.faults[1] = RuntimeError("insides")
        here.runner.go()
        rest = read_until(connection, b"0\r\n\r\n")
    assert b'"code":"engine_error"' in rest and b"insides" not in rest
    assert b"[DONE]" not in rest and b'"finish_reason":"' not in rest


def test_b68_a_stream_that_fails_in_its_first_step_is_answered_as_a_whole_answer_is(checkpoint_folder):
    with served(checkpoint_folder, requests_per_minute=100) as here:
        here.runner.hold()
        asked = [here.later(here.chat, "broken", stream=stream) for stream in (True, False)]
        here.until(lambda: len(here.jobs) == 2)
        here.runner.faults |= {1: RuntimeError("insides"), 2: RuntimeError("insides")}
        here.runner.go()
        for reply in (one.result() for one in asked):
            assert (reply.status, reply.error["code"], reply.error["type"]) == (500, "engine_error", "server_error")
            assert reply.headers["content-type"] == "application/json" and reply.headers["x-should-retry"] == "true"
            assert "prefill;dur=" in reply.headers["server-timing"] and b"insides" not in reply.body
            assert reply.headers["x-ratelimit-limit-requests"] == "100"


def test_b68_one_of_two_answers_fails_and_the_other_is_not_computed_on(here):
    here.runner.hold()
    asked = here.later(here.chat, n=2, max_tokens=50)
    running(here, 1)
    one_step(here)
    running(here, 2)
    here.runner.faults[2] = RuntimeError("broken")
    here.runner.pace_s = 0.02
    here.runner.go()
    assert asked.result().status == 500
    here.until(here.idle)
    assert here.bridge.wasted == {"engine_error": here.bridge.count("computed") - here.bridge.useful}


# ---- a whole step's fault


def test_b69_a_failed_step_costs_its_requests_and_the_queued_ones_run_on_a_new_engine(checkpoint_folder):
    with served(checkpoint_folder, max_running=2) as here:
        alone = text_of(here.chat("queued"))
        here.runner.hold()
        hit = []
        for stream in (False, True):  # the second one is in its first step when that fails
            hit.append(here.later(here.chat, f"hit {stream}", stream=stream, max_tokens=8))
            running(here, len(hit))
        queued = here.later(here.chat, "queued")
        here.until(lambda: len(here.bridge.engine.inbox) == 1)
        old = here.bridge.engine
        here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("CUDA error: insides")
        here.runner.go()
        for reply in (one.result() for one in hit):
            assert (reply.status, reply.error["code"]) == (500, "engine_error") and b"CUDA" not in reply.body
        assert text_of(queued.result()) == alone
        assert here.bridge.engine is not old and figure(here, "engine_restarts_total", reason="step_failed") == 1
        assert here.ask("/health/ready").status == 200 and here.ask("/health").json["engine_restarts"] == 1
        assert [line["outcome"] for line in settled(here)].count("engine_error") == 2


def test_b69_while_the_engine_is_replaced_the_service_is_not_ready(here):
    make, let = here.bridge.make, threading.Event()
    here.bridge.make = lambda: let.wait(10) and make()
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("broken")
    failed = here.later(here.chat)
    here.until(lambda: here.ask("/health/ready").status == 503)
    assert here.ask("/health/ready").json["reason"] == "the engine is being replaced"
    assert here.ask("/health/live").status == 200
    let.set()
    assert failed.result().status == 500
    here.until(lambda: here.ask("/health/ready").status == 200)


def test_b69_who_was_running_but_not_in_the_failed_step_goes_on_with_the_right_tokens(here):
    alone = text_of(here.chat("spared", max_tokens=12))
    here.runner.hold()
    hit, spared = here.later(here.chat, "hit!", max_tokens=12), here.later(here.chat, "spared", max_tokens=12)
    running(here, 2)
    one_step(here)
    scheduler = here.bridge.engine.scheduler
    plan, victim = scheduler.plan, number_of(here, "hit!")
    scheduler.plan = lambda now: [part for part in plan(now) if part.request.number == victim]
    one_step(here)  # after it, the step that is held has the victim only
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("broken")
    here.runner.go()
    assert hit.result().status == 500
    assert text_of(spared.result()) == alone and here.bridge.restarts == 1


def test_b69_an_error_in_the_engine_itself_costs_those_it_was_at_and_no_others(checkpoint_folder):
    with served(checkpoint_folder, max_running=1) as here:
        alone = text_of(here.chat("queued"))
        here.runner.hold()
        hit = here.later(here.chat, "hit", max_tokens=8)
        running(here, 1)
        queued = here.later(here.chat, "queued")
        here.until(lambda: here.bridge.engine.inbox)

        def broken(_now: float) -> None:
            raise KeyError("a bug")

        here.bridge.engine.scheduler.plan = broken
        here.runner.go()
        assert (hit.result().status, hit.result().error["code"]) == (500, "engine_error")
        assert text_of(queued.result()) == alone
        assert here.bridge.restarts == 1 and here.bridge.thread.is_alive()


def test_b72_too_little_memory_for_a_step_is_met_with_two_halves(here):
    alone = [text_of(here.chat(f"number {i}")) for i in range(3)]
    here.runner.hold()
    asked = [here.later(here.chat, f"number {i}") for i in range(3)]
    running(here, 3)
    here.runner.faults[f"step {here.runner.steps + 1}"] = MemoryError("out of memory")
    here.runner.go()
    assert [text_of(one.result()) for one in asked] == alone
    assert [1, 2] in [[len(one), len(two)] for one, two in zip(here.runner.seen, here.runner.seen[1:], strict=False)]
    assert here.bridge.restarts == 0


class FullDisk:
    def write(self, _text: str) -> None:
        raise OSError(28, "No space left on device")

    flush = write


def test_b72_a_log_that_cannot_be_written_costs_lines_and_no_answers(here):
    settled(here)
    here.house.books.log.stream, kept = FullDisk(), here.house.books.log.stream
    assert [here.chat().status for _ in range(3)] == [200] * 3
    assert here.ask("/nothing").status == 404
    here.until(lambda: figure(here, "log_lines_lost_total") == 4)
    here.house.books.log.stream = kept
    assert here.chat().status == 200 and len(settled(here)) == 2  # the probe's and this one's


# ---- a step that does not end


def test_b71_a_step_that_hangs_is_told_with_evidence_and_idling_is_no_hanging(checkpoint_folder):
    with served(checkpoint_folder, stall_after=0.2, queue_timeout=0.5, max_running=1) as here:
        time.sleep(0.3)
        assert here.ask("/health/live").json["status"] == "ok"
        here.runner.hold()
        begun = here.later(here.chat, headers={"X_Request_Deadline_Ms": "600"})
        running(here, 1)
        waiting = here.later(here.chat)
        here.until(lambda: here.ask("/health/live").status == 503)
        found = here.ask("/health/live").json
        assert found["status"] == "stalled" and found["running"] == 1
        assert found["last_step_age_s"] > found["threshold_s"] == 0.2
        assert here.ask("/health/ready").json["reason"] == "stalled" and here.ask("/health").status == 503
        for late in (begun, waiting):
            reply = late.result()
            assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
            assert reply.headers["x-should-retry"] == "false"
            assert reply.error["details"]["prompt_tokens"] > 0
        assert "never left the queue" in reply.error["message"]
        here.runner.go()
        here.until(lambda: here.ask("/health/live").status == 200)
        assert here.chat().status == 200 and here.outcomes()["timeout"] == 2


def test_who_only_watches_cannot_stop_the_work(here, caplog):
    watch = here.bridge.watch

    def broken(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    here.bridge.watch = broken
    assert here.chat().status == 200
    assert "could not be watched" in caplog.text
    here.bridge.watch = watch


def test_an_engine_that_fails_at_once_is_not_replaced_in_a_hot_loop(here):
    make = here.bridge.make

    def broken():
        engine = make()
        engine.scheduler.plan = lambda *_: 1 / 0
        return engine

    here.bridge.make = broken
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("the first failure")
    before = here.bridge.restarts
    assert here.chat().status == 500
    time.sleep(0.5)
    assert 3 < here.bridge.restarts - before < 10
    here.bridge.make = make


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_b71_an_engine_thread_that_has_died_is_seen_at_once(here):
    bridge, step = here.bridge, here.bridge.step

    def broken(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    bridge.step = broken
    late = here.later(here.chat, headers={"X_Request_Deadline_Ms": "500"})
    here.until(lambda: not bridge.thread.is_alive())
    found = here.ask("/health/live")
    assert (found.status, found.json["reason"]) == (503, "the engine's thread has ended")
    assert late.result().status == 504
    bridge.step, bridge.thread = step, threading.Thread(target=bridge.drive, daemon=True)
    bridge.thread.start()
    here.until(lambda: here.ask("/health/live").status == 200)


# ---- the end


def end(here: Served) -> None:
    here.server.loop.call_soon_threadsafe(here.server.handle_exit, signal.SIGTERM, None)


def test_b73_who_was_let_in_is_served_to_the_end_even_from_the_queue(checkpoint_folder):
    with served(checkpoint_folder, max_running=1) as here:
        here.runner.hold()
        inside = [here.later(here.chat, max_tokens=6) for _ in range(3)]
        here.until(lambda: here.admission.answers == 3)
        end(here)
        here.until(lambda: here.ask("/health/ready").status == 503)
        refused = here.chat()
        assert (refused.status, refused.error["code"]) == (503, "server_shutting_down")
        assert refused.headers["retry-after-ms"] and here.ask("/health").json["status"] == "draining"
        here.runner.go()
        assert [one.result().status for one in inside] == [200] * 3
        here.until(lambda: here.bridge.ending)


@pytest.mark.parametrize("signals", [1, 2])
def test_b73_who_is_not_done_in_time_is_told(checkpoint_folder, signals: int):
    with served(checkpoint_folder, drain_timeout=0.3 if signals == 1 else 30, max_running=2) as here:
        here.runner.hold()
        connection = here.send_chat(stream=True, max_tokens=50)
        running(here, 1)
        one_step(here)
        read_until(connection, b'"content":"')
        unheard = [here.later(here.chat, "runs", max_tokens=50)]
        running(here, 2)
        unheard += [here.later(here.chat, "waits", stream=stream) for stream in (False, True)]
        here.until(lambda: len(here.jobs) == 4)
        begin = time.monotonic()
        for _ in range(signals):
            end(here)
        told = read_all(connection)
        connection.close()
        assert time.monotonic() - begin < 3
        assert b'"code":"server_shutting_down"' in told and b"[DONE]" not in told
        for one in unheard:
            reply = one.result()
            assert (reply.status, reply.error["code"]) == (503, "server_shutting_down")
            assert reply.headers["x-should-retry"] == "true" and reply.headers["retry-after"] == "2"
        here.runner.go()
        here.until(lambda: here.bridge.ending)
        assert here.outcomes()["shed_drain"] == 4 and here.bridge.wasted.keys() <= {"drain"}
