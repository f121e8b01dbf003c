"""B70: an input that ends the engine twice is refused for a while, and nobody else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    clock.now_s += 60.04
    for _ in range(2):
        with pytest.raises(ApiError) as why:
            books.check(A)
    error = why.value
    assert (error.status, error.code, error.retry, error.outcome) == (400, "request_quarantined", False, "client_error")
    assert error.message == (
        "The engine failed each time it computed this input, which is therefore not taken for another 9.0 minutes: "
        "change the prompt, or ask the operator."
    )
    assert error.details == {"quarantined_for_s": 540.0, "fingerprint": "616161616161"}
    clock.now_s += 0.11
    with pytest.raises(ApiError) as why:
        books.check(A)
    assert why.value.details["quarantined_for_s"] == 539.9
    assert books.refused == 3 and not refused(books, B)


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


def test_where_the_engine_fails_around_all_that_run_it_takes_three_times_and_hits_all(books):
    """A suspect was not computed apart then: it may as well have been anybody else."""
    books.blame([{A}])
    books.went_well()
    assert books.blame([{A, B}], apart=False) == [] and books.suspected(B)
    assert books.blame([{A, B}], apart=False) == [A]
    assert books.blame([{A, B}], apart=False) == [B]
    assert books.blame([{C}], apart=False) == [] and books.suspected(C)


def test_who_is_alone_when_the_engine_fails_around_him_has_no_such_excuse(books):
    assert books.blame([{A}], apart=False) == []
    assert books.blame([{A}], apart=False) == [A]


def test_where_everybody_fails_in_turn_the_engine_is_to_blame_and_nobody_is_refused(books):
    for one in (A, B, A, B, C, A):
        assert books.blame([{one}]) == []
    books.went_well()
    assert books.blame([{A}]) == [A], "now it works for others, and fails for this one"


def test_passes_of_one_step_that_fail_apart_excuse_each_other(books):
    books.blame([{A, B}])
    assert books.blame([{A}, {B}]) == []


def test_several_answers_to_one_prompt_fail_once_in_a_step(books):
    assert books.blame([{A}, {B}, {A}]) == [] and books.suspects[A].strikes == 1
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
    assert books.blame([{A, B}]) == [A] and refused(books, A), "one failure is enough now"
    clock.now_s += 1199.9
    assert books.suspected(A) and books.suspects[A].strikes == 1
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
