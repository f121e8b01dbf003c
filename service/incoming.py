"""An answer on its way here from another server, for a reader who takes it in pieces and does not wait for ever."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping

from lab.wire import Broken, Place, Wire, connected

HIGH_BYTES = 256 << 10  # that may wait for a slow reader before the other server has to


class Unusable(Exception):
    """No answer that can be used came, or no more of it. The text is for the log: it may name insides."""


class Incoming:
    """One request on a connection of its own, into which lab.wire writes what comes. silence_s: how long nothing may.

    status: 0 until the answer's head is there.
    """

    def __init__(self, silence_s: float, clock: Callable[[], float]) -> None:
        self.silence_s, self.clock = silence_s, clock
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.pieces = self  # lab.wire calls its append(), and nothing else
        self.held = bytearray()
        self.heard_s = clock()
        self.changed = asyncio.Event()
        self.wire: Wire | None = None
        self.asking: asyncio.Task[None] | None = None

    async def ask(self, place: Place, body: bytes, within_s: float) -> None:
        """Connect and send. Unusable: nobody is there."""
        try:
            async with asyncio.timeout(min(within_s, self.silence_s)):
                self.wire = await connected(place)
        except OSError as error:  # TimeoutError is one too
            raise Unusable(f"connect: {str(error) or 'no answer in time'}") from error
        self.asking = asyncio.create_task(self.wire.ask(place.request(body), self))
        self.asking.add_done_callback(lambda _: self.changed.set())

    def append(self, stamped: tuple[float, bytes]) -> None:
        self.held += stamped[1]
        if len(self.held) > HIGH_BYTES:
            self.wire.transport.pause_reading()
        self.changed.set()

    async def piece(self, within_s: float) -> bytes | None:
        """What has come; b"" after the end; None when nothing came in that time, or wake() was called. Unusable."""
        if not self.held and not self.asking.done():
            left_s = self.heard_s + self.silence_s - self.clock()
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(within_s, left_s)):
                    await self.changed.wait()
        if self.held:
            found, self.held, self.heard_s = bytes(self.held), bytearray(), self.clock()
            self.wire.transport.resume_reading()
            return found
        if self.asking.done():
            try:
                self.asking.result()
            except (Broken, OSError) as error:
                raise Unusable(str(error)) from error
            return b""
        if self.clock() - self.heard_s >= self.silence_s:
            raise Unusable(f"silent for {self.silence_s:g} s")
        return None

    def wake(self) -> None:
        self.changed.set()

    def close(self) -> None:
        if self.asking is not None and not self.asking.cancel() and not self.asking.cancelled():
            self.asking.exception()  # seen: else asyncio complains of an error that nobody looked at
        if self.wire is not None:
            self.wire.transport.abort()
