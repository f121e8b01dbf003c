"""The next token of each request: against probabilities worked out by hand, whoever shares the batch."""

import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from engine.request import BadLogits, Refusal, Request, Sampling, Timeline
from engine.sampler import Sampler, adjusted, draw

pytestmark = pytest.mark.slow

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def request(number: int = 0, prompt=(0,), answer=(), **wish) -> Request:
    made = Request(number, list(prompt), Sampling(**wish), Timeline(0.0))
    made.tokens += answer
    return made


def drawn(wish: Sampling, count: int = 4000) -> Counter:
    """Tokens at evenly spread uniform numbers: the frequencies are the probabilities, to 1 / count."""
    return Counter(draw(LOGITS, wish, (i + 0.5) / count) for i in range(count))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature):
    expected = (LOGITS.double() / temperature).softmax(-1) * 4000
    found = drawn(Sampling(temperature=temperature))
    assert all(abs(found[token] - count) <= 1 for token, count in enumerate(expected.tolist()))


def test_a_chi_square_test_on_seeded_requests():
    sampler, counts = Sampler(), Counter()
    for seed in range(3000):
        counts[sampler.choose(LOGITS[None], [request(temperature=1.0, seed=seed)])[0].token] += 1
    expected = LOGITS.double().softmax(-1) * 3000
    assert chisquare([counts[token] for token in range(6)], expected.tolist()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("wish", "kept"),
    [
        ({"top_k": 1}, {0}), ({"top_k": 3}, {0, 1, 2}), ({"top_k": 100}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.5}, {0}), ({"top_p": 0.6}, {0, 1}), ({"top_p": 1e-9}, {0}),  # 0.545, 0.200, 0.122, 0.074, …
        ({"min_p": 0.3}, {0, 1}), ({"min_p": 1.0}, {0}), ({"top_k": 3, "min_p": 0.3}, {0, 1}),
        ({"top_k": 2, "top_p": 0.7}, {0}),  # of the two, the first has 0.731
    ],
)  # fmt: skip
def test_what_may_be_drawn_at_all(wish, kept):
    assert set(drawn(Sampling(temperature=1.0, **wish))) == kept


def test_the_probabilities_of_what_is_left_keep_their_ratios():
    found = drawn(Sampling(temperature=1.0, top_k=2))
    assert found[0] / found[1] == pytest.approx(math.e, rel=0.01)


@pytest.mark.parametrize("uniform", [0.0, 0.999999999])
def test_the_ends_of_the_uniform_number_are_inside(uniform):
    assert 0 <= draw(LOGITS, Sampling(temperature=1.0, top_p=0.9), uniform) < 6


def test_a_very_low_temperature_is_the_likeliest_token():
    assert set(drawn(Sampling(temperature=1e-6))) == {0}


# ---- penalties


def test_penalties_by_hand():
    wish = {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25, "logit_bias": {3: 10.0}}
    found = adjusted(LOGITS, request(prompt=[0, 5], answer=[1, 1, 4], **wish)).tolist()
    assert found == pytest.approx([1.0, 0.5 - 1.25, 0.5, 10.0, -2.0 - 0.75, -6.0])
    assert LOGITS.tolist() == [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]  # the caller's stay as they are


def test_the_likeliest_token_after_a_penalty_may_be_another():
    sampler = Sampler()
    assert sampler.choose(LOGITS[None], [request(answer=[0], presence_penalty=2.0)])[0].token == 1
    assert sampler.choose(LOGITS[None], [request(logit_bias={0: -100})])[0].token == 1


def test_log_probabilities_are_the_networks_own():
    (choice,) = Sampler().choose(LOGITS[None], [request(logprobs=2, logit_bias={4: 100})])
    expected = LOGITS.log_softmax(-1).tolist()
    assert choice.token == 4 and choice.logprob == pytest.approx(expected[4])
    assert [token for token, _ in choice.top] == [0, 1] and choice.top[0][1] == pytest.approx(expected[0])
    assert Sampler().choose(LOGITS[None], [request(logprobs=0)])[0].top == ()


# ---- neighbours


def test_a_seed_gives_the_same_answer_alone_and_in_any_company():
    def answer(sampler: Sampler, one: Request, company: list[Request]) -> list[int]:
        batch = [*company, one]
        logits = torch.stack([LOGITS.flip(0)] * len(company) + [LOGITS])
        return [sampler.choose(logits, batch)[-1].token for _ in range(30)]

    alone = answer(Sampler(), request(1, temperature=1.0, seed=7), [])
    others = [request(2, temperature=2.0), request(3), request(4, temperature=1.0, seed=7)]
    assert answer(Sampler(), request(1, temperature=1.0, seed=7), others) == alone
    assert answer(Sampler(), request(1, temperature=1.0, seed=8), []) != alone


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_numbers_are_an_error_of_their_own_request(bad):
    rows = torch.stack([LOGITS, LOGITS.clone()])
    rows[1, 2] = bad
    fine, broken = Sampler().choose(rows, [request(0), request(1)])
    assert fine.token == 0 and isinstance(broken, BadLogits) and "request 1" in str(broken)


def test_an_error_in_one_requests_choice_is_its_own():
    fine, broken = Sampler().choose(torch.stack([LOGITS] * 2), [request(0), request(1, logit_bias={77: 1.0})])
    assert fine.token == 0 and isinstance(broken, IndexError)


# ---- what is refused


@pytest.mark.parametrize(
    "wish",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_k": -1}, {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"frequency_penalty": 2.5},
        {"presence_penalty": -3.0}, {"logit_bias": {1: 101.0}}, {"logit_bias": {1: math.nan}}, {"logprobs": 21},
        {"max_new_tokens": 0}, {"stop": ("",)}, {"stop": tuple("abcdefghijklmnopq")},
    ],
)  # fmt: skip
def test_impossible_wishes_are_refused_in_one_sentence(wish):
    with pytest.raises(Refusal) as refused:
        Sampling(**wish)
    assert next(iter(wish)) in str(refused.value) and str(refused.value).endswith(".")
