"""The same raw samples, reported with a classic mistake and without it.

Each mistake has been made in earnest, in a public tool or in this project's own first notes. Nothing is measured twice:
both figures of a row come from the same clock readings.

    python3 -m experiments.mistakes cold       # one cold call is taken for the speed of prefill
    python3 -m experiments.mistakes unsynced   # the clock stops when the work was queued, not when it was done
    python3 -m experiments.mistakes folded     # new tokens over prefill + decode, called decode speed
"""

from config import PromptConfig, check_packages, knob

if __name__ == "__main__":
    check_packages()

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from lab import console, records
from lab.card import hardware_card
from lab.request_tables import quoted
from metrics import Stats, ms, number, synchronize, table, timed
from model import Model, decode_step, ids_tensor, load, prefill

Finding = tuple[list[tuple], list[str]]  # rows: figure, wrong, right, wrong / right; and sentences


@dataclass(frozen=True)
class MistakesConfig(PromptConfig):
    mistake: str = knob("", "which mistake to make", positional=True, choices=("cold", "unsynced", "folded"))
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


def cold(model: Model, ids: torch.Tensor, config: MistakesConfig) -> tuple[list[Stats], Finding]:
    """The first request of a process pays for what is built once: thread pools, kernel choices, memory from the system.

    This project's first notes timed one call, found 33.4 ms a token for prefill and 4.5 for decode, and concluded that
    prefill is the slow phase "because it attends to all tokens".
    """
    samples = [request(model, ids, config) for _ in range(config.runs + 1)]
    first, warm = samples[0], samples[1:]
    tokens = ids.shape[1]
    wrong = first["prefill"][0] / tokens
    right = median(s["prefill"][0] for s in warm) / tokens
    step = median(seconds for s in warm for seconds in s["decode"])
    rows = [
        ("prefill, ms a prompt token", ms(wrong, 2), ms(right, 2), number(wrong / right, 2)),
        (
            "prefill against a decode step, per token",
            number(wrong / step, 3),
            number(right / step, 3),
            number(wrong / right, 2),
        ),
    ]
    told = "slower" if wrong > step else "faster"
    return samples, (
        rows,
        [
            f"Wrong: the first call of the process, {ms(first['prefill'][0])} ms for {tokens} tokens, says that a "
            f"prompt token is {told} than a decode step of {ms(step)} ms.",
            f"Right: the median of {len(warm)} later calls; a prompt token costs {right / step:.2f} of a decode step. "
            f"The cold value is kept as a row of its own: it is what the first user after a restart waits.",
        ],
    )


def unsynced(model: Model, ids: torch.Tensor, config: MistakesConfig) -> tuple[list[Stats], Finding]:
    """A GPU call returns when its work is queued. On a CPU nothing is queued, so here a one-thread pool stands for the
    GPU's queue, and says so; the clock readings and the mistake are the same.
    """
    samples: list[Stats] = []
    with ThreadPoolExecutor(1) as queue:
        for _ in range(config.runs + 1):
            stats: Stats = {"submitted": [], "done": []}
            state: Any = prefill(model, ids)
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
            samples.append(stats)
    warm = samples[1:]
    wrong = median(value for s in warm for value in s["submitted"])
    right = median(value for s in warm for value in s["done"])
    rows = [
        ("decode, ms a step", ms(wrong, 3), ms(right, 3), number(wrong / right, 4)),
        ("decode, tokens/s", number(1 / wrong), number(1 / right), number(right / wrong, 1)),
    ]
    where = "a one-thread pool that stands for a GPU's queue" if model.device.type == "cpu" else "the GPU's own queue"
    return samples, (
        rows,
        [
            f"Wrong: the clock stops when the step was handed to {where}. Right: it stops when the step was done.",
            "timed() waits for the device on both sides of every block, so the kit cannot make this mistake.",
        ],
    )


def folded(model: Model, ids: torch.Tensor, config: MistakesConfig) -> tuple[list[Stats], Finding]:
    """n new tokens over the time of prefill and decode is called decode speed (gpt-fast, issue 26).

    The first token is prefill's, and prefill's time depends on the prompt: so the "decode speed" changes with it.
    """
    samples = [request(model, ids, config) for _ in range(config.runs + 1)][1:]
    n = config.max_new_tokens
    wrong = median(n / (s["prefill"][0] + sum(s["decode"])) for s in samples)
    right = median((n - 1) / sum(s["decode"]) for s in samples)
    rows = [("decode speed, tokens/s", number(wrong), number(right), number(wrong / right, 3))]
    return samples, (
        rows,
        [
            f"Wrong: {n} new tokens over prefill + decode. Right: {n - 1} decode steps over the time of those steps.",
            f"The figure is off by {wrong / right - 1:+.1%} at {ids.shape[1]} prompt tokens and {n} new ones, and by "
            "another amount at any other length: two such figures cannot be compared.",
        ],
    )


MISTAKES: dict[str, Callable[..., tuple[list[Stats], Finding]]] = {"cold": cold, "unsynced": unsynced, "folded": folded}


def main(argv: list[str] | None = None) -> int:
    config = MistakesConfig.from_cli(__doc__, argv)
    records.check_writable(config, "mistakes")
    model, tokenizer, prompt = load(config)
    ids = ids_tensor([prompt]).to(model.device)
    samples, (rows, said) = MISTAKES[config.mistake](model, ids, config)
    page = console.Page(silent=config.json == "-")
    card = hardware_card(model.device)
    record = records.new_record("mistakes", f"mistake-{config.mistake}", config, card)
    record |= {
        "model": model.description(),
        "prompt": config.prompt_text(),
        "prompt_tokens": len(prompt),
        "samples": samples,
        "batch_policy": "one request at a time",
        "kv_cache": "on",
        "gpu_utilisation": "not sampled",
        "verdicts": said,
    }
    columns = [("figure", "left"), ("with the mistake", "right"), ("right", "right"), ("ratio", "right")]
    text = table(columns, rows)
    failure = records.save(config, record, text)
    page.show(
        f"# The mistake: {config.mistake}\n\n{model.name}, {model.place.dtype_name} on {model.device.type}, "
        f"{len(prompt)} prompt tokens ({tokenizer.template}): {quoted(config.prompt_text())}"
    )
    page.show(text)
    page.show("\n".join(f"- {sentence}" for sentence in said))
    page.show(f"Record [{record['id']}]")
    if config.json == "-":
        print(json.dumps(record, ensure_ascii=False))
    if failure:
        raise failure
    return 0


if __name__ == "__main__":
    console.run(main)
