"""Time by part of the network: embedding, attention, MLP, norms, head, sampling, and what is left for the framework.

Hooks at the borders of the parts read a clock. The rest of a forward pass (masks, cache bookkeeping, residual sums,
Python between the modules) belongs to no part and is shown as the framework's remainder. Runs with and without hooks
alternate, so that the price of looking is part of the answer.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from config import UserError
from metrics import synchronize

PARTS = ("embedding", "attention", "MLP", "norms", "head", "sampling", "framework")
NAMES = {
    "attention": ("attn", "attention"),
    "MLP": ("mlp", "feed_forward", "ffn", "moe", "fc"),
    "norms": ("norm", "ln_"),
}

Phase = Callable[[], Any]  # does the phase's work; what it returns is handed to the next phase


def parts_of(net: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """Each module whose time is a part's: the embeddings, the children of every layer, the last norm and the head."""
    config, found = net.config.get_text_config(), {}
    layers = next(m for m in net.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.num_hidden_layers)
    for child in (child for layer in layers for child in named_parts(layer)):
        found[child[1]] = child[0]
    inside = {m for layer in layers for m in layer.modules()}
    head = net.get_output_embeddings()
    for name, module in net.named_modules():
        if module in inside or module in found:
            continue
        if module is head:
            found[module] = "head"
        elif isinstance(module, torch.nn.Embedding) or name.endswith("rotary_emb"):
            found[module] = "embedding"
        elif "norm" in type(module).__name__.lower():
            found[module] = "norms"
    return found


def named_parts(layer: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, child in layer.named_children():
        part = next((part for part, words in NAMES.items() if any(word in name.lower() for word in words)), None)
        # A norm may be called post_attention_layernorm: its class tells better than its name.
        if "norm" in type(child).__name__.lower():
            part = "norms"
        if part:
            yield part, child


class Marks:
    """Clock readings at the borders of the parts, taken without making a GPU wait."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.pairs: list[tuple[str, Any, Any]] = []
        self.open: Any = None
        self.forward_end: Any = None

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start

    def enter(self, *_: object) -> None:
        self.open = self.now()

    def leave(self, part: str) -> Callable[..., None]:
        return lambda *_: self.pairs.append((part, self.open, self.now()))

    def leave_forward(self, *_: object) -> None:
        self.forward_end = self.now()


@contextmanager
def hooked(net: torch.nn.Module, device: torch.device) -> Iterator[Marks]:
    marks = Marks(device)
    handles = []
    for module, part in parts_of(net).items():
        handles += [module.register_forward_pre_hook(marks.enter), module.register_forward_hook(marks.leave(part))]
    handles.append(net.register_forward_hook(marks.leave_forward))
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def by_part(marks: Marks, phase: Phase) -> tuple[dict[str, float], Any]:
    """Run one phase under hooks: seconds per part, which add up to the phase's time, and what the phase returned."""
    marks.pairs.clear()
    synchronize()
    start = marks.now()
    result = phase()
    end = marks.now()
    synchronize()
    seconds = dict.fromkeys(PARTS, 0.0)
    for part, opened, closed in marks.pairs:
        seconds[part] += marks.between(opened, closed)
    seconds["sampling"] = marks.between(marks.forward_end, end)
    seconds["framework"] = marks.between(start, end) - sum(seconds.values())
    return seconds, result


def plain(phase: Phase) -> tuple[float, Any]:
    synchronize()
    start = time.perf_counter()
    result = phase()
    synchronize()
    return time.perf_counter() - start, result


def breakdown(
    net: torch.nn.Module,
    device: torch.device,
    prefill: Callable[[], Any],
    decode: Callable[[Any], Any],
    steps: int,
    rounds: Iterable[int],
) -> dict[str, dict]:
    """Mean seconds per part of the prefill and of a decode step, and both phases with and without hooks, by round.

    prefill() -> state; decode(state) -> state. steps: decode steps per round. Means, because they add up.
    """
    parts: dict[str, list[dict[str, float]]] = {"prefill": [], "decode": []}
    plain_s: dict[str, list[float]] = {"prefill": [], "decode": []}
    hooked_s: dict[str, list[float]] = {"prefill": [], "decode": []}

    def without_hooks() -> None:
        seconds, state = plain(prefill)
        plain_s["prefill"].append(seconds)
        each = []
        for _ in range(steps):
            seconds, state = plain(lambda state=state: decode(state))
            each.append(seconds)
        plain_s["decode"].append(sum(each))

    def with_hooks() -> None:
        with hooked(net, device) as marks:
            whole, (seconds, state) = plain(lambda: by_part(marks, prefill))
            parts["prefill"].append(seconds)
            hooked_s["prefill"].append(whole)
            each = []
            for _ in range(steps):
                whole, (seconds, state) = plain(lambda state=state: by_part(marks, lambda: decode(state)))
                parts["decode"].append(seconds)
                each.append(whole)
            hooked_s["decode"].append(sum(each))

    for number in rounds:
        for variant in (without_hooks, with_hooks) if number % 2 == 0 else (with_hooks, without_hooks):
            variant()
    weights = weight_bytes(net)
    return {
        phase: {
            "parts_s": {part: mean(seconds[part] for seconds in parts[phase]) for part in PARTS},
            "plain_s": plain_s[phase],
            "hooked_s": hooked_s[phase],
            "weight_bytes": weights,
        }
        for phase in parts
        if parts[phase]
    }


def weight_bytes(net: torch.nn.Module) -> dict[str, int]:
    """Bytes of the weights that a decode step reads in each part. An embedding gives one row only: not counted."""
    sizes = dict.fromkeys(PARTS, 0)
    for module, part in parts_of(net).items():
        if part != "embedding":
            sizes[part] += sum(p.numel() * p.element_size() for p in module.parameters())
    return sizes


def profiled(
    device: torch.device, prefill: Callable[[], Any], decode: Callable[[Any], Any], steps: int, trace: str | None
) -> list[dict]:
    """The operators of one prefill and some decode steps, slowest first: name, calls, seconds of their own.

    trace: a file for the timeline, which https://ui.perfetto.dev and chrome://tracing open. UserError if unwritable.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's library prints its own two lines on stderr
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        with record_function("prefill"):
            state = prefill()
        for number in range(steps):
            with record_function(f"decode step {number + 1}"):
                state = decode(state)
        synchronize()
    if trace:
        try:
            with tempfile.TemporaryDirectory() as folder:
                whole = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(whole))
                shutil.copyfile(whole, trace)  # the profiler itself would replace a device, and hide a failed write
        except (OSError, RuntimeError) as error:
            raise UserError(f"--trace {trace} cannot be written ({error}): give another file.") from error
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [e for e in profiler.key_averages() if e.key.startswith("aten::")]
    return [
        {"operator": e.key, "calls": e.count, "own_s": getattr(e, own) / 1e6}
        for e in sorted(events, key=lambda e: -getattr(e, own))
    ]
