"""The dynamic batcher: on a clock that only tests move, then with real threads."""

import asyncio
import json
import threading
import time
from concurrent.futures import CancelledError, Future

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batcher import Batch, BatcherClosed, DynamicBatcher, InFlight, QueueFull


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def driven(generate=list, size=3, window=10.0, queue=100, **more) -> tuple[DynamicBatcher, Clock, list[Batch]]:
    """A batcher without a thread, its clock, and the batches that ran."""
    clock, batches = Clock(), []
    batcher = DynamicBatcher(
        generate, size, window, queue, on_batch=batches.append, clock=clock, start=False, length=None, **more
    )
    return batcher, clock, batches


# ---- the policy, by hand


def test_the_window_opens_with_the_first_request_and_a_full_batch_leaves_at_once():
    batcher, clock, _ = driven(size=3, window=10)
    assert batcher.leaves_at() is None
    batcher.submit("a")
    assert batcher.leaves_at() == 110
    clock.now = 104.0
    batcher.submit("b")
    assert batcher.leaves_at() == 110  # the second one does not open it anew
    clock.now = 107.0
    batcher.submit("c")
    assert batcher.leaves_at() == 107
    batcher.run_next()
    assert batcher.leaves_at() is None


def test_who_came_first_leaves_first_and_no_batch_is_over_size():
    batcher, _, batches = driven(size=3)
    futures = [batcher.submit(i) for i in range(7)]
    while batcher.run_next():
        pass
    assert [b.members for b in batches] == [(0, 1, 2), (3, 4, 5), (6,)]
    assert [f.result() for f in futures] == list(range(7))


def test_the_log_line_tells_waits_size_time_and_padding():
    clock = Clock()

    def generate(batch):
        clock.now += 2.0
        return batch

    lines = []
    batcher = DynamicBatcher(generate, 2, 5.0, clock=clock, start=False, length=len, on_batch=lines.append)
    for text in ("abc", "a", "abcd"):
        batcher.submit(text)
        clock.now += 1
    batcher.run_next()  # at 103: two of three; ends at 105
    batcher.run_next()  # at 105
    first, second = (json.loads(batch.line()) for batch in lines)
    assert first == {"event": "batch", "batch": 0, "size": 2, "requests": [0, 1], "queue_wait_s": [3.0, 2.0],
                     "window_wait_s": [3.0, 2.0], "execution_s": 2.0, "padding": 2, "refused": 0,
                     "failed": None}  # fmt: skip
    # A full batch was waiting before the third: what it waits is the load, not the window.
    assert (second["queue_wait_s"], second["window_wait_s"], second["padding"]) == ([3.0], [0.0], 0)


def test_a_failing_batch_fails_its_own_members_only():
    def generate(batch):
        if 1 in batch:
            raise ValueError("no")
        return batch

    batcher, _, batches = driven(generate, size=2)
    futures = [batcher.submit(i) for i in range(4)]
    while batcher.run_next():
        pass
    assert [isinstance(f.exception(), ValueError) for f in futures] == [True, True, False, False]
    assert [b.failed for b in batches] == ["ValueError: no", None]


def test_an_answer_that_is_an_exception_fails_its_own_request_only():
    batcher, _, batches = driven(lambda batch: [KeyError(x) if x == 1 else x for x in batch])
    futures = [batcher.submit(i) for i in range(3)]
    batcher.run_next()
    assert isinstance(futures[1].exception(), KeyError)
    assert (futures[0].result(), futures[2].result()) == (0, 2)
    assert (batches[0].failed, batches[0].refused) == (None, 1)


def test_too_few_answers_fail_the_batch_instead_of_handing_out_wrong_ones():
    batcher, _, _ = driven(lambda batch: batch[:-1])
    futures = [batcher.submit(i) for i in range(3)]
    batcher.run_next()
    assert all("2 answers for 3 requests" in str(f.exception()) for f in futures)


def test_a_cancelled_request_is_never_computed_and_gives_its_place_back():
    seen = []
    batcher, clock, _ = driven(lambda batch: seen.extend(batch) or batch, size=2, queue=2)
    first, second = batcher.submit("a"), batcher.submit("b")
    with pytest.raises(QueueFull, match="2 requests wait already"):
        batcher.submit("c")
    clock.now = 103.0
    assert first.cancel()
    third = batcher.submit("c")
    assert batcher.leaves_at() == 103  # b and c: full again
    batcher.run_next()
    assert (seen, second.result(), third.result()) == (["b", "c"], "b", "c")
    with pytest.raises(CancelledError):
        first.result(timeout=0)


def test_a_cancelled_first_request_closes_its_window():
    batcher, clock, _ = driven(size=4, window=10)
    first = batcher.submit("a")
    clock.now = 106.0
    batcher.submit("b")
    assert batcher.leaves_at() == 110
    first.cancel()
    assert batcher.leaves_at() == 116  # b waits for others from its own arrival on


