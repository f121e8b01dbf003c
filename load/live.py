"""What is going on, on a terminal: how far it is, how many are in flight, tokens now, first tokens so far, errors."""

import sys
import time
from collections import deque

from lab.wire import Wire
from load.drive import Drive
from metrics import percentile

BAR = "{desc}: {bar:10} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"  # short: the figures must have room
LOOK_BACK_S = 2.0  # "now" is the mean of so much time


class Live:
    """A bar on stderr while it is a terminal; nothing otherwise. total: requests, where their number is known."""

    def __init__(self, label: str, total: int | None) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, desc=label, leave=False, disable=None, file=sys.stderr, dynamic_ncols=True,
                        bar_format=BAR)  # fmt: skip
        self.seen = 0
        self.first_s: list[float] = []
        self.looks: deque[tuple[float, int]] = deque([(time.perf_counter(), Wire.pieces)])  # when, how many by then
        self.errors = 0

    def __call__(self, drive: Drive) -> None:
        if self.bar.disable:
            return
        now_s, traces = time.perf_counter(), drive.found.traces
        for trace in traces[self.seen :]:
            self.errors += trace.status != 200 or trace.error is not None
            if trace.pieces:
                self.first_s.append(trace.pieces[0][0] - trace.due_s)
        self.bar.update(len(traces) - self.seen)
        self.seen = len(traces)
        self.looks.append((now_s, Wire.pieces))
        while len(self.looks) > 2 and self.looks[0][0] < now_s - LOOK_BACK_S:
            self.looks.popleft()
        (then_s, before), (last_s, after) = self.looks[0], self.looks[-1]
        rate = (after - before) / (last_s - then_s) if last_s > then_s else 0.0
        first = [f"{percentile(self.first_s, p):.2f}" for p in (50, 95) if self.first_s]
        waited = f", first byte p50 {first[0]} p95 {first[1]} s" if first else ""
        self.bar.set_postfix_str(f"{drive.flying} in flight, {rate:.0f} pieces/s{waited}, {self.errors} errors")

    def close(self, line: str | None = None) -> None:
        """line: what stays of it on the terminal."""
        if line and not self.bar.disable:
            self.bar.write(line, file=sys.stderr)
        self.bar.close()
