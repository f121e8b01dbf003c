"""Three mistakes of KV cache records, made on a few generations. experiments/mistakes.py runs them."""

from statistics import mean, median
from typing import Any

import torch

from lab.prompts import exact
from metrics import Stats, ms, number, timed
from model import Model, decode_step, ids_tensor, prefill, recompute
from tokenizer import Tokenizer

PROMPT_TOKENS, LONG_PROMPT = 32, 200
Sample = dict[str, Any]
Finding = tuple[list[tuple], list[str]]


def new_shape(model: Model, tokenizer: Tokenizer, _config: Any, turn: int) -> Sample:
    """A prefill of a length that never came before, three times. Every turn takes another length."""
    stats: Stats = {}
    ids = ids_tensor([exact(tokenizer.codec.encode, PROMPT_TOKENS + 7 * turn)]).to(model.device)
    for _ in range(3):
        with timed("prefill", stats):
            prefill(model, ids)
    return stats


def warmup_shape(samples: list[Sample], *_: Any) -> Finding:
    """The warm-up ran another shape than the one that is timed (llama.cpp, issues 8187 and 21282).

    What is built for a shape at its first call, kernels chosen and memory taken, is then inside the timer.
    """
    later = samples[1:]  # the process itself is warm by then: only the shape is new
    ratios = [sample["prefill"][0] / median(sample["prefill"][1:]) for sample in later]
    wrong = median(sample["prefill"][0] for sample in later)
    right = median(seconds for sample in later for seconds in sample["prefill"][1:])
    over = sum(ratio > 1.1 for ratio in ratios)
    return [("prefill of a new shape, ms", ms(wrong, 2), ms(right, 2), number(wrong / right, 3))], [
        "Wrong: the first call of a shape, after warming up with other shapes. Right: the same shape's later calls. "
        f"The first call took {min(ratios):.2f} to {max(ratios):.2f} times as long; {over} of {len(ratios)} were more "
        "than 10 % off.",
        *(
            []
            if 2 * over > len(ratios)
            else [
                "So here it changes little: nothing is built for a shape on this device. "
                "Where kernels are compiled or chosen for each shape it changes all."
            ]
        ),
        "kv_experiment.py warms every shape that it times, and keeps the first time as a result of its own.",
    ]


def uncached(model: Model, tokenizer: Tokenizer, config: Any, _turn: int) -> Sample:
    """A generation without a cache: every step reads all tokens again."""
    stats: Stats = {}
    ids = ids_tensor([exact(tokenizer.codec.encode, PROMPT_TOKENS)]).to(model.device)
    tokens = [recompute(model, ids)]
    for _ in range(config.max_new_tokens - 1):
        everything = torch.cat([ids, *tokens], dim=1)
        with timed("decode", stats):
            tokens.append(recompute(model, everything))
    return stats


def mean_over_growth(samples: list[Sample], *_: Any) -> Finding:
    """One mean is given for steps that grow. It depends on how many there were, and no step took that long."""
    steps = [median(column) for column in zip(*(sample["decode"] for sample in samples[1:]), strict=True)]
    wrong, first, last = mean(steps), median(steps[:3]), median(steps[-3:])
    half = mean(steps[: len(steps) // 2])
    rows = [
        ("a decode step without a cache, ms: the first three", ms(wrong), ms(first), number(wrong / first, 3)),
        ("a decode step without a cache, ms: the last three", ms(wrong), ms(last), number(wrong / last, 3)),
    ]
    return rows, [
        f"Wrong: {ms(wrong)} ms a token, and nothing more. The same run cut at half its length says {ms(half)}: the "
        f"figure changes by {wrong / half - 1:+.1%} with the number of tokens, so two such figures cannot be compared.",
        f"Right: the step at a stated context ({ms(first)} ms at the start, {ms(last)} at the end), or its law of "
        "growth.",
    ]


def long_prompt(model: Model, tokenizer: Tokenizer, config: Any, _turn: int) -> Sample:
    """A generation with a cache after a long prompt."""
    stats: Stats = {}
    ids = ids_tensor([exact(tokenizer.codec.encode, LONG_PROMPT)]).to(model.device)
    with timed("prefill", stats):
        token, cache = prefill(model, ids)
    for _ in range(config.max_new_tokens - 1):
        with timed("decode", stats):
            token, cache = decode_step(model, token, cache)
    return stats


def prefill_in_decode(samples: list[Sample], _tokens: int, config: Any, _model: Model) -> Finding:
    """The prefill is divided among the new tokens and called token latency: it then seems to grow with the prompt."""
    later, n = samples[1:], config.max_new_tokens
    wrong = median((sample["prefill"][0] + sum(sample["decode"])) / n for sample in later)
    right = median(mean(sample["decode"]) for sample in later)
    first = median(sample["prefill"][0] for sample in later)
    return [("average token latency, ms", ms(wrong), ms(right), number(wrong / right, 3))], [
        f"Wrong: the whole time over {n} new tokens. Of it {ms(first)} ms are the prefill of {LONG_PROMPT} tokens, "
        "which another prompt or another number of new tokens would change.",
        f"Right: the mean of the {n - 1} decode steps, with the prefill in a column of its own.",
    ]
