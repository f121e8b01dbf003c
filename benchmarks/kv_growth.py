"""With the cache, a step grows with its context by what reading the cache must cost, or it is known where it goes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import mean, median
from typing import Any

import torch

from benchmarks.claim import Claim, rounds
from config import PromptConfig
from lab import kv_probes
from lab.ceilings import Probe
from lab.console import progress
from lab.fits import line
from lab.prompts import exact
from lab.verdict import t_half_width
from metrics import Stats, timed
from model import Model, decode_step, ids_tensor, load, prefill, static_cache

CONTEXTS = (64, 512, 1024, 1536)
ROUNDS, STEPS = 8, 4
ALLOWED = 2.0  # times what the bytes of the cache and the measured bandwidth need


def claims(config: PromptConfig) -> list[Claim]:
    model, tokenizer, _ = load(replace(config, max_new_tokens=2))
    reach = (model.context or CONTEXTS[-1] * 2) - ROUNDS * STEPS * 2
    contexts = [n for n in CONTEXTS if n < reach]
    prompts = [ids_tensor([exact(tokenizer.codec.encode, n)]).to(model.device) for n in contexts]
    count = rounds(config, ROUNDS)
    slopes = {kind: measured(model, prompts, kind, count) for kind in ("dynamic", "static")}
    needed = 1000 * model.kv_bytes_per_token() / Probe(model.device).bytes_per_s(repeats=9)
    read, step = partial(prefill, model), partial(decode_step, model)
    share = kv_probes.attention_share(model.device, read, step, prompts[-1], room=STEPS)
    return [
        *(growth_claim(f"{kind} cache: a step's growth per 1,000 tokens", s, needed) for kind, s in slopes.items()),
        explained(slopes, share, contexts[-1]),
    ]


def growth_claim(what: str, slopes: Sequence[float], needed_s: float) -> Claim:
    """Holds when the whole interval lies within what is allowed, fails when all of it lies beyond."""
    slope, half = mean(slopes) * 1000, t_half_width(slopes) * 1000
    within, beyond = (slope + half) / needed_s <= ALLOWED, (slope - half) / needed_s > ALLOWED
    return Claim(
        what,
        f"≤ {ALLOWED:g} × what reading the cache needs ({needed_s * 1e3:.1f} ms)",
        f"{slope * 1e3:+.1f} ± {half * 1e3:.1f} ms: ×{slope / needed_s:.1f} (n={len(slopes)})",
        True if within else False if beyond else None,
    )


def explained(slopes: dict[str, list[float]], share: dict[str, Any], context: int) -> Claim:
    """Where the growing cache's growth goes: what a static cache, which copies nothing to grow, takes of it."""
    less = [(dynamic - static) * 1000 for dynamic, static in zip(slopes["dynamic"], slopes["static"], strict=True)]
    gone, half = mean(less), t_half_width(less)
    return Claim(
        "the growing cache pays for copying itself",
        "a static cache grows less",
        f"by {gone * 1e3:.1f} ± {half * 1e3:.1f} ms per 1,000 tokens; with the growing one at {context} tokens copies "
        f"take {share['copying']:.0%} of a step and attention {share['decode']:.0%}",
        True if gone - half > 0 else False if gone + half < 0 else None,
    )


def measured(model: Model, prompts: Sequence[torch.Tensor], kind: str, count: int) -> list[float]:
    """The slope of a step's time against its context, in seconds a token, one for each round."""
    caches: list[list[Any]] = []
    for ids in prompts:
        room = static_cache(model, ids.shape[1] + 2 * count * STEPS) if kind == "static" else None
        caches.append([*prefill(model, ids, cache=room), ids.shape[1]])
    found = []
    for turn in progress(range(count + 1), count + 1, f"growth, {kind}"):
        points = []
        for state in caches if turn % 2 == 0 else reversed(caches):
            stats: Stats = {}
            for _ in range(STEPS):
                with timed("decode", stats):
                    state[0], state[1] = decode_step(model, state[0], state[1])
                state[2] += 1
            points.append((state[2], median(stats["decode"])))
        if turn:  # the first round warms every shape
            found.append(line(*zip(*points, strict=True)).slope)
    return found
