"""Load records as load_test.py writes them, made by hand: every number of them is known."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from metrics import certified, percentile

CARD = {"CPU": "a processor", "Cores": "2 physical, 2 logical", "Threads in use": "2", "RAM": "25 GB", "GPU": "none",
        "Versions": "Python 3.11.7", "Commit": "abc123def456", "Load average": "0.1"}  # fmt: skip


def order_statistics(samples: Sequence[float]) -> dict[str, Any]:
    names = {f"p{p}": percentile(samples, p) for p in (50, 90, 95, 99)}
    sure = [f"p{p}" for p in (50, 90, 95, 99) if certified(len(samples), p)]
    return {"mean": mean(samples), **names, "max": max(samples), "n": len(samples), "certified": sure}


def request(i: int, due: float, ttft: float, tpot: float, tokens: int, queue: float | None = 0.01, **more) -> dict:
    chunks = [[due + ttft + k * tpot, 1] for k in range(tokens)]
    return {"i": i, "due": due, "sent": due + 0.001, "end": chunks[-1][0], "status": 200, "error": None, "ok": True,
            "chunks": chunks, "prompt_tokens": 128, "new_tokens": tokens, "counted_by": "ids", "queue": queue,
            "retries": 0, "conversation": None} | more  # fmt: skip


def run(concurrency: int = 4, ttft: float = 0.2, tpot: float = 0.05, tokens: int = 32, count: int = 8,
        queue: float | None = 0.01, **load) -> dict[str, Any]:  # fmt: skip
    """One closed-loop run in which every request is alike; with rate=… an open-loop run."""
    e2e = ttft + (tokens - 1) * tpot
    dues = [(i // concurrency) * e2e for i in range(count)]
    requests = [request(i, due, ttft, tpot, tokens, queue) for i, due in enumerate(dues)]
    wall = max(r["end"] for r in requests)
    at_once = None if "rate" in load else concurrency
    asked = {"kind": "closed", "concurrency": at_once, "rate": None, "arrival": None, "prompt_tokens": 128,
             "new_tokens": tokens, "requests": count}  # fmt: skip
    return {
        "load": asked | load,
        "requests": requests,
        "window": {"begin": 0.0, "end": wall, "class": "steady", "inside": count},
        "figures": {
            "ttft_s": order_statistics([ttft] * count), "tpot_s": order_statistics([tpot] * count),
            "itl_s": order_statistics([tpot] * count), "e2e_s": order_statistics([e2e] * count),
            "queue_s": None if queue is None else order_statistics([queue] * count),
            "schedule_delay_s": order_statistics([0.001] * count),
            "requests_per_s": count / wall, "output_tokens_per_s": count * tokens / wall,
            "prompt_tokens_per_s": count * 128 / wall, "goodput_per_s": None, "requested_rate": load.get("rate"),
            "achieved_rate": count / wall, "errors": {}, "retries": 0, "mean_in_flight": float(concurrency),
        },
        "laws": {"little": {"in_flight": 4.0, "throughput_x_latency": 4.0, "off": 0.0, "holds": True},
                 "tokens": {"holds": True}},
        "client": {"cpu_s": 0.8, "wall_s": wall},
        "server": {"cpu_s": 17.0, "rss_bytes": 1.2e9},
        "metrics": None,
    }  # fmt: skip


def record(runs: Sequence[dict], number: int = 1, about: dict | None = None, **more) -> dict[str, Any]:
    about = {"hash": "0123456789ab", "settings": {"max_running": 16}} if about is None else about
    return {
        "schema": 1, "id": f"load_test-261122-{number:06x}", "script": "load_test", "question": "service-baseline",
        "time": f"2026-11-22T10:{number % 60:02d}:00+0000", "command": "python3 load_test.py",
        "config": {"url": "http://127.0.0.1:8000", "seed": 0, "json": None}, "card": dict(CARD), "partial": False,
        "kind": "load", "server": {"url": "http://127.0.0.1:8000", "model": "smollm2", "kind": "llm-infer-baseline",
                                   "about": about},
        "prompt_set_hash": "aa11", "runs": list(runs), "verdicts": [],
    } | more  # fmt: skip
