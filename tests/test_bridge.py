"""The engine on its thread, without HTTP: replaced after a failure, races with cancelling, its books."""

import asyncio
import contextlib
import functools
import inspect
import random
import threading
import time

import pytest
from service_kit import Later, Runner, next_letter

from engine.engine import Engine
from engine.kv_blocks import Blocks
from engine.request import Sampling, StepFailed
from engine.scheduler import Scheduler
from service.bridge import Area, Bridge, Stream
from service.quarantine import Quarantine

PATIENCE_S = 20.0


def in_a_loop(test):
    """Run an async test to its end. It keeps its arguments' names, which pytest asks for."""

    @functools.wraps(test)
    def whole(*arguments, **named):
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 3 * PATIENCE_S))

    whole.__signature__ = inspect.signature(test)
    return whole


def engine_of(runner: Runner, blocks: int = 64, **wishes: int) -> Engine:
    wishes = {"max_running": 2, "max_tokens": 16} | wishes
    return Engine(runner, Scheduler(Blocks(blocks), **wishes), context=256, vocabulary=257)


@contextlib.asynccontextmanager
async def bridged(runner: Runner, **wishes: int):
    """A running bridge; its books must agree at the end, and its thread must end."""
    bridge = Bridge(lambda: engine_of(runner, **wishes))
    bridge.start()
    try:
        yield bridge
        runner.go()
        await until(lambda: not (bridge.engine.answers or bridge.engine.inbox))
        await until(lambda: bridge.seen().kv_held == 0)
        assert bridge.count("computed") == bridge.useful + sum(bridge.wasted.values())
        assert bridge.in_house.count == 0
        bridge.engine.scheduler.check()
    finally:
        runner.go()
        assert bridge.stop(PATIENCE_S)


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def ended(*streams: Stream) -> None:
    """Waits as the service does: for word from the engine's thread, not by looking."""
    for stream in streams:
        async with asyncio.timeout(PATIENCE_S):
            while not stream.done:
                await stream.changed.wait()
                stream.changed.clear()


def alone(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_letter(tokens))
    return tokens[len(prompt) :]


def tokens_of(stream: Stream, which: int = 0) -> list[int]:
    return [choice.token for choice in stream.answers[which].choices]


def reasons(*streams: Stream) -> list[str]:
    return [answer.request.finish_reason for stream in streams for answer in stream.answers]


def many(bridge: Bridge, count: int, new: int = 6) -> list[Stream]:
    return [bridge.submit([i, i + 1, i + 2], Sampling(max_new_tokens=new)) for i in range(count)]


@in_a_loop
async def test_tokens_arrive_and_the_loop_is_told():
    async with bridged(Runner()) as bridge:
        stream = bridge.submit([1, 2, 3], Sampling(max_new_tokens=9))
        await ended(stream)
        assert tokens_of(stream) == alone([1, 2, 3], 9) and stream.delivered == 9
        assert bridge.useful == 3 + 8 and not bridge.wasted  # the last token is never computed


@in_a_loop
async def test_news_is_told_once_a_step_not_once_a_token():
    runner, told = Runner(), []
    async with bridged(runner, max_running=4) as bridge:
        runner.hold()
        tell = bridge.engine.before_compute
        bridge.tell = bridge.engine.before_compute = lambda: (told.append(len(bridge.news)), tell())
        streams = many(bridge, 4, new=5)
        runner.go()
        await ended(*streams)
        told = [count for count in told if count]
        assert sum(told) <= 4 * 5 and len(told) <= 9 and 4 in told


# ---- a step that failed


@pytest.mark.parametrize("at", [1, 3, 6])
@in_a_loop
async def test_after_a_failed_step_the_others_go_on_in_a_new_engine(at):
    runner = Runner()
    runner.faults[f"step {at}"] = RuntimeError("kernel exploded")
    async with bridged(runner) as bridge:
        old = bridge.engine
        runner.hold()
        streams = many(bridge, 5)
        await until(lambda: runner.in_step.is_set())  # the first is in a step, the others are queued
        runner.go()
        await ended(*streams)
        failed = [stream for stream in streams if stream.answers[0].request.error]
        hit = runner.seen[at - 1]
        assert [stream.answers[0].request.number for stream in failed] == sorted(hit)
        assert all("kernel exploded" in str(stream.answers[0].request.error) for stream in failed)
        assert all(isinstance(stream.answers[0].request.error, StepFailed) for stream in failed)
        for i, stream in enumerate(streams):
            if stream not in failed:
                assert (tokens_of(stream), reasons(stream)) == (alone([i, i + 1, i + 2], 6), ["length"])
        assert (bridge.restarts, bridge.ready) == (1, True) and bridge.engine is not old
        assert old.counts["steps"] == at, "the old engine computes no more"
        spent = sum(answer.request.spent for stream in failed for answer in stream.answers)
        assert bridge.wasted == {"engine_error": spent}


