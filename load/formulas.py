"""The same requests in the formulas of other tools, to tell a difference of servers from one of definitions.

Each docstring says the definition, where it stands, and how ours (load/measures.py) differs. vLLM: `vllm bench serve`
of 0.32, benchmarks/serve.py and benchmarks/lib/endpoint_request_func.py. guidellm: 0.8, schemas/base/request_stats.py,
schemas/base/statistics.py and benchmark/schemas/metrics.py. Both say 0.0 where nothing was measured; so is it here.

requests: a run's, as records hold them, all of them: neither tool knows a window. One optional key of a request,
"choice_times", holds the times of all its events with choices, with text or not; without it, those with text count.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

Request = dict[str, Any]
Samples = Sequence[float]
GUIDELLM_PERCENTILES = {"p001": 0.001, "p01": 0.01, "p05": 0.05, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75,
                        "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}  # fmt: skip

# ---- vLLM: one request


def vllm_times(request: Request) -> list[float]:
    """Of every event with choices (endpoint_request_func.py): role-only, empty and last ones too. Ours: text only."""
    return request.get("choice_times") or [moment for moment, _ in request["chunks"]]


def vllm_counts(request: Request) -> bool:
    """Status 200, no exception and one event with choices (endpoint_request_func.py). Ours: also a told end."""
    return request["ok"] and bool(vllm_times(request))


def vllm_tokens(request: Request) -> int:
    """completion_tokens of usage, else its tokenizer's count or 1 (serve.py). Ours: ids, usage, then chunks."""
    return request["new_tokens"] or 1


def vllm_ttft(request: Request) -> float:
    """First event with choices - sent (endpoint_request_func.py). Ours: first text - due."""
    return vllm_times(request)[0] - request["sent"]


def vllm_e2el(request: Request) -> float:
    """Last event with choices - sent (endpoint_request_func.py). Ours: last text - due."""
    return vllm_times(request)[-1] - request["sent"]


def vllm_tpot(request: Request) -> float | None:
    """(E2EL - TTFT) / (tokens - 1), none below two tokens (serve.py). Ours: the same of our own E2E and TTFT."""
    tokens = vllm_tokens(request)
    return (vllm_e2el(request) - vllm_ttft(request)) / (tokens - 1) if tokens > 1 else None


def vllm_itls(request: Request) -> list[float]:
    """Gaps between events with choices, however many tokens each (endpoint_request_func.py). Ours: between texts."""
    return [after - before for before, after in pairwise(vllm_times(request))]


# ---- vLLM: a run


def as_vllm(requests: Sequence[Request], percentiles: Samples = (99,), begin_s: float = 0.0) -> dict[str, float]:
    """The figures of `vllm bench serve`, by the names in its result file. begin_s: when the run began."""
    good = [request for request in requests if vllm_counts(request)]
    duration = vllm_duration(requests, begin_s)
    prompt, new = sum(request["prompt_tokens"] or 0 for request in good), sum(map(vllm_tokens, good))
    found = {
        "duration": duration, "completed": len(good), "failed": len(requests) - len(good),
        "total_input_tokens": prompt, "total_output_tokens": new,
        "request_throughput": per_second(len(good), duration), "output_throughput": per_second(new, duration),
        "total_token_throughput": per_second(prompt + new, duration),
        "max_output_tokens_per_s": vllm_peak_tokens(good), "max_concurrent_requests": vllm_peak_requests(good),
    }  # fmt: skip
    tpots = [tpot for request in good if (tpot := vllm_tpot(request)) is not None]
    itls = [itl for request in good for itl in vllm_itls(request)]
    found |= vllm_statistics("ttft", [vllm_ttft(request) for request in good], percentiles)
    found |= vllm_statistics("tpot", tpots, percentiles)
    found |= vllm_statistics("itl", itls, percentiles)
    return found | vllm_statistics("e2el", [vllm_e2el(request) for request in good], percentiles)


def vllm_duration(requests: Sequence[Request], begin_s: float) -> float:
    """Start of the run to the end of the last request, failed or not (serve.py). Ours: a steady window."""
    return max((request["end"] for request in requests), default=begin_s) - begin_s


