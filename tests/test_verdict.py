"""Is the verdict calibrated? False alarms at most 5 %, and a real difference found at the sample size it promised."""

import math
import random

import pytest

from lab.verdict import interleaved, rounds_needed, steady_rounds, verdict


def noisy_rounds(rng: random.Random, n: int, ratio: float, spread: float) -> tuple[list[float], list[float]]:
    """n rounds of A and B: a drift common to both (up to 2x between rounds), and noise of each one's own."""
    drift = [math.exp(rng.uniform(-0.35, 0.35)) for _ in range(n)]
    own = spread / math.sqrt(2)
    return (
        [ratio * d * math.exp(rng.gauss(0, own)) for d in drift],
        [d * math.exp(rng.gauss(0, own)) for d in drift],
    )


@pytest.mark.slow
@pytest.mark.parametrize("n", [6, 12])
def test_equal_variants_are_called_different_at_most_once_in_twenty(n):
    rng = random.Random(n)
    trials = 2000
    wrong = sum(verdict(*noisy_rounds(rng, n, 1.0, 0.04)).word in ("FASTER", "SLOWER") for _ in range(trials))
    assert wrong / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


@pytest.mark.parametrize("spread", [0.03, 0.08, 0.15])
def test_a_real_difference_of_ten_percent_is_found_at_the_promised_number_of_rounds(spread):
    n = rounds_needed(spread, 0.10, power=0.9)
    rng, trials = random.Random(7), 1000
    found = sum(verdict(*noisy_rounds(rng, n, 1.10, spread)).word == "SLOWER" for _ in range(trials))
    assert found / trials >= 0.9 - 3 * math.sqrt(0.9 * 0.1 / trials)


def test_the_promise_is_not_wasteful():
    """A third fewer rounds must not keep the same promise, or rounds_needed() asks for too many."""
    n = rounds_needed(0.15, 0.10, power=0.9)
    rng, trials = random.Random(8), 1000
    found = sum(verdict(*noisy_rounds(rng, n * 2 // 3, 1.10, 0.15)).word == "SLOWER" for _ in range(trials))
    assert found / trials < 0.9


def test_words_follow_the_interval():
    base = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98]
    assert verdict([0.5 * x for x in base], [1.0] * 6).word == "FASTER"
    assert verdict([1.5 * x for x in base], [1.0] * 6).word == "SLOWER"
    assert verdict(base, [1.0] * 6).word == "WITHIN NOISE"
    wide = verdict([1.0, 1.5, 0.7, 1.3, 0.6, 1.2], [1.0] * 6)
    assert wide.word == "NO VERDICT" and "more rounds" in wide.reason and wide.not_slower is None


def test_keeping_up_is_a_narrower_question_than_being_faster_slower_or_equal():
    """An interval from 0.93 to 1.01 does not say whether A is faster, but it does say that A is not 5 % slower."""
    times = [0.91, 1.02, 0.95, 1.0, 0.92, 1.01]
    said = verdict(times, [1.0] * 6)
    assert said.word == "NO VERDICT" and said.high < 1.05 and said.not_slower
    assert verdict([1.2 + t / 100 for t in times], [1.0] * 6).not_slower is False
    assert verdict(times[:5], [1.0] * 5).not_slower is None  # too few rounds


def test_a_point_is_never_compared_with_a_point():
    """Half the time, from one round or two, is no verdict: that is how false conclusions got into notes."""
    for n in (1, 2):
        said = verdict([0.5] * n, [1.0] * n)
        assert said.word == "NO VERDICT" and not said.not_slower


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 4, 5])
def test_three_to_five_rounds_claim_only_what_holds_at_99_in_a_hundred(n):
    rng, trials = random.Random(n), 4000
    wrong = sum(verdict(*noisy_rounds(rng, n, 1.0, 0.04)).word in ("FASTER", "SLOWER") for _ in range(trials))
    assert wrong / trials <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / trials)
    assert verdict([0.50, 0.51, 0.49], [1.0] * 3).word == "FASTER"  # twice as fast, and steadily so
    few = verdict([0.95, 0.96, 0.94], [1.0] * 3)
    assert few.word == "NO VERDICT" and few.reason == "3 more rounds are needed" and few.high < 1
    assert verdict([1.0, 1.001, 0.999], [1.0] * 3).word == "NO VERDICT"  # equal for all one sees, but three rounds


def test_two_changes_at_once_give_no_verdict():
    said = verdict([0.5] * 8, [1.0] * 8, factors=("batch size", "prompt"))
    assert (said.word, said.reason) == ("NO VERDICT", "more than one factor differs: batch size, prompt")


def test_rounds_on_a_disturbed_machine_are_dropped_and_counted():
    anchors = [1.0, 1.02, 0.99, 1.6, 1.01, 1.0, 0.98, 1.03]
    assert steady_rounds(anchors) == [0, 1, 2, 4, 5, 6, 7]
    slow, fast = [0.5, 0.51, 0.5, 9.0, 0.5, 0.49, 0.5, 0.5], [1.0] * 8
    said = verdict(slow, fast, anchors=anchors)
    assert (said.word, said.rounds, said.dropped) == ("FASTER", 7, 1)
    few = verdict(slow[:4], fast[:4], anchors=anchors[:4])
    assert (few.rounds, few.dropped) == (4, 0)  # of four, none can be called the odd one


def test_variants_take_turns_in_turning_order():
    calls: list[str] = []
    variants = [lambda: calls.append("A") or 1.0, lambda: calls.append("B") or 2.0]
    assert list(interleaved(variants, 3)) == [[1.0, 2.0]] * 3
    assert "".join(calls) == "ABBAAB"


def test_unpaired_samples_are_refused():
    with pytest.raises(ValueError, match="equal numbers of rounds"):
        verdict([1.0], [1.0, 2.0])
