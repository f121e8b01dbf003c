"""B70: an input that ends the engine twice is refused for a while, and nobody else is."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from service_kit import served
from step_kit import figure, number_of, running, settled, text_of

from engine.request import Sampling
from service.errors import ApiError
from service.quarantine import Quarantine, fingerprint, shown

A, B, C = (letter * 32 for letter in (b"a", b"b", b"c"))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def books(clock):
    return Quarantine(10, clock)


def refused(books: Quarantine, print: bytes) -> bool:
    try:
        books.check(print)
    except ApiError:
        return True
    return False


# ---- who is blamed


def test_twice_alone_and_it_is_refused_with_the_time_that_is_left(books, clock):
    assert books.blame([{A}]) == [] and books.suspected(A) and not refused(books, A)
    clock.now_s += 100
    assert books.blame([{A}]) == [A]
    clock.now_s += 60
    with pytest.raises(ApiError) as why:
        books.check(A)
    error = why.value
    assert (error.status, error.code, error.retry, error.outcome) == (400, "request_quarantined", False, "client_error")
    assert error.message == (
        "The engine failed each time it computed this input, which is therefore not taken for another 9.0 minutes: "
        "change the prompt, or ask the operator."
    )
    assert error.details == {"quarantined_for_s": 540.0, "fingerprint": "616161616161"}
    assert books.refused == 1 and not refused(books, B)


def test_of_neighbours_in_a_failed_step_only_the_one_that_fails_again_is_refused(books):
    books.blame([{A, B, C}])
    assert [books.suspected(one) for one in (A, B, C)] == [True] * 3
    books.went_well()
    assert books.blame([{B}]) == [B]
    assert [refused(books, one) for one in (A, B, C)] == [False, True, False]


def test_who_shares_a_step_with_a_suspect_is_not_suspected_for_it(books):
    books.blame([{A}])
    books.went_well()
    books.blame([{A, B}])
    assert refused(books, A) and not books.suspected(B)


def test_two_suspects_that_always_fail_together_are_refused_at_the_third_time(books):
    """They are computed apart, unless it is not in computing that they fail; no crash loop comes before all else."""
    assert books.blame([{A, B}]) == books.blame([{A, B}]) == []
    assert books.blame([{A, B}]) == [A, B]


def test_where_everybody_fails_in_turn_the_engine_is_to_blame_and_nobody_is_refused(books):
    for one in (A, B, A, B, C, A):
        assert books.blame([{one}]) == []
    books.went_well()
    assert books.blame([{A}]) == [A], "now it works for others, and fails for this one"


def test_passes_of_one_step_that_fail_apart_excuse_each_other(books):
    books.blame([{A, B}])
    assert books.blame([{A}, {B}]) == []


def test_several_answers_to_one_prompt_fail_once_in_a_step(books):
    assert books.blame([{A}, {A}]) == []
    books.went_well()
    assert books.blame([{A}, {A}]) == [A]


def test_after_its_time_it_is_let_in_on_probation_and_at_last_forgotten(books, clock):
    books.blame([{A}])
    books.blame([{A}])
    clock.now_s += 599.9
    assert refused(books, A)
    clock.now_s += 0.1
    assert not refused(books, A) and books.suspected(A), "alone in its passes"
    books.went_well()
    assert books.blame([{A}]) == [A] and refused(books, A), "one failure is enough now"
    clock.now_s += 1199.9
    assert books.suspected(A)
    clock.now_s += 0.1
    assert not books.suspected(A) and books.suspects == {}
    assert books.blame([{A}]) == []


def test_a_suspect_that_does_not_fail_again_is_forgotten(books, clock):
    books.blame([{A}])
    clock.now_s += 599.9
    assert books.suspected(A)
    clock.now_s += 0.1
    assert not books.suspected(A)
    books.went_well()
    assert books.blame([{A}]) == []


def test_only_so_many_are_remembered_and_the_last_blamed_longest(clock):
    books = Quarantine(10, clock, most=3)
    for i in range(5):
        books.went_well()
        books.blame([{bytes([i]) * 32}])
        books.went_well()
        books.blame([{bytes([0]) * 32}])
    assert sorted(print[0] for print in books.suspects) == [0, 3, 4]
    assert Quarantine(10, clock).most == 1000


def test_counts_tell_refused_from_suspected(books, clock):
    assert books.counts() == {"quarantined": 0, "suspected": 0}
    books.blame([{A, B, C}])
    books.blame([{A}])
    assert books.counts() == {"quarantined": 1, "suspected": 2}
    clock.now_s += 600
    assert books.counts() == {"quarantined": 0, "suspected": 1}, "on probation; the others are forgotten"
    clock.now_s += 600
    assert books.counts() == {"quarantined": 0, "suspected": 0}


def test_zero_minutes_are_off(clock):
    assert not Quarantine(0, clock).on and Quarantine(0.1, clock).on
    assert Quarantine(0.1, clock).for_s == 6


@given(st.lists(st.tuples(st.sets(st.integers(1, 20), max_size=4), st.booleans()), max_size=60), st.integers(1, 20))
def test_whoever_is_in_failed_steps_one_poison_alone_is_refused(steps, poison):
    """Random neighbours, every failed step has the poison in it; suspects are computed apart, as the engine does."""
    clock = Clock()
    books, name = Quarantine(10, clock), lambda i: bytes([i]) * 32
    failures = 0
    for others, is_there in steps:
        clock.now_s += 1
        inside = {name(i) for i in others - {poison}} | ({name(poison)} if is_there else set())
        inside = {one for one in inside if not refused(books, one)}
        together = {one for one in inside if not books.suspected(one)}
        passes = [together, *({one} for one in inside - together)]
        failed = [one for one in passes if name(poison) in one]
        if not failed:
            books.went_well()
            continue
        if len(failed[0]) < len(inside):
            books.went_well()
        failures += 1
        books.blame(failed)
    assert failures <= 2 and not any(refused(books, name(i)) for i in range(1, 21) if i != poison)
    assert refused(books, name(poison)) == (failures == 2)


# ---- what is the same input


def test_a_fingerprint_is_of_tokens_and_of_how_the_next_one_is_chosen():
    plain = fingerprint([1, 2, 3], Sampling())
    same = Sampling(max_new_tokens=7, seed=5, stop=("x",), stop_ids=frozenset({1}), ignore_eos=True)
    assert fingerprint([1, 2, 3], same) == plain and len(plain) == 32 and shown(plain) == plain.hex()[:12]
    wishes = (
        {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.0}, {"presence_penalty": 1.0}, {"logit_bias": {5: 1.0}}, {"logprobs": 0},
    )  # fmt: skip
    others = {fingerprint([1, 2, 3], Sampling(**wish)) for wish in wishes}
    others |= {fingerprint(prompt, Sampling()) for prompt in ([1, 2], [1, 2, 3, 0], [3, 2, 1])}
    assert len(others) == len(wishes) + 3 and plain not in others
    biases = [fingerprint([1], Sampling(logit_bias=bias)) for bias in ({1: 2.0, 3: 4.0}, {3: 4.0, 1: 2.0})]
    assert biases[0] == biases[1], "in whatever order they were given"


# ---- the service


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


@pytest.mark.slow
def test_b70_an_input_that_kills_the_engine_twice_is_refused_and_others_are_served(here):
    assert [here.chat(POISON).status for _ in range(2)] == [500, 500] and here.bridge.restarts == 2
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


@pytest.mark.slow
def test_b70_neighbours_of_the_poison_lose_one_step_and_never_their_good_name(here):
    alone = {f"neighbour {i}": text_of(here.chat(f"neighbour {i}", max_tokens=8)) for i in range(3)}
    for second in (False, True):
        here.runner.hold()
        with_it = [here.later(here.chat, text, max_tokens=8) for text in (*alone, POISON)]
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_without_a_quarantine_nobody_is_suspected(checkpoint_folder):
    with served(checkpoint_folder, quarantine_minutes=0) as here:
        for _ in range(3):
            here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("broken")
            assert here.chat("the same").status == 500
        assert here.chat("the same").status == 200 and here.bridge.quarantine.suspects == {}


# ---- an engine that cannot be had


@pytest.mark.slow
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


@pytest.mark.slow
def test_numbers_of_requests_go_on_in_a_new_engine(here):
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("broken")
    here.chat()
    here.chat("after")
    seen = [number for step in here.runner.seen for number in step]
    assert seen == sorted(seen) and len(set(seen)) == 3, "the probe's, the failed one's, this one's"
