"""The same raw samples, reported with a classic mistake and without it.

Each mistake has been made in earnest, in a public tool or in this project's own first notes. Nothing is measured twice:
both figures of a row come from the same clock readings.

    python3 -m experiments.mistakes cold       # one cold call is taken for the speed of prefill
    python3 -m experiments.mistakes unsynced   # the clock stops when the work was queued, not when it was done
    python3 -m experiments.mistakes folded     # new tokens over prefill + decode, called decode speed
    python3 -m experiments.mistakes order      # every cell once, in one order; a point against a point
    python3 -m experiments.mistakes exec-only  # latency without the time in the queue
    python3 -m experiments.mistakes mean-of-p95   # the rounds' P95s, averaged
    python3 -m experiments.mistakes warmup-shape  # warmed with another shape than the one that is timed
    python3 -m experiments.mistakes mean-over-growth    # one mean for steps that grow
    python3 -m experiments.mistakes prefill-in-decode   # the prefill, divided among the new tokens
    python3 -m experiments.mistakes coordinated-omission   # latency from when a late sender sent
    python3 -m experiments.mistakes chunks     # events of a stream, counted as tokens
    python3 -m experiments.mistakes role-chunk   # the event that names the role, taken for the first token
    python3 -m experiments.mistakes warm-cache   # the same prompts again
    python3 -m experiments.mistakes opening-wave   # all clients at once, inside the percentile
"""

from config import PromptConfig, check_packages, knob

if __name__ == "__main__":
    check_packages()

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from experiments import batch_mistakes, kv_mistakes, load_mistakes
from lab import console, records
from lab.card import hardware_card
from lab.request_tables import quoted
from metrics import Stats, ms, number, synchronize, table, timed
from model import Model, check_fits, decode_step, ids_tensor, load, prefill

NAMES = ("cold", "unsynced", "folded", "order", "exec-only", "mean-of-p95", "warmup-shape", "mean-over-growth",
         "prefill-in-decode", "coordinated-omission", "chunks", "role-chunk", "warm-cache", "opening-wave")  # fmt: skip
Finding = tuple[list[tuple], list[str]]  # rows: figure, wrong, right, wrong / right; and sentences


@dataclass(frozen=True)
class MistakesConfig(PromptConfig):
    mistake: str = knob("", "which mistake to make", positional=True, choices=NAMES)
    max_new_tokens: int = knob(16, "new tokens of each request", least=3)
    runs: int = knob(6, "requests after the first", least=2, quick=3)


def request(model: Model, ids: torch.Tensor, config: MistakesConfig) -> Stats:
    """One request of fixed length: seconds of the prefill and of every decode step."""
    stats: Stats = {}
    with timed("prefill", stats):
        token, cache = prefill(model, ids)
    for _ in range(config.max_new_tokens - 1):
        with timed("decode", stats):
            token, cache = decode_step(model, token, cache)
    return stats


def cold(samples: list[Stats], tokens: int, _config: MistakesConfig, _model: Model) -> Finding:
    """The first request of a process pays for what is built once: thread pools, kernel choices, memory from the system.

    This project's first notes timed one call, found 33.4 ms a token for prefill and 4.5 for decode, and concluded that
    prefill is the slow phase "because it attends to all tokens".
    """
    first, warm = samples[0], samples[1:]
    wrong = first["prefill"][0] / tokens
    right = median(s["prefill"][0] for s in warm) / tokens
    step = median(seconds for s in warm for seconds in s["decode"])
    off = number(wrong / right, 2)
    rows = [
        ("prefill, ms a prompt token", ms(wrong, 2), ms(right, 2), off),
        ("prefill against a decode step, per token", number(wrong / step, 3), number(right / step, 3), off),
    ]
    told, truth = ("slower" if value > step else "faster" for value in (wrong, right))
    harm = "the conclusion is turned round" if told != truth else "this time only the figure is wrong"
    return rows, [
        f"Wrong: the first call of the process, {ms(first['prefill'][0])} ms for {tokens} tokens, says that a "
        f"prompt token is {told} than a decode step of {ms(step)} ms: {harm}.",
        f"Right: the median of {len(warm)} later calls; a prompt token costs {right / step:.2f} of a decode step. "
        "The cold value is kept as a row of its own: it is what the first user after a restart waits.",
    ]


def unsynced_request(model: Model, ids: torch.Tensor, config: MistakesConfig) -> Stats:
    """One request: when each decode step was handed over, and when it was done.

    A GPU call returns when its work is queued. On a CPU nothing is queued, so here a one-thread pool stands for the
    GPU's queue, and says so; the clock readings and the mistake are the same.
    """
    stats: Stats = {"submitted": [], "done": []}
    state: Any = prefill(model, ids)
    with ThreadPoolExecutor(1) as queue:
        for _ in range(config.max_new_tokens - 1):
            synchronize()
            start = time.perf_counter()
            if model.device.type == "cpu":
                work = queue.submit(decode_step, model, *state)
                stats["submitted"].append(time.perf_counter() - start)
                state = work.result()
            else:
                state = decode_step(model, *state)
                stats["submitted"].append(time.perf_counter() - start)
                synchronize()
            stats["done"].append(time.perf_counter() - start)
    return stats


