"""Small measurements beside the formulas: memory as it really grows, reserving against blocks, attention's share."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from lab.breakdown import profiled
from lab.kv_ledger import in_blocks
from lab.prompts import lengths as mixed_lengths
from metrics import synchronize

CACHES = 4  # held at once, so that their bytes stand out from the allocator's own
REQUESTS = 16
STEPS, PROFILES = 6, 3  # the median of some profiles: a short one can meet a busy moment


def held_bytes(device: torch.device) -> int:
    """Memory that this process holds for data: the GPU allocator's count, else anonymous resident memory.

    RssAnon counts whole pages (4 KiB), and pages that the C library keeps for later stay counted.
    """
    if device.type == "cuda":
        synchronize()
        return torch.cuda.memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss


def free_bytes(device: torch.device) -> int:
    """What is free for caches: GPU memory, or the RAM that is available without swapping."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available


def growth(
    prefill: Callable[[torch.Tensor], tuple[Any, Any]],
    ids: torch.Tensor,
    cache_bytes: Callable[[Any], int],
    device: torch.device,
) -> dict[str, int]:
    """Hold a few caches of one prompt: what their tensors say, and what the process really grew by."""
    prefill(ids)  # the first pass takes scratch memory that is kept for the next ones
    gc.collect()
    before = held_bytes(device)
    held = [prefill(ids)[1] for _ in range(CACHES)]
    gc.collect()
    grew = held_bytes(device) - before
    return {
        "caches": CACHES,
        "tokens": ids.shape[1] * CACHES,
        "tensor_bytes": sum(map(cache_bytes, held)),
        "grew_bytes": grew,
    }


def reserved(model: Any, prompt_lens: Sequence[int], new_tokens: int) -> dict[str, int]:
    """Reserve for a mix of requests: the longest for all, or blocks for each. Both are really taken and touched."""
    longest = max(prompt_lens) + new_tokens
    each = model.kv_bytes_per_token()
    tokens = mixed_lengths("mixed", longest, REQUESTS)
    found = {"requests": REQUESTS, "longest": longest, "used": sum(tokens) * each}
    for name, sizes in (("maximum", [longest] * REQUESTS), ("blocks", list(map(in_blocks, tokens)))):
        gc.collect()
        before = held_bytes(model.device)
        held = [torch.ones(size * each, dtype=torch.uint8, device=model.device) for size in sizes]
        found[name] = held_bytes(model.device) - before
        found[f"{name}_formula"] = sum(sizes) * each
        del held
    return found


def attention_share(
    device: torch.device,
    prefill: Callable[[torch.Tensor], tuple[Any, Any]],
    decode_step: Callable[[Any, Any], tuple[Any, Any]],
    ids: torch.Tensor,
) -> dict[str, float]:
    """The share of attention proper (scores, softmax, weighted sum; not its projections) in a prefill and a step."""
    state = decode_step(*prefill(ids))
    found: dict[str, list[float]] = {"prefill": [], "decode": [], "copying": []}
    for _ in range(PROFILES):
        first = profiled(device, lambda: prefill(ids), lambda state: state, 0, None)
        steps = profiled(device, lambda: state, lambda _: decode_step(*state), STEPS, None)
        found["prefill"].append(share_of(first, ATTENTION))
        found["decode"].append(share_of(steps, ATTENTION))
        found["copying"].append(share_of(steps, COPYING))
    return {"tokens": ids.shape[1]} | {name: median(shares) for name, shares in found.items()}


# aten::bmm and softmax are eager attention's own operators; the fused kernels carry attention in their names.
ATTENTION = ("attention", "softmax", "baddbmm", "bmm")
COPYING = ("aten::cat", "aten::copy_", "aten::clone")


def share_of(rows: list[dict], operators: tuple[str, ...]) -> float:
    """The part of the time spent in operators whose names hold one of these words."""
    whole = sum(row["own_s"] for row in rows)
    return sum(row["own_s"] for row in rows if any(word in row["operator"] for word in operators)) / whole
