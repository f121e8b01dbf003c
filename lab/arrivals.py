"""When requests arrive: schedules that are fixed before anything runs, in seconds from the start.

An open loop sends by such a schedule, whether or not the server keeps up, and counts latency from it. (A closed loop,
which sends when an answer came, slows down with the server, and so hides its queue.)
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress

KINDS = ("burst", "poisson", "constant")


def schedule(kind: str, requests: int, rate_per_s: float, seed: int) -> list[float]:
    """The moments at which the requests are due.

    burst: all at once. constant: evenly spaced. poisson: independent users, so the gaps are exponential; seeded.
    """
    if kind == "burst":
        return [0.0] * requests
    if kind == "constant":
        return [i / rate_per_s for i in range(requests)]
    chance, moment, dues = random.Random(seed), 0.0, []
    for _ in range(requests):
        dues.append(moment)
        moment += chance.expovariate(rate_per_s)
    return dues


class OpenLoop:
    """with OpenLoop(dues_s, send, then): sends request i at its moment, from a thread of its own, and waits for all.

    send(i) returns the future of its answer; then() is called when every future is settled. Leaving the block early, by
    Ctrl-C, cancels what still waits. sent_s and done_s are readings of the caller's own clock; start_s is moment 0.
    """

    def __init__(self, dues_s: Sequence[float], send: Callable[[int], Future], then: Callable[[], object]) -> None:
        self.dues_s, self.send, self.then = dues_s, send, then
        self.sent_s: list[float] = []
        self.done_s: list[float | None] = [None] * len(dues_s)
        self.futures: list[Future] = []
        self.error: Exception | None = None
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.loop, name="open loop")

    def __enter__(self) -> "OpenLoop":
        self.start_s = time.perf_counter() + 0.01  # by then the other side is ready
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop.set()
        for future in self.futures:
            future.cancel()  # does nothing to those that are answered
        self.thread.join()
        if self.error and kind is None:
            raise self.error

    def loop(self) -> None:
        try:
            self.send_all()
        except Exception as error:  # the other side closed, or its queue is full: the caller learns it in __exit__
            self.error = error
        for future in self.futures:
            with suppress(CancelledError):
                future.exception()  # waits until it is settled, whichever way
        self.then()

    def send_all(self) -> None:
        for i, due in enumerate(self.dues_s):
            if self.stop.wait(max(self.start_s + due - time.perf_counter(), 0)):
                break
            self.sent_s.append(time.perf_counter())
            self.futures.append(self.send(i))
            self.futures[i].add_done_callback(lambda _, i=i: self.done_s.__setitem__(i, time.perf_counter()))
