"""An event loop whose timers are exact to some 0.1 ms.

Linux's epoll, on which asyncio waits, counts milliseconds, and Python rounds up: every sleep ends half a millisecond
late on average. That is as much as the numbers of a load generator may be off in all.
"""

import asyncio
import contextlib
import select
import selectors


class FineSelector(selectors.DefaultSelector):
    """Waits on epoll's own descriptor by select(), which counts microseconds; then epoll only has to be looked at."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            # ValueError: a process with over a thousand files got a number that select() cannot take.
            with contextlib.suppress(ValueError, InterruptedError):
                select.select([self.fileno()], [], [], timeout)
                timeout = 0
        return super().select(timeout)


def new_loop() -> asyncio.AbstractEventLoop:
    """For asyncio.Runner(loop_factory=new_loop). Other systems' loops are exact without help."""
    if hasattr(select, "epoll") and issubclass(FineSelector, selectors.EpollSelector):
        return asyncio.SelectorEventLoop(FineSelector())
    return asyncio.new_event_loop()
