"""How much of the machine is in use: memory and the device, read where the operating system says it."""

import contextlib
import sys
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # version 2
OWN_GROUP = Path("/proc/self/cgroup")
PROCESS = psutil.Process()


def memory_share(root: Path = CGROUP, own: Path = OWN_GROUP) -> float:
    """Used, of what there is: of the control group where one has a limit, else of the machine.

    File contents that the kernel keeps as long as nobody needs the space are not used memory.
    """
    for group in groups(root, own):
        with contextlib.suppress(OSError, ValueError, KeyError):
            most = (group / "memory.max").read_text().strip()
            if most != "max":
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                return (int((group / "memory.current").read_text()) - int(stat["inactive_file"])) / int(most)
    return psutil.virtual_memory().percent / 100


def groups(root: Path, own: Path) -> list[Path]:
    """This process's control group and those around it, the nearest first.

    A systemd unit's limit is in a group of its own, far below the root; a container sees its own group as the root.
    """
    names: list[str] = []
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in own.read_text().splitlines() if line.startswith("0::"))
        names = [name for name in line.removeprefix("0::").split("/") if name]
    return [root.joinpath(*names[:depth]) for depth in range(len(names), -1, -1)]


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