def vllm_statistics(name: str, seconds: Samples, percentiles: Samples) -> dict[str, float]:
    """Mean, median, std (of n) and percentiles, between neighbours by a line (serve.py). Ours: order statistics."""
    ms = 1000 * np.array(seconds if len(seconds) else [0.0])
    found = {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": np.median(ms), f"std_{name}_ms": ms.std()}
    found |= {f"p{p:g}_{name}_ms": np.percentile(ms, p) for p in percentiles}
    return {key: float(value) for key, value in found.items()}


def vllm_peak_tokens(good: Sequence[Request]) -> float:
    """Most events in a whole second after the first send, one token each (serve.py). Ours: no such figure."""
    if not good:
        return 0.0
    start = min(request["sent"] for request in good)
    seconds = [int(moment - start) for request in good for moment in vllm_times(request)]
    return float(np.bincount(seconds).max())


def vllm_peak_requests(good: Sequence[Request]) -> int:
    """Most requests that touch one second, even one after the other (serve.py). Ours: mean of those in flight."""
    if not good:
        return 0
    start = min(request["sent"] for request in good)
    spans = [(int(request["sent"] - start), int(vllm_times(request)[-1] - start)) for request in good]
    return int(np.bincount([second for first, last in spans for second in range(first, last + 1)]).max())


# ---- guidellm: one request


def guidellm_tokens(request: Request) -> int:
    """completion_tokens of usage, else chunks with text (request_stats.py). Ours: ids, usage, then chunks."""
    by_chunks = len(request["chunks"])
    return (request["new_tokens"] or by_chunks) if request["ok"] else by_chunks


def guidellm_ttft(request: Request) -> float | None:
    """First text - first byte sent (request_stats.py); none without one. Ours: first text - due."""
    return request["chunks"][0][0] - request["sent"] if request["chunks"] else None


def guidellm_latency(request: Request) -> float:
    """End of the answer, [DONE] and all, - first byte sent (request_stats.py). Ours: last text - due."""
    return request["end"] - request["sent"]


def guidellm_tpot(request: Request) -> tuple[float, float]:
    """(last text - sent) / tokens, prefill within; weight: tokens (request_stats.py). Ours: without the first token."""
    last = request["chunks"][-1][0] if request["chunks"] else request["end"]
    tokens = guidellm_tokens(request)
    return ((last - request["sent"]) / tokens, tokens) if tokens else (0.0, 0.0)


def guidellm_itl(request: Request) -> tuple[float, float]:
    """(last - first text) / (tokens - 1), weight: tokens - 1 (request_stats.py). Ours: that is TPOT, unweighted."""
    tokens, chunks = guidellm_tokens(request), request["chunks"]
    return ((chunks[-1][0] - chunks[0][0]) / (tokens - 1), tokens - 1) if chunks and tokens > 1 else (0.0, 0.0)


# ---- guidellm: a run


def as_guidellm(requests: Sequence[Request]) -> dict[str, float]:
    """The figures of a guidellm benchmark, by their paths in "metrics" of its result file.

    Latencies are those of successful requests, which its console shows; rates and concurrency are of all and of these.
    """
    good = [request for request in requests if request["ok"]]
    begin = min((request["sent"] for request in requests), default=0.0)  # first byte of the first request
    end = max((request["end"] for request in requests), default=begin)
    found: dict[str, float] = {
        "request_totals.successful": len(good), "request_totals.errored": len(requests) - len(good),
        "request_totals.total": len(requests),
    }  # fmt: skip
    for name, values in guidellm_latencies(good).items():
        found |= guidellm_summary(f"{name}.successful", values)
    for status, group in (("successful", good), ("total", requests)):
        found |= guidellm_rates(status, group, end - begin)
        found |= guidellm_concurrency(f"request_concurrency.{status}", group, begin, end)
    return found


def guidellm_latencies(good: Sequence[Request]) -> dict[str, list[tuple[float, float]]]:
    """(value, weight) of every successful request; only TPOT and ITL are weighted by tokens (metrics.py)."""
    streamed = [request for request in good if request["chunks"]]
    return {
        "request_latency": [(guidellm_latency(request), 1.0) for request in good],  # the only one in seconds
        "time_to_first_token_ms": [(1000 * guidellm_ttft(request), 1.0) for request in streamed],
        "time_per_output_token_ms": [(1000 * value, weight) for value, weight in map(guidellm_tpot, good)],
        "inter_token_latency_ms": [(1000 * value, weight) for value, weight in map(guidellm_itl, streamed)],
    }


def guidellm_rates(status: str, group: Sequence[Request], seconds: float) -> dict[str, float]:
    """Sums / (first send to last end) (metrics.py, since 0.8; before, first to last token). Ours: a steady window."""
    sums: dict[str, Callable[[Request], float]] = {
        "requests_per_second": lambda request: 1,  # noqa: ARG005
        "prompt_tokens_per_second": lambda request: request["prompt_tokens"] or 0,
        "output_tokens_per_second": guidellm_tokens,
        "tokens_per_second": lambda request: (request["prompt_tokens"] or 0) + guidellm_tokens(request),
    }
    return {f"{name}.{status}.mean": per_second(sum(map(one, group)), seconds) for name, one in sums.items()}


def guidellm_summary(name: str, weighted: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Least value whose share of the weight reaches p (statistics.py). Ours: the same with one weight for all."""
    kept = sorted((value, weight) for value, weight in weighted if weight > 0)
    values, weights = np.array(kept or [(0.0, 1.0)]).T
    shares = weights / weights.sum()
    mean, reached = float(values @ shares), np.cumsum(shares)
    places = {key: min(int(np.searchsorted(reached, p)), len(values) - 1) for key, p in GUIDELLM_PERCENTILES.items()}
    found = {f"{name}.percentiles.{key}": float(values[place]) for key, place in places.items()}
    return found | {
        f"{name}.mean": mean, f"{name}.median": found[f"{name}.percentiles.p50"],
        f"{name}.std_dev": float(np.sqrt(((values - mean) ** 2) @ shares)),
        f"{name}.min": float(values[0]), f"{name}.max": float(values[-1]),
    }  # fmt: skip


def guidellm_concurrency(name: str, group: Sequence[Request], begin: float, end: float) -> dict[str, float]:
    """In flight from sent to end, weighted by time, first send to last end (statistics.py). Ours: in the window."""
    changes = sorted([(one["sent"], 1) for one in group] + [(one["end"], -1) for one in group] + [(begin, 0), (end, 0)])
    level, levels = 0, []
    for (before, change), (after, _) in pairwise(changes):
        level += change
        levels.append((float(level), after - before))
    summary = guidellm_summary(name, levels)
    return {f"{name}.{what}": summary[f"{name}.{what}"] for what in ("mean", "median")}


def per_second(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