@in_a_loop
async def test_more_answers_to_a_prompt_go_on_when_the_first_one_failed():
    runner = Runner()
    runner.faults["step 1"] = RuntimeError("kernel exploded")
    async with bridged(runner) as bridge:
        stream = bridge.submit([7, 8], Sampling(max_new_tokens=4), n=3)
        await ended(stream)
        assert reasons(stream) == ["error", "length", "length"]
        assert tokens_of(stream, 1) == tokens_of(stream, 2) == alone([7, 8], 4)


@in_a_loop
async def test_what_was_known_of_a_preempted_answer_is_known_in_the_new_engine():
    """Its tokens are kept: the client has read them. Only their keys and values are computed again."""
    runner = Runner()
    async with bridged(runner, blocks=4, max_tokens=32) as bridge:
        old, long = bridge.engine, Sampling(max_new_tokens=40)
        first, second = bridge.submit(list(range(10)), long), bridge.submit(list(range(50, 60)), long)
        runner.pace_s = 0.002
        await until(lambda: second.answers[0].request.preemptions and second.delivered)
        known = tokens_of(second)
        runner.faults[f"step {runner.steps + 2}"] = RuntimeError("kernel exploded")
        runner.pace_s = 0.0
        await ended(first, second)
        assert bridge.engine is not old and reasons(first) == ["error"]
        assert tokens_of(second) == alone(list(range(50, 60)), 40) and tokens_of(second)[: len(known)] == known
        assert bridge.wasted["preempt"] > 0


@pytest.mark.parametrize("where", ["step", "deliver", "plan"])
@in_a_loop
async def test_a_failure_in_the_engine_itself_fails_who_ran_and_spares_who_waits(where):
    runner = Runner()
    async with bridged(runner) as bridge:
        runner.hold()
        streams, engine = many(bridge, 5), bridge.engine
        await until(lambda: runner.in_step.is_set())
        runner.allow(2)
        await until(lambda: runner.steps == 3 or len(engine.scheduler.running) == 2)

        def broken(*_):
            raise ZeroDivisionError("a bug")

        setattr(*{"step": (engine, "step"), "deliver": (engine, "deliver"), "plan": (engine.scheduler, "plan")}[where],
                broken)  # fmt: skip
        runner.go()
        await ended(*streams)
        assert reasons(*streams) == ["error", "error", "length", "length", "length"]
        assert "ZeroDivisionError" in str(streams[0].answers[0].request.error)
        for i, stream in enumerate(streams[2:], 2):
            assert tokens_of(stream) == alone([i, i + 1, i + 2], 6)
        assert bridge.restarts == 1 and set(bridge.wasted) <= {"engine_error"}


@in_a_loop
async def test_a_lack_of_memory_in_the_engine_itself_is_no_fault_of_an_input():
    runner = Runner()
    async with bridged(runner) as bridge:
        bridge.quarantine = Quarantine(10, time.monotonic)
        for _ in range(2):
            runner.hold()
            runner.in_step.clear()
            stream, engine = bridge.submit([1, 2, 3], Sampling(max_new_tokens=6), fingerprint=b"same"), bridge.engine
            await until(lambda: runner.in_step.is_set())

            def broken(*_):
                raise MemoryError

            engine.scheduler.plan = broken
            runner.go()
            await ended(stream)
            assert reasons(stream) == ["error"]
            await until(lambda engine=engine: bridge.engine is not engine)
        assert bridge.quarantine.suspects == {} and bridge.restarts == 2


def test_a_count_is_not_read_in_the_middle_of_a_replacement():
    bridge = Bridge(lambda: engine_of(Runner()))
    with bridge.swap:
        reading = Later(lambda: bridge.count("computed"))
        time.sleep(0.05)
        assert not reading.done, "the old engine's would count twice"
    assert reading.result() == 0


# ---- cancelling