def test_closing_without_draining_fails_those_who_wait_and_draining_answers_them():
    batcher, _, _ = driven()
    waiting = batcher.submit("a")
    assert batcher.close(drain=False)
    assert isinstance(waiting.exception(), BatcherClosed)
    with pytest.raises(BatcherClosed):
        batcher.submit("b")
    batcher, _, _ = driven()
    waiting = batcher.submit("a")
    batcher.close()
    assert waiting.result() == "a"


@pytest.mark.parametrize(
    ("size", "window", "queue"), [(0, 1, 1), (1, -0.1, 1), (1, float("nan"), 1), (1, float("inf"), 1), (1, 1, 0)]
)
def test_impossible_policies_are_refused(size, window, queue):
    with pytest.raises(ValueError, match="a batcher needs room"):
        DynamicBatcher(list, size, window, queue, start=False)


def test_in_flight_integrates_requests_over_time():
    clock = Clock()
    inside = InFlight(clock)
    inside.change(+1)
    clock.now += 2
    inside.change(+1)
    clock.now += 3
    inside.change(-1)
    clock.now += 4
    inside.change(-1)
    assert inside.request_s == 1 * 2 + 2 * 3 + 1 * 4


# ---- any order of events


class AnyOrder(RuleBasedStateMachine):
    """Submits, cancels, failures, time and close, in any order: nothing lost, nothing twice, never over size."""

    @initialize(size=st.integers(1, 4), window=st.sampled_from([0.0, 1.0, 5.0]), queue=st.integers(1, 6))
    def begin(self, size, window, queue):
        self.runs: list[list[int]] = []
        self.fail_next = False
        self.clock = Clock()
        self.batcher = DynamicBatcher(
            self.generate, size, window, queue, clock=self.clock, start=False, on_batch=lambda _: None
        )
        self.futures: dict[int, Future] = {}
        self.cancelled: set[int] = set()
        self.free_from = self.clock.now

    def generate(self, batch):
        self.runs.append(list(batch))
        self.clock.now += 0.5
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("as told")
        return [-number for number in batch]

    @rule()
    def submit(self):
        number = len(self.futures) + len(getattr(self, "refused", []))
        try:
            self.futures[number] = self.batcher.submit(number)
        except QueueFull:
            assert len(self.batcher.waiting) == self.batcher.max_queue
            self.refused = [*getattr(self, "refused", []), number]
        except BatcherClosed:
            assert self.batcher.closing
            self.refused = [*getattr(self, "refused", []), number]

    @precondition(lambda self: self.futures)
    @rule(data=st.data())
    def cancel(self, data):
        number = data.draw(st.sampled_from(sorted(self.futures)))
        if self.futures[number].cancel() and not any(number in run for run in self.runs):
            self.cancelled.add(number)

    @rule()
    def let_the_next_batch_fail(self):
        self.fail_next = True

    @rule(seconds=st.sampled_from([0.3, 1.0, 4.0]))
    def time_passes(self, seconds):
        """What the worker's thread does: sleep until a batch is due, run it, sleep again."""
        until = self.clock.now + seconds
        while (leaves := self.batcher.leaves_at()) is not None and leaves <= until:
            before = len(self.runs)
            self.clock.now = max(self.clock.now, leaves)
            oldest = self.batcher.waiting[0].enqueued_s
            # Idle since before this batch was due: then nobody waited longer than the window.
            if self.free_from <= leaves:
                assert self.clock.now - oldest <= self.batcher.max_wait_s + 1e-9
            self.batcher.run_next()
            self.free_from = self.clock.now
            assert len(self.runs) == before + 1
        self.clock.now = max(self.clock.now, until)

    @rule(drain=st.booleans())
    def close(self, drain):
        assert self.batcher.close(drain)
        assert all(future.done() for future in self.futures.values())

    @invariant()
    def nothing_is_lost_and_nothing_runs_twice(self):
        if not hasattr(self, "futures"):
            return
        ran = [number for run in self.runs for number in run]
        waiting = [w.number for w in self.batcher.waiting]
        assert len(ran) == len(set(ran)) and ran == sorted(ran)  # first come, first served
        assert all(1 <= len(run) <= self.batcher.max_batch_size for run in self.runs)
        assert not self.cancelled & set(ran)
        assert len(waiting) <= self.batcher.max_queue
        for number, future in self.futures.items():
            states = [number in ran, future.cancelled(), not future.done(), number in self.dropped(ran)]
            assert sum(states) == 1, (number, states)
            if number in ran and not isinstance(future.exception(), RuntimeError):
                assert future.result() == -number
        assert self.batcher.in_flight.count == sum(not future.done() for future in self.futures.values())

    def dropped(self, ran):
        return {
            number
            for number, future in self.futures.items()
            if number not in ran and future.done() and not future.cancelled()
            if isinstance(future.exception(), BatcherClosed)
        }


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = pytest.mark.slow(AnyOrder.TestCase)


