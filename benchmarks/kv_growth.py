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
KINDS = ("dynamic", "static")
ROUNDS, STEPS, PROFILES = 24, 4, 10
ALLOWED = 2.0  # times what the bytes of the cache and the measured bandwidth need
MOST = 2 / 3  # of the growth must be told by name


def claims(config: PromptConfig) -> list[Claim]:
    model, tokenizer, _ = load(replace(config, max_new_tokens=2))
    reach = (model.context or CONTEXTS[-1] * 2) - ROUNDS * STEPS * 2
    contexts = [n for n in CONTEXTS if n < reach]
    prompts = [ids_tensor([exact(tokenizer.codec.encode, n)]).to(model.device) for n in contexts]
    count = rounds(config, ROUNDS)
    slopes = measured(model, prompts, count)
    needed = 1000 * model.kv_bytes_per_token() / Probe(model.device).bytes_per_s(repeats=9)
    parts = {kind: by_part(model, prompts, kind) for kind in slopes}
    return [growth_claim(kind, slopes[kind], parts[kind], needed) for kind in slopes] + [less_copying(slopes)]


def growth_claim(kind: str, slopes: Sequence[float], parts: dict[str, float], needed_s: float) -> Claim:
    """Holds when the whole interval is within what is allowed, or the profile says where most of the growth goes."""
    slope, half = mean(slopes) * 1000, t_half_width(slopes) * 1000
    told = ", ".join(f"{name} {seconds * 1e6:+.1f}" for name, seconds in parts.items())
    within = (slope + half) / needed_s <= ALLOWED
    explained = parts["attention"] + parts["copying"] >= MOST * sum(parts.values()) > 0
    return Claim(
        f"{kind} cache: a step's growth per 1,000 tokens",
        f"≤ {ALLOWED:g} × what reading the cache needs ({needed_s * 1e3:.1f} ms), or the profile says where it goes",
        f"{slope * 1e3:+.1f} ± {half * 1e3:.1f} ms: ×{slope / needed_s:.1f} (n={len(slopes)}); profile: {told} ms",
        within or explained,
    )


def less_copying(slopes: dict[str, list[float]]) -> Claim:
    """A static cache copies nothing to grow: what of the growth it takes away."""
    less = [(dynamic - static) * 1000 for dynamic, static in zip(slopes["dynamic"], slopes["static"], strict=True)]
    gone, half = mean(less), t_half_width(less)
    return Claim(
        "the growing cache pays for copying itself", "a static cache grows less",
        f"by {gone * 1e3:.1f} ± {half * 1e3:.1f} ms per 1,000 tokens",
        True if gone - half > 0 else False if gone + half < 0 else None,
    )  # fmt: skip


def by_part(model: Model, prompts: Sequence[torch.Tensor], kind: str) -> dict[str, float]:
    """How each part of a step grows with a token of context, in seconds, by profiles at the ends of the range."""
    ends = [list(started(model, ids, kind, PROFILES * STEPS)) for ids in (prompts[0], prompts[-1])]
    found: list[dict[str, float]] = []
    across = prompts[-1].shape[1] - prompts[0].shape[1]
    for _ in range(PROFILES):
        near, far = (kv_probes.step_parts(model.device, partial(advance, model, state), STEPS) for state in ends)
        found.append({name: (far[name] - near[name]) / across for name in near})
    return {name: median(parts[name] for parts in found) for name in found[0]}


def advance(model: Model, state: list) -> None:
    state[:] = decode_step(model, *state)


def started(model: Model, ids: torch.Tensor, kind: str, more: int) -> tuple[Any, Any]:
    """(first new token, cache) of a prompt, with room for more tokens where the cache is of fixed size."""
    return prefill(model, ids, cache=static_cache(model, ids.shape[1] + more) if kind == "static" else None)


def measured(model: Model, prompts: Sequence[torch.Tensor], count: int) -> dict[str, list[float]]:
    """For each kind of cache the slope of a step's time against its context, in seconds a token, one for each round.

    A round visits every kind and context, in turning order, so that a slow moment meets all alike.
    """
    states = {
        (kind, i): [*started(model, ids, kind, (count + 1) * STEPS), ids.shape[1]]
        for kind in KINDS
        for i, ids in enumerate(prompts)
    }
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in progress(range(count + 1), count + 1, "growth"):
        points: dict[str, list[tuple[int, float]]] = {kind: [] for kind in KINDS}
        for (kind, _), state in list(states.items())[:: 1 if turn % 2 == 0 else -1]:
            stats: Stats = {}
            for _ in range(STEPS):
                with timed("decode", stats):
                    state[0], state[1] = decode_step(model, state[0], state[1])
                state[2] += 1
            points[kind].append((state[2], median(stats["decode"])))
        for kind in KINDS if turn else ():  # the first round warms every shape
            found[kind].append(line(*zip(*points[kind], strict=True)).slope)
    return found
