"""Short of memory: what is given back first, who is refused then, and how that ends by itself.

From the lower mark on, connections are not kept after their answer, and what nobody needs goes back to the system:
garbage, the allocator's reserves, keys and values that no request holds. From the upper mark on nobody new is let in;
who is inside is served. Each mark is left at a lower share than it was met, so that nothing opens and shuts all the
time. The kernel's own remedy would be to kill the process.

The allocator's reserves go back once a minute in any case: between objects that stay, small holes add up over hundreds
of thousands of requests, and look like a leak.
"""

import contextlib
import ctypes
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from config import UserError
from engine.kv_blocks import BLOCK
from weights.room import Room

LOG = logging.getLogger(__name__)
AGAIN_S = 10.0  # between two times of giving back, while it lasts
TRIM_S = 60.0  # between two times that the allocator's reserves are given back, however much memory there is


class Pressure(Enum):
    """met: the share of memory from which on it is so. left: below which it is over."""

    EASY = (0.0, 0.0)
    TIGHT = (0.92, 0.90)
    SHORT = (0.95, 0.92)

    @property
    def met(self) -> float:
        return self.value[0]

    @property
    def left(self) -> float:
        return self.value[1]


WORDS = {
    Pressure.EASY: "there is enough memory again",
    Pressure.TIGHT: "memory is tight: connections are not kept, and what can be spared is given back",
    Pressure.SHORT: "memory is short: nobody new is let in",
}


class MemoryGuard:
    """used: the share of the memory there is. givers: what gives something back; each is called when it gets tight.
    trim: what is called every minute.
    """

    def __init__(
        self, used: Callable[[], float], clock: Callable[[], float], givers: list[Callable[[], object]] | None = None,
        trim: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        self.used, self.clock, self.trim = used, clock, trim or trim_allocator
        self.givers = [collect_and_trim] if givers is None else givers
        self.pressure, self.share = Pressure.EASY, 0.0
        self.gave_s, self.trimmed_s = float("-inf"), clock()

    @property
    def tight(self) -> bool:
        return self.pressure is not Pressure.EASY

    def look(self) -> Pressure:
        """How it is now. Gives back while it is tight."""
        self.share, before = self.used(), self.pressure
        met = [one for one in Pressure if self.share >= (one.left if self.at_least(one) else one.met)]
        self.pressure = met[-1]
        if self.pressure is not before:
            LOG.warning("%s (%.0f %% used)", WORDS[self.pressure], 100 * self.share)
        if self.tight and self.clock() - self.gave_s >= AGAIN_S:
            self.gave_s = self.clock()
            for give_back in self.givers:
                give_back()
        if self.clock() - self.trimmed_s >= TRIM_S:
            self.trimmed_s = self.clock()
            self.trim()
        return self.pressure

    def at_least(self, pressure: Pressure) -> bool:
        return self.pressure.met >= pressure.met


def collect_and_trim() -> None:
    gc.collect()
    trim_allocator()


def trim_allocator() -> None:
    """The C library's reserves go back to the system, in well under a millisecond (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def check_room(found: Sequence[Room], pool_bytes: int) -> str | None:
    """A warning, or None when all is well. UserError when it can only end badly.

    found: the limits, with the weights loaded. pool_bytes: what keys and values take besides; prompts fill it bit by
    bit, and it stays full: the process grows by so much.
    """
    room = max(found, key=lambda one: (one.used + pool_bytes) / one.most)
    will, spare = room.used + pool_bytes, max(Pressure.TIGHT.left * room.most - room.used, 0)
    if will < Pressure.TIGHT.met * room.most:
        return None
    what = (
        f"{room.used / 1e9:.2f} GB are used with the weights loaded, keys and values may take {pool_bytes / 1e9:.2f} "
        f"GB more, and {room.whose} has {room.most / 1e9:.2f} GB"
    )
    advice = f"--kv-memory {spare / 1e9:.2f} would be safe" if spare else "give it more memory"
    if will > room.most:
        raise UserError(f"{what}: {advice}.")
    return f"{what}: nobody would be let in once they are full; {advice}."


def pool_bytes(about: Mapping[str, Any]) -> int:
    """What keys and values take of this machine's memory when every block is full."""
    return about["kv_blocks"] * BLOCK * about["kv_bytes_per_token"] if about["device"] == "cpu" else 0