# ---- with real threads


def threads_named_batcher() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batcher"]


def test_requests_that_come_together_run_together():
    batches = []
    with DynamicBatcher(list, 8, 0.25, on_batch=batches.append) as batcher:
        futures = [batcher.submit(i) for i in range(8)]
        assert [future.result(timeout=5) for future in futures] == list(range(8))
    assert sum(len(b.members) for b in batches) == 8 and len(batches) <= 2
    assert not threads_named_batcher()


def test_a_lone_request_leaves_when_its_window_is_over():
    with DynamicBatcher(list, 8, 0.05) as batcher:
        start = time.perf_counter()
        batcher.submit("a").result(timeout=5)
        assert 0.045 <= time.perf_counter() - start < 0.5  # ten times the window: a shared machine


def test_many_threads_lose_nothing_and_keep_their_order():
    ran = []
    batcher = DynamicBatcher(lambda batch: ran.extend(batch) or batch, 8, 0.001, max_queue=1000)
    futures = {}

    def submit(thread):
        for i in range(20):
            futures[thread, i] = batcher.submit((thread, i))

    threads = [threading.Thread(target=submit, args=(t,)) for t in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert batcher.close()
    assert all(future.result(timeout=0) == key for key, future in futures.items())
    assert len(ran) == 400 and all([i for t, i in ran if t == thread] == list(range(20)) for thread in range(20))


def test_asyncio_callers_share_a_batch_and_a_cancelled_task_is_never_computed():
    seen = []

    async def run():
        with DynamicBatcher(lambda batch: seen.append(list(batch)) or batch, 3, 0.3) as batcher:
            tasks = [asyncio.create_task(batcher.predict(i)) for i in range(3)]
            await asyncio.sleep(0.02)
            extra = asyncio.create_task(batcher.predict("never"))
            await asyncio.sleep(0.02)
            extra.cancel()
            return await asyncio.gather(*tasks)

    assert asyncio.run(run()) == [0, 1, 2]
    assert seen == [[0, 1, 2]]


def test_closing_from_inside_a_batch_and_twice_does_no_harm():
    batcher = DynamicBatcher(lambda batch: batcher.close() or batch, 1, 0)
    assert batcher.submit("a").result(timeout=5) == "a"
    assert batcher.close(timeout_s=5) and batcher.close(drain=False)
    assert not threads_named_batcher()


def test_a_batch_that_never_ends_does_not_hang_a_close_with_a_time_limit():
    begun, release = threading.Event(), threading.Event()
    batcher = DynamicBatcher(lambda batch: begun.set() or (release.wait(10) and batch), 1, 0)
    stuck, waiting = batcher.submit("a"), batcher.submit("b")
    assert begun.wait(5)
    assert batcher.close(drain=False, timeout_s=0.1) is False
    assert isinstance(waiting.exception(timeout=1), BatcherClosed)
    release.set()
    assert batcher.close(timeout_s=5) and stuck.result(timeout=1) == "a"
    assert not threads_named_batcher()


def test_a_worker_outlives_sys_exit_and_a_broken_log():
    def generate(batch):
        if batch == ["exit"]:
            raise SystemExit(3)
        return batch

    def broken(_batch):
        raise OSError("disk full")

    with DynamicBatcher(generate, 1, 0, on_batch=broken) as batcher:
        assert isinstance(batcher.submit("exit").exception(timeout=5), SystemExit)
        assert batcher.submit("b").result(timeout=5) == "b"


def test_a_second_server_is_refused():
    with DynamicBatcher(list, 1, 0) as batcher, pytest.raises(RuntimeError, match="another thread serves"):
        batcher.serve()


def test_a_keyboard_interrupt_of_generate_itself_does_not_end_the_batchers_own_thread():
    def generate(batch):
        if batch == ["a"]:
            raise KeyboardInterrupt
        return batch

    with DynamicBatcher(generate, 1, 0) as batcher:
        assert isinstance(batcher.submit("a").exception(timeout=5), KeyboardInterrupt)
        assert batcher.submit("b").result(timeout=5) == "b"


def test_ctrl_c_inside_a_batch_reaches_whoever_serves():
    def generate(_batch):
        raise KeyboardInterrupt

    batcher = DynamicBatcher(generate, 1, 0, start=False)
    running, waiting = batcher.submit("a"), batcher.submit("b")
    with pytest.raises(KeyboardInterrupt):
        batcher.serve()
    assert isinstance(running.exception(timeout=0), KeyboardInterrupt)
    assert isinstance(waiting.exception(timeout=0), BatcherClosed)  # nobody will serve it any more
    assert batcher.close()
    with pytest.raises(BatcherClosed):
        batcher.submit("c")
