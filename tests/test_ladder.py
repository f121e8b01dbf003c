"""The degradation ladder by itself: who accepts what, when the cap comes and goes, what is left below."""

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.errors import ApiError
from service.ladder import ALL, EASY, HOLD_S, TIGHT, Ladder, Rung, allowed


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ---- what a client accepts


@pytest.mark.parametrize(
    "said, accepted",
    [
        (None, {Rung.MAX_TOKENS, Rung.MODEL, Rung.CACHED}),
        ("none", set()),
        (" None ", set()),
        ("model", {Rung.MODEL}),
        ("max_tokens, CACHED", {Rung.MAX_TOKENS, Rung.CACHED}),
        ("model,cached,max_tokens", set(Rung)),
    ],
)
def test_a_client_says_which_rungs_it_accepts(said, accepted):
    assert allowed(said) == accepted


@pytest.mark.parametrize("said", ["", "none,model", "everything", "model;cached"])
def test_a_word_that_is_no_rung_is_refused_with_those_that_are(said):
    with pytest.raises(ApiError) as caught:
        allowed(said)
    message = "x-allow-degraded takes none, or some of max_tokens, model, cached with commas between them."
    assert (caught.value.status, caught.value.message) == (400, message)


# ---- the cap


def test_the_cap_comes_at_half_and_goes_after_five_seconds_below_a_quarter(clock):
    ladder = Ladder(ALL, 64, clock)
    ladder.feel(0.49)
    assert ladder.most_tokens(500, ALL) == 500 and not ladder.engaged(Rung.MAX_TOKENS)
    ladder.feel(0.5)
    assert ladder.most_tokens(500, ALL) == 64 and ladder.engaged(Rung.MAX_TOKENS)
    assert ladder.most_tokens(63, ALL) == 63
    clock.now_s += 100
    ladder.feel(0.3)
    assert ladder.most_tokens(500, ALL) == 64  # not tight any more, and not easy yet
    ladder.feel(0.24)
    clock.now_s += 4.9
    ladder.feel(0.0)
    assert ladder.most_tokens(500, ALL) == 64
    clock.now_s += 0.1
    ladder.feel(0.0)
    assert ladder.most_tokens(500, ALL) == 500 and not ladder.engaged(Rung.MAX_TOKENS)


def test_the_five_seconds_begin_anew_when_it_fills_up_in_between(clock):
    ladder = Ladder(ALL, 64, clock)
    ladder.feel(1.0)
    ladder.feel(0.1)
    clock.now_s += 4
    ladder.feel(0.25)
    clock.now_s += 4
    ladder.feel(0.1)
    clock.now_s += 4
    ladder.feel(0.1)
    assert ladder.tight


def test_who_does_not_accept_the_cap_is_not_capped(clock):
    ladder = Ladder(ALL, 64, clock)
    ladder.feel(1.0)
    assert ladder.most_tokens(500, {Rung.MODEL, Rung.CACHED}) == 500


def test_a_rung_that_is_not_configured_is_never_taken(clock):
    ladder = Ladder([], 64, clock)
    ladder.feel(1.0)
    assert ladder.most_tokens(500, ALL) == 500 and not ladder.engaged(Rung.MAX_TOKENS)
    assert ladder.below() == []


# ---- below it


def test_another_model_comes_before_a_kept_answer(clock):
    ladder = Ladder([Rung.CACHED, Rung.MAX_TOKENS, Rung.MODEL], 64, clock)
    assert ladder.below() == [Rung.MODEL, Rung.CACHED]
    assert ladder.below({Rung.CACHED, Rung.MAX_TOKENS}) == [Rung.CACHED]
    assert ladder.below(frozenset()) == []
    assert Ladder([Rung.MODEL], 0, clock).below() == [Rung.MODEL]


def test_a_rung_is_in_use_for_five_seconds_after_a_request_got_it(clock):
    ladder = Ladder(ALL, 64, clock)
    assert not ladder.engaged(Rung.MODEL)
    ladder.used(Rung.MODEL)
    ladder.used(Rung.MODEL)
    clock.now_s += 4.9
    assert ladder.engaged(Rung.MODEL) and not ladder.engaged(Rung.CACHED)
    clock.now_s += 0.1
    assert not ladder.engaged(Rung.MODEL) and ladder.counts == {Rung.MODEL: 2}
    ladder.used(Rung.MAX_TOKENS)
    assert not ladder.engaged(Rung.MAX_TOKENS)  # that one is in use while the house is tight


# ---- against a plain model


class LadderMachine(RuleBasedStateMachine):
    """The model keeps every pressure that was ever felt, and reads the cap from all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.felt, self.changes = Clock(), [], [(0.0, False)]
        self.ladder = Ladder(ALL, 64, self.clock)

    @rule(pressure=strategies.sampled_from([0.0, 0.2, 0.25, 0.4, 0.5, 2.0]))
    def feel(self, pressure):
        self.felt.append((self.clock.now_s, pressure))
        self.ladder.feel(pressure)
        if self.ladder.tight != self.changes[-1][1]:
            self.changes.append((self.clock.now_s, self.ladder.tight))

    @rule(seconds=strategies.sampled_from([0.5, 2.0, 5.0, 60.0]))
    def wait(self, seconds):
        self.clock.now_s += seconds

    def tight(self) -> bool:
        """Since the last tight moment, has it been easy for five seconds in one piece?"""
        last = max((i for i, (_, pressure) in enumerate(self.felt) if pressure >= TIGHT), default=None)
        if last is None:
            return False
        pieces: list[list[float]] = [[]]
        for moment, pressure in self.felt[last + 1 :]:
            pieces[-1].append(moment) if pressure < EASY else pieces.append([])
        return not any(piece and piece[-1] - piece[0] >= HOLD_S for piece in pieces)

    @invariant()
    def they_agree(self):
        assert self.ladder.tight == self.tight()
        assert self.ladder.most_tokens(100, ALL) == (64 if self.tight() else 100)

    @invariant()
    def it_does_not_flap(self):
        """Between the cap's coming and its going there are five seconds at least."""
        for (begin, tight), (end, _) in zip(self.changes[1:], self.changes[2:], strict=False):
            assert not tight or end - begin >= HOLD_S


TestLadderAgainstThePlainModel = LadderMachine.TestCase
TestLadderAgainstThePlainModel.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
