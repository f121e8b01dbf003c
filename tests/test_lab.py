"""Card, ceilings, sampler, breakdown: they read the real machine, so the tests ask for meaning, not for values."""

import json
import time
from collections import namedtuple

import numpy as np
import pytest
import torch

from lab import card, ceilings, roofline
from lab.breakdown import PARTS, breakdown, by_part, hooked, parts_of, profiled
from lab.breakdown_report import sentence, tables
from lab.fits import line
from lab.sampler import Sampler, Usage, process_age_s
from model import decode_step, ids_tensor, prefill

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


# ---- card


def test_every_item_of_the_card_is_readable_or_says_that_it_is_not(monkeypatch):
    whole = card.hardware_card(CPU)
    assert {"CPU", "Cores", "Threads in use", "Caches", "RAM", "GPU", "Versions", "Commit", "Load average"} <= set(
        whole
    )
    assert all(value.strip() for value in whole.values())
    monkeypatch.setattr(card, "read", lambda _: None)
    monkeypatch.setattr(card, "command", lambda *_: "")
    blind = card.hardware_card(CPU)
    assert blind["Caches"] == card.UNREADABLE
    assert blind["Instruction sets"].startswith(card.UNREADABLE)
    assert blind["Commit"] == "not readable (no git checkout)"


def test_the_card_reads_what_the_kernel_writes(monkeypatch):
    files = {
        "/proc/cpuinfo": "processor: 0\nmodel name\t: Some CPU\ncpu family : 6\nmodel : 143\n"
        "flags: fpu avx2 avx512f hypervisor\n\nprocessor: 1\nmodel name: Other\n",
        "/sys/fs/cgroup/cpu.max": "150000 100000",
        "/sys/fs/cgroup/memory.max": "8000000000",
    }
    monkeypatch.setattr(card, "read", lambda path: files.get(str(path)))
    assert card.cpu_model() == "Some CPU (cpu family 6, model 143)"
    assert card.isa() == "avx2 avx512f"
    assert (card.cpu_limit(), card.memory_limit()) == (
        ", limited to 1.5 by the container",
        ", limited to 8.0 GB by the container",
    )
    files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert (card.cpu_limit(), card.virtualisation()) == ("", "virtual machine")


# ---- roofline and ceilings


def test_the_floor_of_a_phase_is_its_higher_wall():
    low = roofline.floor(flops=2_000, read_bytes=300, flops_per_s=1_000, bytes_per_s=100)
    assert (low.compute_s, low.memory_s, low.least_s, low.wall) == (2.0, 3.0, 3.0, "memory")
    assert roofline.floor(4_000, 300, 1_000, 100).wall == "compute"
    assert roofline.of_ceiling(work=50, seconds=2, per_s=100) == 0.25


def test_more_than_a_ceiling_is_called_impossible():
    assert roofline.impossible({"decode MBU": 0.99}) is None
    assert "decode MBU 104%" in roofline.impossible({"decode MBU": 1.04, "prefill MFU": 0.5})


