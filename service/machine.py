"""How much of the machine is in use: memory and the device, read where the operating system says it."""

import contextlib
import sys
from pathlib import Path

import psutil

from weights.room import GROUPS, OWN, tightest

PROCESS = psutil.Process()


def memory_share(root: Path = GROUPS, own: Path = OWN) -> float:
    """Used, of what this process may use: of its control groups where one has a limit, and of the machine."""
    return tightest(root, own).share


def device_memory() -> dict[str, int]:
    """Bytes by kind: of this process, of the machine, and of a GPU where torch has one."""
    found = {"process_resident": PROCESS.memory_info().rss, "machine_available": psutil.virtual_memory().available}
    torch = sys.modules.get("torch")  # never loaded for this
    if torch is not None and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"gpu_used": total - free, "gpu_total": total, "gpu_allocated": torch.cuda.memory_allocated()}
    return found


def device_busy() -> float:
    """From 0 to 1: the GPU's own figure where there is one, else this process's share of the cores since last time."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with contextlib.suppress(Exception):  # the driver may not tell
            return torch.cuda.utilization() / 100
    return PROCESS.cpu_percent() / 100 / psutil.cpu_count()