@pytest.mark.parametrize("when", ["before", "while", "after"])
@in_a_loop
async def test_who_leaves_while_the_engine_is_replaced_is_never_computed(when):
    runner, making, made = Runner(), threading.Event(), threading.Event()
    runner.faults["step 1"] = RuntimeError("kernel exploded")
    async with bridged(runner, max_running=1) as bridge:
        make = bridge.make

        def slowly():
            making.set()
            made.wait(PATIENCE_S)
            return make()

        bridge.make = slowly
        runner.hold()
        failing, leaving, staying = many(bridge, 3)
        number = leaving.answers[0].request.number
        await until(lambda: runner.in_step.is_set())
        if when == "before":
            bridge.cancel(leaving, "deadline")
        runner.allow(1)
        await until(making.is_set)
        assert not bridge.ready
        if when == "while":
            bridge.cancel(leaving, "deadline")
        made.set()
        await until(lambda: bridge.restarts == 1)
        if when == "after":  # it may have begun: then the step that runs is its last
            bridge.cancel(leaving, "deadline")
        runner.go()
        await ended(failing, leaving, staying)
        assert reasons(failing, leaving, staying) == ["error", "cancelled", "length"]
        assert sum(number in step for step in runner.seen[1:]) <= (when == "after")
        assert tokens_of(staying) == alone([2, 3, 4], 6)
        assert set(bridge.wasted) - {"deadline"} == {"engine_error"}


@pytest.mark.parametrize("seed", range(12))
@in_a_loop
async def test_every_token_computed_is_useful_or_wasted_whatever_happens(seed):
    """Little memory, so that some start over; clients that leave; steps that fail. bridged() compares the books."""
    dice, runner = random.Random(seed), Runner()
    for _ in range(seed % 3):
        runner.faults[f"step {dice.randrange(5, 60)}"] = RuntimeError("kernel exploded")
    async with bridged(runner, blocks=12, max_running=4, max_tokens=32) as bridge:
        asked, left = [], set()
        for _ in range(40):
            prompt, new = [dice.randrange(256) for _ in range(dice.randrange(1, 40))], dice.randrange(1, 40)
            asked.append((bridge.submit(prompt, Sampling(max_new_tokens=new), n=dice.choice((1, 1, 3))), prompt, new))
            if dice.random() < 0.4:
                await asyncio.sleep(dice.random() * 0.004)
                gone = dice.randrange(len(asked))
                bridge.cancel(asked[gone][0], dice.choice(("disconnect", "deadline")))
                left.add(gone)
        await ended(*(stream for stream, *_ in asked))
        for i, (stream, prompt, new) in enumerate(asked):
            for which, why in enumerate(reasons(stream)):
                found, right = tokens_of(stream, which), alone(prompt, new)
                assert found == right if why == "length" else found == right[: len(found)]
                assert why in ("length", "error") or (why == "cancelled" and i in left)
        assert set(bridge.wasted) <= {"disconnect", "deadline", "preempt", "engine_error"}
        assert bridge.restarts or "engine_error" not in bridge.wasted
        area_s = bridge.in_house.area_s(bridge.clock())  # Little's law: the same, counted in two places
        assert area_s == pytest.approx(bridge.residence_s, rel=0.25)  # microseconds here


# ---- small things


def test_an_area_by_hand():
    now = [10.0]
    area = Area(lambda: now[0])
    area.change(2)
    now[0] = 13.0
    area.change(1)  # 2 for 3 s
    now[0] = 14.0
    area.change(-3)  # 3 for 1 s
    now[0] = 20.0
    assert area.area_s(20.0) == 9.0 and area.count == 0
    area.change(1)
    assert area.area_s(22.5) == 11.5 and area.area_s(20.0) == 9.0  # looking changes nothing


@in_a_loop
async def test_stop_says_whether_a_step_hangs():
    runner = Runner()
    bridge = Bridge(lambda: engine_of(runner))
    bridge.start()
    assert bridge.stalled_s() == 0.0
    runner.hold()
    bridge.submit([1, 2], Sampling(max_new_tokens=50))
    await until(lambda: bridge.stalled_s() > 0.02)
    assert not bridge.stop(patience_s=0.05)
    runner.go()
    assert bridge.stop(PATIENCE_S) and bridge.stop()
    assert runner.steps == 1, "told to end, it begins no other step"


def test_a_bridge_whose_loop_has_ended_ends_too():
    runner = Runner()
    bridge = Bridge(lambda: engine_of(runner))

    async def begun() -> None:
        bridge.start()
        runner.hold()
        bridge.submit([1, 2], Sampling(max_new_tokens=50))
        await until(runner.in_step.is_set)

    asyncio.run(begun())
    runner.go()
    bridge.thread.join(PATIENCE_S)
    assert not bridge.thread.is_alive()
