"""What the engine does on this machine: measured once, in about a second, and kept for the next start."""

import json
import random
from statistics import median
from typing import Any

from config import cache_dir, keep
from engine.engine import Engine, StepTimes
from engine.request import Sampling
from service.rates import Rates

PROMPT, NEW = 64, 9  # tokens of the probe's prompts, and of its answers
KEPT = "capacity.json"
DOUBLES_AT = 1000  # tokens of context at which an answer's step costs twice as much: a guess, to be learned from


def measured(engine: Engine, slots: int, seed: int = 0) -> Rates:
    """Steps with one answer and with all slots, and prompts. The engine must be new: its steps are read."""
    dice = random.Random(seed)
    most = engine.vocabulary or 256
    context = engine.context or 1 << 20
    prompt, new = max(min(PROMPT, context - NEW), 1), min(NEW, context - 1)
    wish = Sampling(max_new_tokens=new, ignore_eos=True)

    def run(count: int, length: int) -> list[StepTimes]:
        before = len(engine.steps)
        engine.generate([[dice.randrange(most) for _ in range(length)] for _ in range(count)], wish)
        return list(engine.steps)[before:]

    run(1, prompt)  # warms up: memory is touched for the first time
    alone_s = decode_s(run(1, prompt), 1)
    steps = run(slots, prompt)
    together_s = decode_s(steps, slots)
    each_s = max(together_s - alone_s, 0.0) / max(slots - 1, 1)
    prefill = [step for step in steps if step.tokens > step.requests]
    rate = sum(step.tokens for step in prefill) / sum(step.end - step.start for step in prefill)
    return rates_of(max(alone_s - each_s, 1e-6), each_s, rate)


def rates_of(step_s: float, each_s: float, prefill_tokens_s: float) -> Rates:
    return Rates(step_s, each_s, prefill_tokens_s, (each_s or step_s) / DOUBLES_AT)


def decode_s(steps: list[StepTimes], answers: int) -> float:
    """The usual step of one token for each of so many answers; of fewer, where so many never ran together."""
    found = [step.end - step.start for step in steps if step.tokens == step.requests == answers]
    return median(found or [step.end - step.start for step in steps])


def known(engine_of: Any, slots: int, about: dict[str, Any], machine: str) -> tuple[Rates, bool]:
    """(the rates, whether they were measured just now). engine_of(): a new engine."""
    key = json.dumps([machine, slots, *(about.get(name) for name in ("hash", "kernel", "weights", "cache", "threads"))])
    path = cache_dir() / KEPT
    try:
        kept = json.loads(path.read_text())
        return rates_of(*map(float, kept[key])), False
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rates = measured(engine_of(), slots)
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    kept = kept if isinstance(kept, dict) else {}
    keep(path, json.dumps(kept | {key: [rates.step_s, rates.each_s, rates.prefill_tokens_s]}, indent=1))
    return rates, True
