"""Small measurements beside the formulas: memory as it really grows, reserving against blocks, attention's share."""

import contextlib
import ctypes
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
SHARE = 0.25  # of the free memory: the most that a probe may take
STEPS, PROFILES = 4, 3  # the median of some profiles: a short one can meet a busy moment
LINUX = Path("/proc/self")


def status_bytes(field: str) -> int:
    """A field of /proc/self/status; OSError where there is none."""
    for line in (LINUX / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} here")


def trim() -> None:
    """Give freed memory back to the system, or the next allocation would be served from it and not be seen."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def held_bytes(device: torch.device) -> int:
    """Memory that this process holds for data: the GPU allocator's count, else anonymous resident memory (RssAnon).

    RssAnon counts whole pages of 4 KiB; trim() first, or freed memory that the C library kept is in it.
    """
    if device.type == "cuda":
        synchronize()
        return torch.cuda.memory_allocated()
    try:
        return status_bytes("RssAnon")
    except OSError:
        return psutil.Process().memory_info().rss


class Peak:
    """with Peak(device) as peak: the most memory held inside, peak.whole in all and peak.above what was held before.

    CUDA: the allocator's. Linux: the kernel's own high-water mark of resident memory, set back at the start; None
    elsewhere. It is exact where a sampler would miss what lives shorter than its interval.
    """

    whole: int | None = None
    above: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __enter__(self) -> "Peak":
        self.before = None
        if self.cuda:
            synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError):
                (LINUX / "clear_refs").write_text("5")  # proc_pid_clear_refs(5)
                self.before = status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            self.whole = torch.cuda.max_memory_allocated() if self.cuda else status_bytes("VmHWM")
            self.above = self.whole - self.before


def free_bytes(device: torch.device) -> int:
    """What is free for caches: GPU memory, or the RAM that is available without swapping."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available


def growth(
    prefill: Callable[[torch.Tensor], tuple[Any, Any]],
    ids: torch.Tensor,
    cache_bytes: Callable[[Any], int],
    device: torch.device,
) -> dict[str, int] | None:
    """Hold a few caches of one prompt: what their tensors say, and what the process really grew by.

    None where so many would take more than a quarter of what is free.
    """
    size = cache_bytes(prefill(ids)[1])  # this pass also takes scratch memory that is kept for the next ones
    if CACHES * size > SHARE * free_bytes(device):
        return None
    trim()
    before = held_bytes(device)
    held = [prefill(ids)[1] for _ in range(CACHES)]
    trim()
    grew = held_bytes(device) - before
    return {"caches": CACHES, "tokens": ids.shape[1] * CACHES, "tensor_bytes": sum(map(cache_bytes, held)),
            "grew_bytes": grew}  # fmt: skip


def reserved(model: Any, prompt_lens: Sequence[int], new_tokens: int) -> dict[str, int] | None:
    """Reserve for a mix of requests: the longest for all, or blocks for each. Both are really taken and touched.

    None where that would take more than a quarter of what is free.
    """
    longest = max(prompt_lens) + new_tokens
    each = model.kv_bytes_per_token()
    if REQUESTS * longest * each > SHARE * free_bytes(model.device):
        return None
    tokens = mixed_lengths("mixed", longest, REQUESTS)
    found = {"requests": REQUESTS, "longest": longest, "used": sum(tokens) * each}
    for name, sizes in (("maximum", [longest] * REQUESTS), ("blocks", list(map(in_blocks, tokens)))):
        trim()
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
    room: int,
) -> dict[str, Any]:
    """The share of attention proper (scores, softmax, weighted sum; not its projections) in a prefill and a step.

    room: tokens that may follow the prompt; without any, the shares of a step are None.
    """
    token, cache = prefill(ids)
    first = profiled(device, lambda: prefill(ids), lambda state: state, 0, None)
    found = []
    for _ in range(PROFILES if room > 0 else 0):
        parts = step_parts(device, lambda: decode_step(token, cache), min(STEPS, room))
        found.append({name: seconds / sum(parts.values()) for name, seconds in parts.items()})
        cache.crop(ids.shape[1] - cache.get_seq_length())  # back to the prompt: every profile sees the same contexts
    decode, copying = (median(share[name] for share in found) if found else None for name in ("attention", "copying"))
    return {"tokens": ids.shape[1], "prefill": share_of(first, ATTENTION), "decode": decode, "copying": copying}


def step_parts(device: torch.device, step: Callable[[], Any], steps: int) -> dict[str, float]:
    """Where a decode step goes, in seconds by the profiler's operators: attention, copying and the rest."""
    rows = profiled(device, lambda: None, lambda _: step(), steps, None)
    each = sum(row["own_s"] for row in rows) / steps
    attention, copying = (share_of(rows, words) * each for words in (ATTENTION, COPYING))
    return {"attention": attention, "copying": copying, "rest": each - attention - copying}


# aten::bmm and softmax are eager attention's own operators; the fused kernels carry attention in their names.
ATTENTION = ("attention", "softmax", "baddbmm", "bmm")
COPYING = ("aten::cat", "aten::copy_", "aten::clone")


def share_of(rows: list[dict], operators: tuple[str, ...]) -> float:
    """The part of the time spent in operators whose names hold one of these words."""
    whole = sum(row["own_s"] for row in rows)
    return sum(row["own_s"] for row in rows if any(word in row["operator"] for word in operators)) / whole
