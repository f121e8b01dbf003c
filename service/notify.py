"""What systemd is told: that the service is ready, that it is ending, that it lives. See sd_notify(3).

The protocol is a datagram of lines to a socket whose name is in the environment; no library is needed for that. With a
watchdog in the unit, systemd restarts a service that stops saying WATCHDOG=1: one whose event loop is blocked says
nothing, and one whose engine stands still (/health/live) does not say that. Elsewhere nothing is sent.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LOG = logging.getLogger(__name__)
SHARE = 3  # signs of life in the time in which there must be one


@dataclass(frozen=True)
class Notifier:
    """address: of systemd's socket. watchdog_s: in so many seconds there must be a sign of life. None: nobody asks."""

    address: str | None = None
    watchdog_s: float | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Notifier":
        """As systemd says it to the process that it started; its children inherit the words, which are not for them."""
        mine = environment.get("WATCHDOG_PID") in (None, str(os.getpid()))
        usec = environment.get("WATCHDOG_USEC", "") if mine else ""
        watchdog_s = int(usec) / 1e6 if usec.isascii() and usec.isdigit() and int(usec) else None
        return cls(environment.get("NOTIFY_SOCKET") or None, watchdog_s)

    def say(self, *lines: str) -> None:
        """At once or not at all: a service does not wait for who watches it, nor fail because nobody does."""
        if self.address is None:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            LOG.warning("systemd could not be told %s (%s)", lines[0], error)

    async def beat(self, alive: Callable[[], Mapping[str, Any]]) -> None:
        """A sign of life again and again, while there is life. alive: what /health/live says."""
        if self.address is None or self.watchdog_s is None:
            return
        well = True
        while True:
            found = alive()
            before, well = well, found["status"] == "ok"
            if well:
                self.say("WATCHDOG=1", *(["STATUS=serving"] if not before else []))
            elif before:
                self.say(f"STATUS={found['status']}: the last step is {found['last_step_age_s']:g} s old")
            await asyncio.sleep(self.watchdog_s / SHARE)
