"""The service watches itself: whether it gets on, whether its books agree, whether its memory suffices.

Three laws that no fault can break unseen. Tokens: what was computed is useful, wasted, or in somebody's answer. Blocks:
free and held ones are all there are. Little: requests in the house, integrated over time, are the sum of their times in
it (Little, Operations Research 9(3), 1961); the two sides are counted in different places.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from engine.engine import Engine, StepTimes
from service.breaker import State
from service.connections import Connections
from service.ladder import Rung
from service.machine import device_busy, device_memory, memory_share
from service.memory import MemoryGuard, Pressure
from service.observe import Metrics
from service.serving import Serving

LOG = logging.getLogger(__name__)
LOOK_S = 0.1  # how often the event loop is looked at
LAWS_S = 5.0  # how often the books are compared
LITTLE_S = 60.0  # over how much time
LITTLE_OFF = 0.05
STALL_STEPS = 20  # times the slowest step but one in a hundred
STEPS_SEEN = 500


class Watch:
    """memory_used: the used share of what there is; handed in so that a test can be short of it."""

    def __init__(
        self,
        serving: Serving,
        metrics: Metrics,
        memory_used: Callable[[], float] = memory_share,
        laws_s: float = LAWS_S,
    ) -> None:
        self.serving, self.metrics, self.bridge = serving, metrics, serving.bridge
        self.laws_s = laws_s
        self.memory = MemoryGuard(memory_used, self.bridge.clock)
        self.memory.givers.append(self.bridge.drop_cache)
        if serving.relief.results is not None:
            self.memory.givers.insert(0, serving.relief.results.kept.clear)  # before the allocator is asked
        self.connections = Connections(serving.settings.max_connections, lambda: self.memory.tight)
        self.laws = {"tokens": True, "blocks": True, "little": True}
        self.steps: deque[float] = deque(maxlen=STEPS_SEEN)
        self.checked_s = self.bridge.clock()
        self.step_end_s: float | None = None  # of the last step, unless there was nothing to do since
        self.windows: deque[tuple[float, float, float]] = deque()  # (clock, area, residence)
        self.agreed = True  # Little's two sides, at the last look
        self.counted: dict[Any, float] = {}
        self.bridge.watch = self.on_step

    # ---- in the engine's thread

    def on_step(self, engine: Engine, times: StepTimes | None) -> None:
        if times is not None:
            took_s = times.end - times.start
            self.steps.append(took_s)
            self.metrics.step.observe(took_s)
            since_s = times.start if self.step_end_s is None else self.step_end_s  # what is between two steps counts
            self.serving.admission.rates.learn(times.tokens, times.requests, times.end - since_s, times.context)
            self.pace(times, took_s)
        self.step_end_s = times.end if times is not None else None
        now_s = self.bridge.clock()
        if now_s - self.checked_s >= self.laws_s:
            self.checked_s = now_s
            self.laws["tokens"] = self.tokens_agree(engine)
            self.laws["blocks"] = self.blocks_agree(engine)

    def pace(self, times: StepTimes, took_s: float) -> None:
        """How many times longer than the machine was measured to take: what the engine's breaker calls slow by."""
        measured_s = self.serving.admission.rates.as_measured(times.tokens, times.requests, times.context)
        steps, times_longer = self.serving.paced
        self.serving.paced = (steps + 1, times_longer + took_s / measured_s)

    def tokens_agree(self, engine: Engine) -> bool:
        bridge = self.bridge
        unfinished = sum(request.spent for request in engine.answers)
        return bridge.count("computed") == bridge.useful + sum(bridge.wasted.values()) + unfinished

    def blocks_agree(self, engine: Engine) -> bool:
        try:
            engine.scheduler.check()
        except AssertionError:
            return False
        return True

    # ---- in the event loop

    @contextlib.asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        looking = asyncio.create_task(self.look())
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def look(self) -> None:
        loop, next_laws_s = asyncio.get_running_loop(), 0.0
        while True:
            due_s = loop.time() + LOOK_S
            await asyncio.sleep(LOOK_S)
            self.metrics.loop_lag.observe(max(loop.time() - due_s, 0.0))
            if loop.time() >= next_laws_s:
                next_laws_s = loop.time() + 1.0
                for look in (self.guard_memory, self.serving.feel, self.check_little):
                    try:
                        look()
                    except Exception:  # too many open files, say: it passes, and a door that was shut must open again
                        LOG.exception("the service could not look after itself (%s)", look.__name__)

    def guard_memory(self) -> None:
        admission, short = self.serving.admission, self.memory.look() is Pressure.SHORT
        if admission.closed is None and short:
            admission.closed = "memory"
        elif admission.closed == "memory" and not short:
            admission.closed = None
        if self.memory.tight:
            self.connections.send_idle_away()

    def check_little(self) -> None:
        """One look may find somebody who has left one book only."""
        before, self.agreed = self.agreed, self.little_agrees()
        self.laws["little"] = self.agreed or before

    def little_agrees(self) -> bool:
        """Over the last minute. Says nothing while too little has happened."""
        now_s = self.bridge.clock()
        area_s, residence_s = self.bridge.in_house.area_s(now_s), self.bridge.residence_s
        residence_s += sum(now_s - answer.request.timeline.arrived for answer in list(self.bridge.unfinished))
        self.windows.append((now_s, area_s, residence_s))
        while len(self.windows) > 1 and self.windows[1][0] <= now_s - LITTLE_S:
            self.windows.popleft()
        _, area_then, residence_then = self.windows[0]
        area_s, residence_s = area_s - area_then, residence_s - residence_then
        return area_s < 1.0 or abs(area_s - residence_s) <= LITTLE_OFF * area_s

    # ---- what it says

    def stall_limit_s(self) -> float:
        slowest = sorted(self.steps)[int(len(self.steps) * 0.99) - 1] if self.steps else 0.0
        return max(self.serving.settings.stall_after, STALL_STEPS * slowest)

    def alive(self) -> dict[str, Any]:
        """Idle is alive, and so is busy; a step that does not end is not."""
        stalled_s, limit_s = self.bridge.stalled_s(), self.stall_limit_s()
        dead = not self.bridge.thread.is_alive()
        found = {"status": "stalled" if stalled_s > limit_s or dead else "ok", "running": self.bridge.seen().running,
                 "last_step_age_s": round(stalled_s, 3), "threshold_s": round(limit_s, 3)}  # fmt: skip
        why = "the engine's thread has ended" if dead else self.bridge.no_engine and (
            f"a failed engine could not be replaced yet ({self.bridge.no_engine}); it is tried again and again"
        )  # fmt: skip
        return found | ({"reason": why} if why else {})

    def admitting(self) -> dict[str, Any]:
        """Whether a new request would be let in, and if not, why."""
        admission, bridge = self.serving.admission, self.bridge
        why = None
        if self.alive()["status"] != "ok":
            why = "stalled"
        elif admission.closed:
            why = admission.closed
        elif not bridge.ready:
            why = "the engine is being replaced"
        elif admission.answers >= admission.limits.places:
            why = "full"
        elif not self.serving.relief.open_to_all:
            why = "the circuit is open"
        return {"ready": why is None, "reason": why, "requests": admission.answers, "places": admission.limits.places}

    def health(self) -> dict[str, Any]:
        relief = self.serving.relief
        broken = [name for name, holds in self.laws.items() if not holds]
        status = self.alive()["status"]
        if status == "ok" and self.serving.admission.closed == "drain":
            status = "draining"
        elif status == "ok" and (broken or self.serving.admission.closed or relief.trouble):
            status = "degraded"
        return {"status": status, "broken_laws": broken, "live": self.alive(), "ready": self.admitting(),
                "engine_restarts": self.bridge.restarts, "now": self.now(),
                **self.bridge.quarantine.counts(), "breakers": relief.shown(),
                "degraded": [rung for rung in Rung if relief.ladder.engaged(rung)]}  # fmt: skip

    def now(self) -> dict[str, Any]:
        """How full it is, for whoever looks on. predicted_wait_s: a newcomer's with 100 tokens, to the first of his."""
        admission, state = self.serving.admission, self.bridge.seen()
        return {
            "slots": admission.limits.slots, "running": state.running,
            "queue": admission.limits.queued, "waiting": state.waiting,
            "kv_blocks": state.kv_blocks, "kv_held": state.kv_held,
            "predicted_wait_s": round(admission.predicted_wait_s(100), 3),
        }  # fmt: skip

    def capacity(self) -> dict[str, Any]:
        admission = self.serving.admission
        limits, rates = admission.limits, admission.rates
        return self.now() | {
            "tokens": limits.tokens, "context": self.serving.context,
            "decode_tokens_per_s": round(limits.slots / rates.step(limits.slots), 1),
            "decode_tokens_per_s_alone": round(1 / rates.step(1), 1),
            "prefill_tokens_per_s": round(1 / rates.prefill(1), 1), "drift": round(rates.drift, 3),
            "max_wait_s": limits.patience_s, "requests": admission.answers,
        }  # fmt: skip

    def refresh(self) -> None:
        """Bring the figures that are only looked up when somebody asks."""
        m, bridge, state, admission = self.metrics, self.bridge, self.bridge.seen(), self.serving.admission
        m.running.set(state.running)
        m.waiting.set(state.waiting)
        m.inside.set(admission.answers)
        m.places.set(admission.limits.places)
        m.live.set(self.alive()["status"] == "ok")
        m.ready.set(self.admitting()["ready"])
        m.queued_tokens.set(admission.tokens)
        m.kv_usage.set(state.kv_held / max(state.kv_blocks, 1))
        m.kv_blocks.set(state.kv_blocks)
        m.kv_block_size.set(bridge.engine.scheduler.blocks.size)
        m.predicted_wait.set(admission.predicted_wait_s(100))
        m.progress.set(bridge.progress_at())
        m.tasks.set(len(asyncio.all_tasks()))
        for law, holds in self.laws.items():
            m.law.labels(law).set(holds)
        self.refresh_relief()
        self.raise_to(m.computed_tokens, bridge.count("computed"))
        self.raise_to(m.generated_tokens, bridge.count("delivered"))
        self.raise_to(m.restarts.labels("step_failed"), bridge.restarts)
        self.raise_to(m.quarantine_refusals, bridge.quarantine.refused)
        for state, count in bridge.quarantine.counts().items():
            m.quarantine.labels(state).set(count)
        for reason, tokens in dict(bridge.wasted).items():
            self.raise_to(m.wasted_tokens.labels(reason), tokens)
        m.connections.set(len(self.connections.open))
        self.raise_to(m.connections_refused, self.connections.refused)
        m.memory_used.set(self.memory.share)
        m.memory_tight.set(self.memory.tight)
        for kind, value in device_memory().items():
            m.memory.labels(kind).set(value)
        m.utilisation.set(device_busy())

    def refresh_relief(self) -> None:
        m, relief = self.metrics, self.serving.relief
        for breaker in relief.breakers:
            for state in State:
                m.breaker_state.labels(breaker.name, state).set(breaker.state is state)
        for rung in Rung:
            m.degraded.labels(rung).set(relief.ladder.engaged(rung))
            self.raise_to(m.degraded_requests.labels(rung), relief.ladder.counts[rung])
        if relief.results is not None:
            self.raise_to(m.cache_lookups.labels("hit"), relief.results.hits)
            self.raise_to(m.cache_lookups.labels("miss"), relief.results.misses)
            m.cache_bytes.set(relief.results.bytes)

    def raise_to(self, counter: Any, total: float) -> None:
        """Counters only go up, by what has come since the last look."""
        counter.inc(total - self.counted.get(counter, 0))
        self.counted[counter] = total
