"""How many connections there may be, and which of them go when there are more.

Each holds a file and some memory, whatever it asks for. Those that wait for a next request go first, the longest idle
before the others; near the limit, and when memory is tight, none is kept after its answer. Only when all are at work is
a newcomer turned away, and told so.
"""

import resource
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from service.errors import ApiError

NEAR = 0.9  # of the limit: from there on no connection is kept after its answer
OTHER_FILES = 100  # what a service has open besides its connections
MOST_LINGERING = 100  # who were turned away, and wait until they have read why


class Guest(Protocol):
    def send_away(self) -> None: ...


class Connections:
    """most: how many. tight: whether none is to be kept, whatever their number."""

    def __init__(self, most: int, tight: Callable[[], bool] = lambda: False) -> None:
        self.most, self.tight = most, tight
        self.open: set[Guest] = set()
        self.idle: OrderedDict[Guest, None] = OrderedDict()  # the longest idle first
        self.refused = self.lingering = 0

    @property
    def kept(self) -> bool:
        """Whether a connection may stay after its answer."""
        return len(self.open) < NEAR * self.most and not self.tight()

    def come(self, guest: Guest) -> ApiError | None:
        """A new one, which has said nothing yet. What it is to be told when there is no room."""
        if len(self.open) >= self.most and self.idle:
            self.send_away(next(iter(self.idle)))
        if len(self.open) >= self.most:
            self.refused += 1
            return ApiError(
                503, "server_overloaded", f"The server holds as many connections as it may ({self.most}), all of them "
                "at work: try again later, and keep few connections for many requests.",
                retry=True, retry_after_s=1.0, details={"limit_hit": "connections", "connections": len(self.open)},
            )  # fmt: skip
        self.open.add(guest)
        self.idle[guest] = None
        return None

    def works(self, guest: Guest) -> None:
        """A request begins to arrive on it."""
        self.idle.pop(guest, None)

    def rests(self, guest: Guest) -> None:
        """It has its answer, and none is asked for."""
        if guest in self.open:
            self.idle[guest] = None
            self.idle.move_to_end(guest)

    def leave(self, guest: Guest) -> None:
        self.open.discard(guest)
        self.idle.pop(guest, None)

    def send_away(self, guest: Guest) -> None:
        self.leave(guest)  # at once: its end comes a turn of the loop later
        guest.send_away()

    def send_idle_away(self) -> None:
        for guest in list(self.idle):
            self.send_away(guest)


def enough_files(most: int) -> str | None:
    """Let this process open as many files as that takes; a warning where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + OTHER_FILES
    if soft < wanted and hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < most + OTHER_FILES:
        return (
            f"--max-connections {most} needs {most + OTHER_FILES} open files, and this process may have {hard}: "
            f"raise that limit (ulimit -n), or say --max-connections {max(hard - OTHER_FILES, 1)}."
        )
    return None
