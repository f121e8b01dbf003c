"""How much memory this process may use, and how much of that is used: by its control groups or the machine.

A control group's limit counts wherever it is set: at the group itself or at one of those above it. Version 2 and 1 are
read, whichever has the memory here; without either, the machine is the limit.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Room:
    """Bytes. used: without file contents that the kernel keeps only as long as nobody needs the space."""

    used: int
    most: int
    whose: str

    @property
    def share(self) -> float:
        return self.used / self.most

    @property
    def free(self) -> int:
        return max(self.most - self.used, 0)


def rooms(groups: Path = GROUPS, own: Path = OWN) -> list[Room]:
    """All limits that there are; the machine's own is always among them."""
    memory = psutil.virtual_memory()
    found = [Room(memory.total - memory.available, memory.total, "the machine")]
    for folder, names in folders(groups, own):
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such group, or none with a limit
            room = room_of(folder, *names)
            if room.most < memory.total:  # version 1 says "none" as a very large number
                found.append(room)
    return found


def tightest(groups: Path = GROUPS, own: Path = OWN) -> Room:
    """The limit that will be met first: of the control groups, or of the machine where those have none. On a machine
    that is full of others' work there may still be all that was promised to this process.
    """
    machine, *own_limits = rooms(groups, own)
    return max(own_limits, key=lambda room: room.share, default=machine)


def folders(groups: Path, own: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The groups that this process is in, from its own up, each with the names of its files."""
    lines = own.read_text().splitlines() if own.exists() else []
    for line in lines or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):  # in a container the path may be the host's: its root is seen then
            yield root / folder, names


def room_of(folder: Path, limit: str, usage: str, idle: str) -> Room:
    """ValueError for "max": no limit."""
    most, used = (int((folder / name).read_text()) for name in (limit, usage))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return Room(max(used - int(stat[idle]), 0), most, f"the control group {folder}")