def unsynced(samples: list[Stats], _tokens: int, _config: MistakesConfig, model: Model) -> Finding:
    """The clock stops when the work was queued, not when it was done."""
    warm = samples[1:]
    wrong = median(value for s in warm for value in s["submitted"])
    right = median(value for s in warm for value in s["done"])
    rows = [
        ("decode, ms a step", ms(wrong, 3), ms(right, 3), number(wrong / right, 4)),
        ("decode, tokens/s", number(1 / wrong), number(1 / right), number(right / wrong, 1)),
    ]
    where = "a one-thread pool that stands for a GPU's queue" if model.device.type == "cpu" else "the GPU's own queue"
    return rows, [
        f"Wrong: the clock stops when the step was handed to {where}. Right: it stops when the step was done.",
        "timed() waits for the device on both sides of every block, so the kit cannot make this mistake.",
    ]


def folded(samples: list[Stats], tokens: int, config: MistakesConfig, _model: Model) -> Finding:
    """n new tokens over the time of prefill and decode is called decode speed (gpt-fast, issue 26).

    The first token is prefill's, and prefill's time depends on the prompt: so the "decode speed" changes with it.
    """
    n, warm = config.max_new_tokens, samples[1:]
    wrong = median(n / (s["prefill"][0] + sum(s["decode"])) for s in warm)
    right = median((n - 1) / sum(s["decode"]) for s in warm)
    return [("decode speed, tokens/s", number(wrong), number(right), number(wrong / right, 3))], [
        f"Wrong: {n} new tokens over prefill + decode. Right: {n - 1} decode steps over the time of those steps.",
        f"The figure is off by {wrong / right - 1:+.1%} at {tokens} prompt tokens and {n} new ones, and by "
        "another amount at any other length: two such figures cannot be compared.",
    ]


# mistake -> how one request is sampled, and how the samples are told
MISTAKES: dict[str, tuple[Callable[..., Stats], Callable[..., Finding]]] = {
    "cold": (request, cold),
    "unsynced": (unsynced_request, unsynced),
    "folded": (request, folded),
}
# The same for those that need a batcher or prompts of their own, and how many tokens the longest of those has.
OWN_PROMPTS: dict[str, tuple[Callable[..., Any], Callable[..., Finding], int]] = {
    "order": (batch_mistakes.sweep, batch_mistakes.order, batch_mistakes.PROMPT_TOKENS),
    "exec-only": (batch_mistakes.sweep, batch_mistakes.exec_only, batch_mistakes.PROMPT_TOKENS),
    "mean-of-p95": (batch_mistakes.one_by_one, batch_mistakes.mean_of_p95, batch_mistakes.PROMPT_TOKENS),
    "warmup-shape": (kv_mistakes.new_shape, kv_mistakes.warmup_shape, kv_mistakes.PROMPT_TOKENS),
    "mean-over-growth": (kv_mistakes.uncached, kv_mistakes.mean_over_growth, kv_mistakes.PROMPT_TOKENS),
    "prefill-in-decode": (kv_mistakes.long_prompt, kv_mistakes.prefill_in_decode, kv_mistakes.LONG_PROMPT),
    "coordinated-omission": (load_mistakes.late_sender, load_mistakes.coordinated_omission, 1),
    "chunks": (load_mistakes.in_fours, load_mistakes.chunks, 1),
    "role-chunk": (load_mistakes.role_first, load_mistakes.role_chunk, 1),
    "warm-cache": (load_mistakes.asked_twice, load_mistakes.warm_cache, load_mistakes.WARM_PROMPT),
    "opening-wave": (load_mistakes.in_waves, load_mistakes.opening_wave, load_mistakes.PROMPT_TOKENS),
}


def main(argv: list[str] | None = None) -> int:
    config = MistakesConfig.from_cli(__doc__, argv)
    records.check_writable(config, "mistakes")
    model, tokenizer, prompt = load(config)
    ids = ids_tensor([prompt]).to(model.device)
    samples: list[Any] = []
    page, partial = console.Page(silent=config.json == "-"), False
    card = hardware_card(model.device)
    own = config.mistake in OWN_PROMPTS
    if own:
        take, tell, prompt_tokens = OWN_PROMPTS[config.mistake]
    else:
        take, tell = MISTAKES[config.mistake]
        prompt_tokens = len(prompt)
    asked = "standard texts; --prompt is not used" if own else config.prompt
    check_fits(model, prompt_tokens, config.max_new_tokens)
    page.show(
        f"# The mistake: {config.mistake}\n\n{model.name}, {model.place.dtype_name} on {model.device.type}, "
        f"{prompt_tokens} prompt tokens{'' if own else f' ({tokenizer.template})'}: {quoted(asked)}",
        keep=False,
    )
    try:
        for turn in console.progress(range(config.runs + 1), config.runs + 1, "rounds"):
            samples.append(take(model, tokenizer, config, turn) if own else take(model, ids, config))
    except KeyboardInterrupt:
        partial = True
    if len(samples) < 2:
        raise KeyboardInterrupt  # nothing can be said from one request
    rows, said = tell(samples, ids.shape[1], config, model)
    record = records.new_record("mistakes", f"mistake-{config.mistake}", config, card)
    record |= {
        "model": model.description(),
        "prompt": asked,
        "prompt_tokens": prompt_tokens,
        "samples": samples,
        "partial": partial,
        "batch_policy": "as the table says" if own else "one request at a time",
        "kv_cache": "on",
        "gpu_utilisation": "not sampled",
        "verdicts": said,
    }
    columns = [("figure", "left"), ("with the mistake", "right"), ("right", "right"), ("ratio", "right")]
    return console.conclude(config, record, page, [table(columns, rows)])


if __name__ == "__main__":
    console.run(main)
