"""B70 over real sockets: no crash loop, whoever sends what; and an engine that cannot be had at once."""

import threading

import pytest
from service_kit import served
from step_kit import figure, number_of, running, settled, text_of

pytestmark = pytest.mark.slow


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


POISON = "poison"


@pytest.fixture
def here(checkpoint_folder):
    """An engine whose forward pass fails whenever the poison is in it."""
    with served(checkpoint_folder) as found:
        run = found.runner.run
        poison = found.house.serving.prompts.core.encode(f"[user] {POISON}[assistant] ").ids

        def poisoned(slices):
            if any(part.request.prompt == poison for part in slices):
                found.runner.steps += 1
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return run(slices)

        found.runner.run = poisoned
        found.clock = Clock()
        found.bridge.quarantine.clock = found.clock
        yield found


def test_b70_an_input_that_kills_the_engine_twice_is_refused_and_others_are_served(here):
    assert [here.chat(POISON).status for _ in range(2)] == [500, 500]
    here.until(lambda: here.bridge.restarts == 2)  # they are told before there is a new engine
    third = here.chat(POISON)
    assert (third.status, third.error["code"]) == (400, "request_quarantined")
    assert third.headers["x-should-retry"] == "false" and POISON.encode() not in third.body
    again = here.chat(POISON, stream=True, seed=3, max_tokens=9)
    assert again.status == 400, "before the first byte, and whatever else is asked for"
    assert here.bridge.restarts == 2, "no crash loop"
    assert here.chat("an innocent one").status == 200 and here.chat(POISON, temperature=0.5).status == 500
    assert figure(here, "quarantine_refusals_total") == 2
    assert figure(here, "quarantine_inputs", state="quarantined") == 1
    assert here.ask("/health").json["quarantined"] == 1
    lines = settled(here)
    told = [line["fingerprint"] for line in lines if line.get("error_code") in ("engine_error", "request_quarantined")]
    assert len(told) == 5 and len(set(told[:4])) == 1 and third.error["details"]["fingerprint"] == told[0]
    here.clock.now_s += 600
    told = [here.chat(text).status for text in ("an innocent one", POISON, POISON)]
    assert told == [200, 500, 400], "let in, and out again at once"
    here.clock.now_s += 1200


def test_b70_neighbours_of_the_poison_lose_one_step_and_never_their_good_name(here):
    alone = {f"neighbour {i}": text_of(here.chat(f"neighbour {i}", max_tokens=8)) for i in range(3)}
    for second in (False, True):
        here.runner.hold()
        with_it = [here.later(here.chat, text, max_tokens=8) for text in alone]
        here.until(lambda: here.bridge.engine.scheduler.running)  # a step of theirs waits: with the poison none would
        with_it.append(here.later(here.chat, POISON, max_tokens=8))
        here.until(lambda: len(here.jobs) == 4)
        here.until(lambda: here.bridge.engine.inbox or len(here.bridge.engine.answers) > 1)
        here.runner.go()
        *neighbours, poison = [one.result() for one in with_it]
        assert poison.status == 500
        if second:
            assert {text: text_of(reply) for text, reply in zip(alone, neighbours, strict=True)} == alone
    assert here.chat(POISON).status == 400
    assert {text: text_of(here.chat(text, max_tokens=8)) for text in alone} == alone
    here.clock.now_s += 1200


def test_a_suspect_has_a_pass_of_its_own_and_the_same_text(here):
    alone = text_of(here.chat("suspect", max_tokens=8))
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("the machine's fault, not its own")
    assert here.chat("suspect", max_tokens=8).status == 500
    here.runner.hold()
    both = [here.later(here.chat, text, max_tokens=8) for text in ("other", "suspect")]
    running(here, 2)
    suspect, begin = number_of(here, "suspect"), len(here.runner.seen)
    here.runner.go()
    assert text_of(both[1].result()) == alone and both[0].result().status == 200
    assert all(step == [suspect] or suspect not in step for step in here.runner.seen[begin:])


def test_without_a_quarantine_nobody_is_suspected(checkpoint_folder):
    with served(checkpoint_folder, quarantine_minutes=0) as here:
        for _ in range(3):
            here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("broken")
            assert here.chat("the same").status == 500
        assert here.chat("the same").status == 200 and here.bridge.quarantine.suspects == {}


# ---- an engine that cannot be had


def test_b69_an_engine_that_cannot_be_replaced_is_tried_again_and_told(here, caplog):
    """The exception used to end the engine's thread, and with it the service."""
    make, let = here.bridge.make, threading.Event()

    def broken():
        if not let.is_set():
            raise MemoryError("no room for another one")
        return make()

    here.bridge.make = broken
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("broken")
    failed = here.later(here.chat)
    here.until(lambda: here.bridge.no_engine)
    live, ready = here.ask("/health/live"), here.ask("/health/ready")
    assert (live.status, ready.status) == (200, 503), "alive as long as a step may take"
    assert "could not be replaced yet (MemoryError)" in live.json["reason"]
    assert failed.result().status == 500
    waiting = here.later(here.chat, "waiting")
    here.until(lambda: here.jobs)
    let.set()
    assert waiting.result().status == 200
    assert "reason" not in here.ask("/health/live").json and here.ask("/health/ready").status == 200
    assert "no new engine could be made" in caplog.text
    here.bridge.make = make


def test_numbers_of_requests_go_on_in_a_new_engine(here):
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("broken")
    here.chat()
    here.chat("after")
    seen = [number for step in here.runner.seen for number in step]
    assert seen == sorted(seen) and len(set(seen)) == 3, "the probe's, the failed one's, this one's"
