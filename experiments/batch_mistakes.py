"""Three mistakes of batching records, made on one small sweep. experiments/mistakes.py runs them."""

from statistics import mean, median
from typing import Any

from batcher import DynamicBatcher
from lab.arrivals import schedule
from lab.batch_figures import latencies_s, mean_latency_s
from lab.batch_trial import Served, run_trial
from lab.prompts import exact
from lab.verdict import verdict
from metrics import number, percentile
from model import Model, generate_batch
from tokenizer import Tokenizer

SIZES, REQUESTS, PROMPT_TOKENS = (1, 4, 8), 8, 32
Sample = dict[str, Any]  # batch size -> trial; JSON makes the keys strings
Finding = tuple[list[tuple], list[str]]


def served_by(model: Model, tokenizer: Tokenizer, new_tokens: int) -> tuple[Served, list[list[int]]]:
    def answer(prompts, stats) -> list:
        return generate_batch(model, prompts, max_new_tokens=new_tokens, pad_id=tokenizer.pad_id, stats=stats)

    prompts = [exact(tokenizer.codec.encode, PROMPT_TOKENS, i) for i in range(REQUESTS)]
    return Served(answer, model.net), prompts


def sweep(model: Model, tokenizer: Tokenizer, config: Any, turn: int) -> Sample:
    """Every batch size once, all requests arriving together; odd turns run them in the other order."""
    served, prompts = served_by(model, tokenizer, config.max_new_tokens)
    sizes = SIZES if turn % 2 == 0 else SIZES[::-1]
    return {str(b): run_trial(DynamicBatcher, served, prompts, (b, 0.0), [0.0] * REQUESTS) for b in sizes}


def one_by_one(model: Model, tokenizer: Tokenizer, config: Any, turn: int) -> Sample:
    """Batch 4 under Poisson arrivals, another schedule every turn."""
    served, prompts = served_by(model, tokenizer, config.max_new_tokens)
    dues = schedule("poisson", REQUESTS, 1.5, config.seed + turn)
    return {"4": run_trial(DynamicBatcher, served, prompts, (4, 10.0), dues)}


def execution_s(trial: Sample) -> list[float]:
    """By request: the time its batch ran, its wait left out."""
    return [batch["finished_s"] - batch["started_s"] for batch in trial["batches"] for _ in batch["members"]]


def order(samples: list[Sample], *_: Any) -> Finding:
    """Each cell is measured once, in one order, and points are compared with points.

    This project's first notes did so: batch 8 had "lower latency" than batch 4 by 307 to 317 ms, which was explained
    with caches, and batch 1 had a P95 of 559 ms because a cold request was inside.
    """
    first, later = samples[0], samples[1:]
    times = {b: [mean(execution_s(sample[b])) for sample in later] for b in first}
    said = verdict(times["8"], times["4"])
    points = [a / b for a, b in zip(times["8"], times["4"], strict=True)]
    wrong = mean(execution_s(first["8"])) / mean(execution_s(first["4"]))
    cold = percentile(execution_s(first["1"]), 95)
    warm = percentile([seconds for sample in later for seconds in execution_s(sample["1"])], 95)
    rows = [
        ("time of a batch of 8 / a batch of 4", number(wrong, 3), number(said.ratio, 3), number(wrong / said.ratio, 3)),
        ("P95 execution of batch 1, s", number(cold, 3), number(warm, 3), number(cold / warm, 3)),
    ]
    return rows, [
        "Wrong: one pass over the cells, a point against a point. The same ratio, taken from each later pass alone, "
        f"lies between {min(points):.3f} and {max(points):.3f}: a table of one pass could have said any of these.",
        f"Right: interleaved rounds and an interval: a batch of 8 against a batch of 4 is {said}.",
    ]


def exec_only(samples: list[Sample], *_: Any) -> Finding:
    """Latency is said to be the time a batch ran. The time that its members waited before is left out."""
    later = samples[1:]
    rows, ratios = [], []
    for b in map(str, SIZES):
        wrong = median(mean(execution_s(sample[b])) for sample in later)
        right = median(mean_latency_s(sample[b]) for sample in later)
        ratios.append((wrong, right))
        rows.append((f"average latency of batch {b}, s", number(wrong, 3), number(right, 3), number(wrong / right, 3)))
    wrong, right = (ratios[-1][i] / ratios[0][i] for i in (0, 1))
    rows.append(("latency of batch 8 / batch 1", number(wrong, 2), number(right, 2), number(wrong / right, 2)))
    turned = "the conclusion is turned round" if (wrong > 1) != (right > 1) else "the price has another size"
    return rows, [
        f"Wrong: execution time only says that batch 8 has ×{wrong:.2f} the latency of batch 1. Right: from due to "
        f"done, {REQUESTS} requests arriving together, it has ×{right:.2f}: {turned}. Whoever waits in a queue waits.",
    ]


def mean_of_p95(samples: list[Sample], *_: Any) -> Finding:
    """The rounds' P95s are averaged. A mean of percentiles is no percentile of anything."""
    later = samples[1:]
    each = [percentile(latencies_s(sample["4"]), 95) for sample in later]
    pooled = [latency for sample in later for latency in latencies_s(sample["4"])]
    wrong, right = mean(each), percentile(pooled, 95)
    rows = [("P95 latency, s", number(wrong, 3), number(right, 3), number(wrong / right, 3))]
    over = sum(latency > wrong for latency in pooled)
    return rows, [
        f"Wrong: the mean of {len(each)} rounds' P95s ({', '.join(f'{p:.2f}' for p in each)} s; of {REQUESTS} "
        f"requests, each is that round's greatest latency). {over} of {len(pooled)} requests, "
        f"{over / len(pooled):.0%}, took longer than what is called P95 here.",
        f"Right: the nearest-rank P95 of all {len(pooled)} latencies"
        + ("." if len(pooled) >= 132 else f", printed with n={len(pooled)} and not certified: it takes 132."),
    ]