def test_ceilings_are_kept_per_machine_and_measured_anew_on_demand(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_INFER_CACHE", str(tmp_path))
    measured: list[float] = []

    def fake(_device):
        measured.append(1.0)
        return ceilings.Ceilings(1e9 * len(measured), {"float32": 1e10}, {"float32": 512})

    monkeypatch.setattr(ceilings, "measure", fake)
    first = ceilings.kept(CPU, "machine A")
    assert ceilings.kept(CPU, "machine A") == first and len(measured) == 1
    assert ceilings.kept(CPU, "machine B") != first
    assert ceilings.kept(CPU, "machine A") == first  # B's value did not replace A's
    assert ceilings.kept(CPU, "machine A", recalibrate=True).bytes_per_s == 3e9
    for broken in ("", "[]", '{"v3 cpu machine A": {"nonsense": 1}}'):
        (tmp_path / "ceilings.json").write_text(broken)
        ceilings.kept(CPU, "machine A")
        assert json.loads((tmp_path / "ceilings.json").read_text())
    assert len(measured) == 6


def test_bandwidth_counts_each_byte_once(monkeypatch):
    """A probe that read twice, or half, would move every share of a ceiling."""
    probe = ceilings.Probe(CPU, size=8 << 20)
    assert sum(part.nbytes for part in probe.parts) == probe.data.nbytes == 8 << 20
    assert np.shares_memory(probe.parts[0], probe.data)
    monkeypatch.setattr(ceilings, "times_s", lambda call, repeats: [call() or 0.5] * repeats)
    assert probe.bytes_per_s(repeats=3) == (8 << 20) / 0.5


def test_a_busy_moment_does_not_lower_the_matrix_ceiling(monkeypatch):
    """At the first, small size every product but one was held up; the search stopped there, 70 times too low."""
    clock = {256: [16e-3] * 4 + [2.4e-4], 512: [2e-3] * 5, 1024: [15e-3] * 5, 2048: [0.12] * 5}
    sizes = iter(sorted(clock))
    monkeypatch.setattr(ceilings, "times_s", lambda call, **_: call() is None or clock[next(sizes)])
    rate, size = ceilings.gemm_rate(CPU, torch.float32)
    assert (rate, size) == (2 * 1024**3 / 15e-3, 1024)


def test_the_anchor_is_short_and_reads_both_ceilings():
    now = ceilings.Probe(CPU, size=64 << 20).anchor(torch.float32, 512)
    assert 1e8 < now.bytes_per_s < 1e13 and 1e8 < now.flops_per_s < 1e15
    assert now.seconds == pytest.approx((64 << 20) / now.bytes_per_s + 2 * 512**3 / now.flops_per_s)


# ---- sampler


def test_the_sampler_sees_a_busy_core_and_memory_that_was_taken():
    usage = Usage()
    with Sampler(usage, interval_s=0.02):
        block = np.ones(100 << 20, np.uint8)
        end = time.perf_counter() + 0.4
        while time.perf_counter() < end:
            block[: 1 << 16].sum()
    found = usage.summary()
    assert found["cpu_cores_mean"] > 0.3
    assert found["rss_peak_bytes"] > block.nbytes
    assert found["samples"] >= 5


def test_a_gpu_is_sampled_through_its_driver_and_its_absence_has_a_reason(monkeypatch):
    Memory = namedtuple("Memory", "used")
    Rates = namedtuple("Rates", "gpu")

    class Driver:
        closed = 0

        class NVMLError(Exception):
            pass

        nvmlDeviceGetUtilizationRates = staticmethod(lambda _: Rates(80))
        nvmlDeviceGetMemoryInfo = staticmethod(lambda _: Memory(5_000))

        def nvmlDeviceGetPowerUsage(self, _: str) -> int:
            raise self.NVMLError("not supported")  # as virtual and partitioned GPUs answer

        def nvmlShutdown(self) -> None:
            Driver.closed += 1

    usage = Usage()
    monkeypatch.setattr("lab.sampler.open_gpu", lambda _: (Driver(), "handle", None))
    with Sampler(usage, "GPU-1", interval_s=0.01):
        time.sleep(0.05)
    found = usage.summary()
    assert (found["gpu_percent_mean"], found["gpu_watts_mean"], found["gpu_peak_bytes"]) == (80.0, None, 5000)
    assert Driver.closed == 1
    empty = Usage(gpu_missing="no driver").summary()
    assert (empty["gpu_percent_mean"], empty["gpu_missing"]) == (None, "no driver")  # missing is never 0


def test_the_age_of_a_process_grows_as_the_clock_does():
    before, start = process_age_s(), time.perf_counter()
    time.sleep(0.05)
    assert process_age_s() - before == pytest.approx(time.perf_counter() - start, abs=0.03)
    assert before > 0


# ---- breakdown


def test_every_part_of_both_families_is_found_once(any_model):
    parts = list(parts_of(any_model.net).values())
    layers = any_model.heads[0]
    assert (parts.count("attention"), parts.count("MLP"), parts.count("head")) == (layers, layers, 1)
    assert parts.count("norms") == 2 * layers + 1
    assert parts.count("embedding") == 2  # tokens, and positions (learned, or rotary)


def test_parts_add_up_to_the_phase_and_hooks_are_gone_afterwards(any_model):
    ids = ids_tensor([[1, 2, 3, 4]])
    with hooked(any_model.net, CPU) as marks:
        start = time.perf_counter()
        seconds, (token, _) = by_part(marks, lambda: prefill(any_model, ids))
        whole = time.perf_counter() - start
    assert set(seconds) == set(PARTS)
    assert all(value >= 0 for value in seconds.values())
    assert 0.3 * whole < sum(seconds.values()) <= whole
    assert token.item() == prefill(any_model, ids)[0].item()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in any_model.net.modules())


