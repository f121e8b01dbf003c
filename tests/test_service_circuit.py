"""Fault matrix B6, case 74: the circuit before the engine, as clients meet it. tests/test_breaker.py has its rules."""

import threading
import time

import pytest
from service_kit import Served, served
from step_kit import break_engine, figure, settled

from service.breaker import State

pytestmark = pytest.mark.slow


def later_by(here: Served, seconds: float) -> None:
    """For the breakers it is so much later."""
    for breaker in here.house.serving.relief.breakers:
        breaker.clock = lambda: time.perf_counter() + seconds


def test_b74_an_open_circuit_is_told_with_the_time_to_the_next_probe(checkpoint_folder):
    with served(checkpoint_folder) as here:
        break_engine(here)
        computed = here.bridge.count("computed")
        refused = here.chat(stream=True)
        assert (refused.status, refused.error["code"]) == (503, "circuit_open")
        assert 5000 < int(refused.headers["retry-after-ms"]) <= 15000 and 6 <= int(refused.headers["retry-after"]) <= 16
        assert refused.headers["x-should-retry"] == "true" and refused.error["details"]["limit_hit"] == "circuit"
        ready = here.ask("/health/ready")
        assert (ready.status, ready.json["reason"]) == (503, "the circuit is open")
        health = here.ask("/health")
        assert (health.status, health.json["status"]) == (200, "degraded") and here.ask("/health/live").status == 200
        assert health.json["breakers"]["engine"]["state"] == "open"
        states = {state: figure(here, "breaker_state", name="engine", state=state) for state in State}
        assert states == dict.fromkeys(State, 0.0) | {State.OPEN: 1.0}
        assert here.bridge.count("computed") == computed
        assert [line["state"] for line in here.lines("breaker")] == ["open"]
        assert "shed_circuit" in [line["outcome"] for line in settled(here)]
        later_by(here, 20)
        assert here.ask("/health/ready").status == 200, "else no balancer would ever send the probes"
        assert [here.chat().status for _ in range(3)] == [200] * 3
        assert here.ask("/health").json["status"] == "ok"
        assert figure(here, "breaker_transitions_total", name="engine", to="closed") == 1


def test_b74_of_many_that_come_at_half_open_exactly_two_are_let_in(checkpoint_folder):
    with served(checkpoint_folder, max_queued=16) as here:
        break_engine(here)
        later_by(here, 20)
        here.runner.hold()
        pages, over = [], threading.Event()

        def scrape() -> None:
            while not over.is_set():
                begin = time.perf_counter()
                assert here.ask("/metrics").status == 200
                pages.append(time.perf_counter() - begin)

        scraping, asked = here.later(scrape), [here.later(here.chat, f"number {i}") for i in range(12)]
        here.until(lambda: sum(one.done for one in asked) == 10, "for ten refusals")
        assert here.house.serving.relief.engine.state is State.HALF_OPEN and len(here.jobs) == 2
        here.runner.go()
        replies = [one.result() for one in asked]
        assert sorted(one.status for one in replies) == [200] * 2 + [503] * 10
        assert {one.error["code"] for one in replies if one.status == 503} == {"circuit_open"}
        assert here.house.serving.relief.engine.state is State.CLOSED
        over.set()
        scraping.result()
        assert sorted(pages)[len(pages) // 2] < 0.2


def test_b74_probes_that_leave_give_their_places_to_others(checkpoint_folder):
    with served(checkpoint_folder) as here:
        break_engine(here)
        later_by(here, 20)
        here.runner.hold()
        leaving = [here.send_chat(stream=True) for _ in range(2)]
        here.until(lambda: len(here.jobs) == 2)
        assert here.chat().error["code"] == "circuit_open"
        for connection in leaving:
            connection.close()
        here.until(lambda: not here.house.serving.jobs)
        here.runner.go()
        assert [here.chat().status for _ in range(2)] == [200, 200]
        assert here.house.serving.relief.engine.state is State.CLOSED


def test_b74_a_wrong_wall_clock_holds_no_circuit_open(checkpoint_folder, monkeypatch):
    with served(checkpoint_folder) as here:
        break_engine(here)
        wall = time.time
        for jump_s in (3600, -3600):
            monkeypatch.setattr(time, "time", lambda jump_s=jump_s: wall() + jump_s)
            assert here.chat().error["code"] == "circuit_open"
            assert here.ask("/metrics").status == 200
        later_by(here, 20)
        assert [here.chat().status for _ in range(2)] == [200, 200]


def test_b74_nothing_but_the_engines_own_faults_opens_its_circuit(checkpoint_folder):
    with served(checkpoint_folder, max_queued=1, max_running=1, requests_per_minute=200) as here:
        here.house.watch.pace = lambda _times, _took_s: None  # steps of microseconds are slow by chance
        for _ in range(25):
            assert here.chat(max_tokens=-1).status == 400
            assert here.chat(max_tokens=40, headers={"X_Request_Deadline_Ms": "1"}).status in (200, 503, 504)
            received = here.received
            here.send_chat(stream=True, max_tokens=200).close()
            here.until(lambda received=received: sum(here.outcomes().values()) == here.received > received)
        here.runner.hold()
        inside = [here.later(here.chat) for _ in range(2)]
        here.until(lambda: len(here.jobs) == 2)
        assert {here.chat().error["code"] for _ in range(25)} == {"server_overloaded"}
        here.runner.go()
        assert [one.result().status for one in inside] == [200, 200]
        breaker = here.house.serving.relief.engine
        assert breaker.state is State.CLOSED and breaker.failure_share == 0


def test_b74_a_hang_that_outlasts_its_requests_is_the_engines_fault(checkpoint_folder):
    with served(checkpoint_folder, request_timeout=0.5, stall_after=0.1) as here:
        here.runner.hold()
        late = [here.later(here.chat, f"number {i}", max_tokens=30) for i in range(3)]
        assert {one.result().status for one in late} == {504}
        here.runner.go()
        here.until(here.idle)
        assert list(here.house.serving.relief.engine.good).count(False) == 3
