"""One policy, once: requests come by their schedule, batches form, and every moment is kept.

The batcher and the model are handed in; lab/batch_figures.py says what the samples mean.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lab.arrivals import OpenLoop
from lab.records import output_hash
from metrics import Stats


class Served:
    """generate() for a batcher: answers a batch, and keeps the phases and the positions of every batch it ran.

    answer(prompts, stats) -> their new tokens. net: the torch module whose inputs are counted.
    """

    def __init__(self, answer: Callable[[Sequence[list[int]], Stats], list], net: Any) -> None:
        self.answer, self.net = answer, net
        self.phases: list[Stats] = []
        self.positions = 0

    def __call__(self, prompts: Sequence[list[int]]) -> list:
        stats: Stats = {}
        answers = self.answer(prompts, stats)
        self.phases.append(stats)
        return answers

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count at the network's own door what it computes: the token law compares that with what was needed."""
        self.phases.clear()
        self.positions = 0

        def count(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
            self.positions += inputs["input_ids"].numel()

        hook = self.net.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def run_trial(
    batcher_kind: Callable[..., Any],
    served: Served,
    prompts: Sequence[list[int]],
    cell: tuple[int, float],
    dues_s: Sequence[float],
) -> dict[str, Any]:
    """Serve the prompts at their moments under the policy cell = (batch size, window in ms).

    batcher_kind: DynamicBatcher. Its batches run on this thread, which has computed before, and the requests come from
    another one (batcher.py says why). Moments in the result are seconds from the first due.
    """
    batches: list[Any] = []
    batcher = batcher_kind(
        served, cell[0], cell[1] / 1e3, max_queue=len(prompts), length=len, on_batch=batches.append, start=False
    )
    with served.counting(), OpenLoop(dues_s, lambda i: batcher.submit(prompts[i]), then=batcher.close) as users:
        batcher.serve()
    answers = [future.result() for future in users.futures]
    zero = users.start_s
    return {
        "batch_size": cell[0],
        "window_ms": cell[1],
        "due_s": seconds(dues_s),
        "sent_s": seconds(sent - zero for sent in users.sent_s),
        "done_s": seconds(done - zero for done in users.done_s),
        "new_tokens": sum(map(len, answers)),
        "in_flight_s": batcher.in_flight.request_s,
        "computed_positions": served.positions,
        "useful_positions": sum(len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True)),
        "batches": [as_row(batch, stats, zero) for batch, stats in zip(batches, served.phases, strict=True)],
        "answers": [output_hash(answer) for answer in answers],
    }


def as_row(batch: Any, stats: Stats, zero: float) -> dict[str, Any]:
    """A batch as records keep it: its moments, and the phases of its model time."""
    return {
        "members": list(batch.members),
        "enqueued_s": seconds(moment - zero for moment in batch.enqueued_s),
        "window_wait_s": seconds(batch.window_waits_s()),
        "idle_s": round(max(batch.enqueued_s[0] - max(batch.free_since_s, zero), 0.0), 6),
        "started_s": round(batch.started_s - zero, 6),
        "finished_s": round(batch.finished_s - zero, 6),
        "padding": batch.padding,
        "prefill_s": round(stats["prefill"][0], 6),
        "decode_s": seconds(stats.get("decode", [])),
        "drop_rows_s": seconds(stats.get("drop_rows", [])),
    }


def seconds(values: Iterable[float]) -> list[float]:
    """To the microsecond: what the clock and the file deserve."""
    return [round(value, 6) for value in values]
