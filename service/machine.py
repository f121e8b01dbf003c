"""How much of the machine is in use: memory and the device, read where the operating system says it."""

import contextlib
import sys
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # version 2
PROCESS = psutil.Process()


def memory_share(cgroup: Path = CGROUP) -> float:
    """Used, of what there is: of the control group where one has a limit, else of the machine.

    File contents that the kernel keeps as long as nobody needs the space are not used memory.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        most = (cgroup / "memory.max").read_text().strip()
        if most != "max":
            stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
            return (int((cgroup / "memory.current").read_text()) - int(stat["inactive_file"])) / int(most)
    return psutil.virtual_memory().percent / 100


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
