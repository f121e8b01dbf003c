"""The hardware card: on what a number was measured. What cannot be read says so; nothing is guessed."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from config import ROOT

if TYPE_CHECKING:  # a client of a service measures without it
    import torch

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "asimd", "bf16", "sve")
UNREADABLE = "not readable"


def machine_card() -> dict[str, str]:
    """Item -> value, both as printed, of a process that computes nothing itself."""
    return {
        "CPU": cpu_model(),
        "Cores": f"{psutil.cpu_count(logical=False) or '?'} physical, {os.cpu_count()} logical{cpu_limit()}",
        "RAM": f"{psutil.virtual_memory().total / 1e9:.1f} GB, {psutil.virtual_memory().available / 1e9:.1f} GB free"
        + memory_limit(),
        "GPU": gpu(None),
        "OS": f"{platform.system()} {platform.release()}, {virtualisation()}",
        "Load average": load(),
        "Versions": f"Python {platform.python_version()}, httptools {importlib.metadata.version('httptools')}",
        "Commit": commit(),
    }


def hardware_card(device: "torch.device") -> dict[str, str]:
    """Item -> value, both as printed. One factor each, so that two cards can be compared line by line."""
    import torch

    return {
        "CPU": cpu_model(),
        "Cores": f"{psutil.cpu_count(logical=False) or '?'} physical, {os.cpu_count()} logical{cpu_limit()}",
        "Threads in use": f"{torch.get_num_threads()} (PyTorch)",
        "Instruction sets": f"{isa()} (PyTorch uses {torch.backends.cpu.get_cpu_capability()})",
        "Caches": caches(),
        "RAM": f"{psutil.virtual_memory().total / 1e9:.1f} GB, {psutil.virtual_memory().available / 1e9:.1f} GB free"
        + memory_limit(),
        "GPU": gpu(device),
        **vram(device),
        "OS": f"{platform.system()} {platform.release()}, {virtualisation()}",
        "Load average": load(),
        "Versions": f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions().items()),
        "Commit": commit(),
    }


def machine_key(card: dict[str, str]) -> str:
    """What must be equal for a measured ceiling to hold."""
    return " | ".join([card["CPU"], card["Cores"], card["Threads in use"], card["GPU"], card["Versions"]])


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "torch" in found:
        import torch

        found["torch"] = torch.__version__  # with the build, such as +cpu
    return found


def cpu_model() -> str:
    info = cpuinfo()
    if info:
        name = info.get("model name") or info.get("CPU part") or platform.machine()
        numbers = [f"{key} {info[key]}" for key in ("cpu family", "model") if key in info]
        return f"{name} ({', '.join(numbers)})" if numbers else name
    return command("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or UNREADABLE


def isa() -> str:
    info = cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return " ".join(flag for flag in ISA if flag in flags) or UNREADABLE


def cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    text = read("/proc/cpuinfo")
    lines = [line.split(":", 1) for line in (text or "").split("\n\n")[0].splitlines() if ":" in line]
    return {key.strip(): value.strip() for key, value in lines}


def caches() -> str:
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (read(index / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found) or UNREADABLE


def cpu_limit() -> str:
    """The container's CPU quota (cgroup v2), which nproc does not show."""
    quota = (read("/sys/fs/cgroup/cpu.max") or "").split()
    return (
        f", limited to {int(quota[0]) / int(quota[1]):.1f} by the container" if quota[:1] not in ([], ["max"]) else ""
    )


def memory_limit() -> str:
    limit = read("/sys/fs/cgroup/memory.max")
    return f", limited to {int(limit) / 1e9:.1f} GB by the container" if limit and limit != "max" else ""


def gpu(device: "torch.device | None") -> str:
    if device is not None and device.type == "mps":
        import torch

        return f"Apple GPU through MPS, memory shared with the CPU ({torch.mps.recommended_max_memory() / 1e9:.0f} GB)"
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = gpu_uuid(device) if device is not None else None
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        text = (
            f"{pynvml.nvmlDeviceGetName(handle)}, {memory.total / 1e9:.0f} GB VRAM, "
            f"driver {pynvml.nvmlSystemGetDriverVersion()}"
        )
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return f"none ({error})"
    return text + ("" if device is None or device.type == "cuda" else ", not used by this run")


def vram(device: "torch.device") -> dict[str, str]:
    import torch

    return {"VRAM free": f"{torch.cuda.mem_get_info()[0] / 1e9:.1f} GB"} if device.type == "cuda" else {}


def gpu_uuid(device: "torch.device") -> str | None:
    """By what the driver knows the GPU that torch uses: its own numbering ignores CUDA_VISIBLE_DEVICES."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def virtualisation() -> str:
    return "virtual machine" if "hypervisor" in cpuinfo().get("flags", "").split() else "no hypervisor seen"


def load() -> str:
    try:
        return ", ".join(f"{value:.2f}" for value in os.getloadavg()) + " (1, 5, 15 min)"
    except OSError:
        return UNREADABLE


def commit() -> str:
    """The commit that ran, and whether files differed from it."""
    head = command("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return f"{UNREADABLE} (no git checkout)"
    # Records are appended to notes.md and results/ after they are measured: they are not part of what ran.
    changed = command("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!notes.md", ":!results")
    return head + (" + local changes" if changed else "")


def read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def command(*words: str) -> str:
    """What a command prints, or nothing when it cannot run."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