@pytest.mark.parametrize(("name", "part"), [("mlp", "MLP"), ("self_attn", "attention"), ("input_layernorm", "norms")])
def test_a_part_that_is_made_slow_is_the_one_that_is_blamed(llama, monkeypatch, name, part):
    module = getattr(llama.net.model.layers[0], name)
    real = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **more: time.sleep(0.5) or real(*args, **more))
    with hooked(llama.net, CPU) as marks:
        seconds, _ = by_part(marks, lambda: prefill(llama, ids_tensor([[1, 2]])))
    assert seconds[part] > 0.5 > sum(seconds.values()) - seconds[part]


def test_the_breakdown_prints_parts_the_price_of_looking_and_operators(any_model, tmp_path):
    ids, trace = ids_tensor([[1, 2, 3, 4]]), tmp_path / "trace.json"
    first, step = (lambda: prefill(any_model, ids)), (lambda state: decode_step(any_model, *state))
    phases = breakdown(any_model.net, CPU, first, step, 3, range(2))
    operators = profiled(CPU, first, step, 3, str(trace))
    text = tables({"phases": phases, "operators": operators, "steps": 3, "trace": str(trace)})
    for word in (*PARTS, "total", "aten::", "with hooks", "open it in https://ui.perfetto.dev"):
        assert word in text
    assert len(phases["decode"]["plain_s"]) == len(phases["decode"]["hooked_s"]) == 2
    weights = phases["decode"]["weight_bytes"]
    assert sum(weights.values()) == pytest.approx(any_model.read_bytes(1, 0), rel=0.02)


def test_the_breakdown_blames_kernels_or_framework_by_the_numbers():
    """100 MB of weights: read in 50 of 60 ms that is 2 of 20 GB/s; in 8 of 60 ms the framework is what is left."""
    sizes = dict.fromkeys(PARTS, 0) | {"MLP": 100_000_000}

    def told(mlp: float, framework: float, plain: float = 1.0) -> str:
        parts = dict.fromkeys(PARTS, 0.0) | {"MLP": mlp, "framework": framework}
        decode = {"parts_s": parts, "weight_bytes": sizes, "hooked_s": [1.0] * 6, "plain_s": [plain] * 6}
        return sentence({"phases": {"decode": decode}}, bytes_per_s=20e9)

    assert "take 83% of a step and read them at 2.0 of 20.0 GB/s" in told(0.05, 0.01)
    assert told(0.05, 0.01).endswith("So it is the kernels: they read far below what this machine can.")
    assert "So it is the framework" in told(0.008, 0.052)
    assert told(0.006, 0.002).endswith("No single part is to blame.")
    assert told(0.05, 0.01, plain=0.5).endswith("no verdict, run it again.")
    assert sentence({"phases": {}}, 1.0) is None


def test_the_trace_is_what_perfetto_reads(any_model, tmp_path):
    trace = tmp_path / "trace.json"
    ids = ids_tensor([[1, 2, 3, 4]])
    profiled(CPU, lambda: prefill(any_model, ids), lambda state: decode_step(any_model, *state), 2, str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"prefill", "decode step 1", "decode step 2"} <= names


# ---- fits


def test_a_line_through_points_on_a_line_is_that_line():
    fit = line([1, 2, 4], [5, 7, 11])
    assert (fit.start, fit.slope) == (pytest.approx(3), pytest.approx(2))
    with pytest.raises(ValueError, match="two places"):
        line([3, 3, 3], [1, 2, 3])
