"""Scheduler and blocks without a network: whatever comes, every block is accounted for and everybody gets an answer."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.kv_blocks import Blocks
from engine.request import Refusal, Request, Sampling, Status, Timeline
from engine.scheduler import Scheduler


class Fake:
    """A runner that computes nothing but writes down what lies where, and finds out when something else is read."""

    def __init__(self, blocks: int = 12, size: int = 4, *, reuse: bool = True, **limits) -> None:
        self.blocks = Blocks(blocks, size, reuse=reuse)
        self.scheduler = Scheduler(self.blocks, **{"max_running": 4, "max_tokens": 16} | limits)
        self.memory: dict[tuple[int, int], tuple] = {}  # (block, place in it) -> (salt, all tokens up to this one)
        self.requests: list[Request] = []

    def submit(self, prompt: list[int], new: int = 3, salt: str = "") -> Request:
        request = Request(len(self.requests), prompt, Sampling(max_new_tokens=new), Timeline(0.0), salt)
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def step(self) -> list[tuple[int, int, int]]:
        """One step; what was computed, as (request, start, count)."""
        slices = self.scheduler.plan()
        for part in slices:
            for i in range(part.start):
                assert self.memory[self.place(part.request, i)] == self.content(part.request, i), (
                    "read another's tokens"
                )
            for i in range(part.start, part.start + part.count):
                self.memory[self.place(part.request, i)] = self.content(part.request, i)
        caught_up = [part.request for part in slices if part.last]
        for part in slices:
            self.scheduler.computed(part)
        for request in caught_up:
            request.tokens.append(sum(request.tokens) % 5)
            if len(request.answer) == request.sampling.max_new_tokens:
                self.scheduler.remove(request)
        self.scheduler.check()
        return [(part.request.number, part.start, part.count) for part in slices]

    def place(self, request: Request, i: int) -> tuple[int, int]:
        return request.blocks[i // self.blocks.size], i % self.blocks.size

    def content(self, request: Request, i: int) -> tuple:
        return request.salt, tuple(request.tokens[: i + 1])

    def finish(self) -> int:
        """Steps until everybody has an answer."""
        for count in range(10_000):
            if all(request.status is Status.DONE for request in self.requests):
                return count
            assert self.step(), "requests wait and nothing is computed"
        raise AssertionError("10,000 steps were not enough")


# ---- traces worked out by hand


def test_a_request_catches_up_with_its_prompt_and_then_token_by_token():
    fake = Fake()
    fake.submit([1, 2, 3, 4, 5], new=3)
    assert [fake.step() for _ in range(3)] == [[(0, 0, 5)], [(0, 5, 1)], [(0, 6, 1)]]
    assert fake.requests[0].status is Status.DONE and len(fake.blocks.free) == 12
    assert fake.step() == []


def test_a_long_prompt_is_cut_and_whoever_decodes_goes_first():
    fake = Fake(blocks=40, max_tokens=8)
    fake.submit([1] * 3, new=9)
    assert fake.step() == [(0, 0, 3)]
    fake.submit(list(range(20)), new=2)
    assert fake.step() == [(0, 3, 1), (1, 0, 7)]
    assert fake.step() == [(0, 4, 1), (1, 7, 7)]
    assert fake.step() == [(0, 5, 1), (1, 14, 6)]  # caught up: the next step decodes both
    assert fake.step() == [(0, 6, 1), (1, 20, 1)]


def test_without_chunks_a_prompt_waits_for_a_step_with_room_for_all_of_it():
    fake = Fake(blocks=40, max_tokens=8, chunked=False)
    fake.submit([1] * 3, new=2)
    fake.submit([2] * 6, new=1)
    assert fake.step() == [(0, 0, 3)]  # 6 do not fit into the 5 that are left
    assert fake.step() == [(0, 3, 1), (1, 0, 6)]
    fake.submit([3] * 30, new=1)
    assert fake.step() == [(2, 0, 30)]  # longer than any step: alone


def test_a_known_prefix_is_not_computed_again():
    fake = Fake()
    fake.submit([1, 2, 3, 4, 5, 6, 7, 8, 9], new=1)
    fake.step()
    again = fake.submit([1, 2, 3, 4, 5, 6, 7, 8, 9], new=1)
    other = fake.submit([1, 2, 3, 4, 0, 0], new=1)
    salted = fake.submit([1, 2, 3, 4, 5, 6, 7, 8, 9], new=1, salt="another key")
    assert fake.step() == [(1, 8, 1), (2, 4, 2), (3, 0, 9)]
    assert (again.reused, other.reused, salted.reused) == (8, 4, 0)


def test_the_last_token_of_a_known_prompt_is_computed_all_the_same():
    """Its output says what comes next. Eight tokens are two full blocks, but only one is reused."""
    fake = Fake()
    for _ in range(2):
        fake.submit([1, 2, 3, 4, 5, 6, 7, 8], new=1)
        fake.finish()
    assert fake.requests[1].reused == 4


def test_two_that_run_together_share_nothing_until_one_has_published():
    fake = Fake()
    fake.submit([1] * 8, new=1)
    fake.submit([1] * 8, new=1)
    assert fake.step() == [(0, 0, 8), (1, 0, 8)]
    assert len(fake.blocks.block_at) == 2  # the same contents are found at one place only


def test_the_youngest_gives_way_when_memory_runs_out_and_finishes_later():
    fake = Fake(blocks=4, size=2, reuse=False)
    fake.submit([1, 2, 3], new=4)  # 2 blocks, a third for its sixth token
    fake.submit([4, 5, 6], new=4)
    assert fake.step() == [(0, 0, 3), (1, 0, 3)]
    assert fake.step() == [(0, 3, 1), (1, 3, 1)]
    assert fake.step() == [(0, 4, 1)]  # a fifth place for each: the second one is sent back
    assert fake.requests[1].preemptions == 1 and fake.scheduler.waiting[0] is fake.requests[1]
    fake.finish()
    assert [len(request.answer) for request in fake.requests] == [4, 4]


def test_blocks_that_nobody_holds_are_taken_oldest_first():
    fake = Fake(blocks=4, size=2)
    for prompt in ([1, 1, 1], [2, 2, 2]):
        fake.submit(prompt, new=1)
        fake.finish()
    fake.submit([3, 3, 3, 3, 3], new=1)  # three blocks: both that hold nothing of use, and the oldest
    fake.finish()
    fake.submit([2, 2, 2], new=1)
    fake.submit([1, 1, 1], new=1)
    fake.finish()
    assert [request.reused for request in fake.requests[-2:]] == [2, 0]


def test_what_can_never_run_is_refused_at_once():
    fake = Fake(blocks=4, size=4)
    fake.submit([1] * 10, new=7)  # 16 tokens are computed: the last one is not
    with pytest.raises(Refusal, match="17 tokens do not fit the 16 of the KV memory"):
        fake.submit([1] * 10, new=8)
    assert len(fake.requests) == 1 and fake.finish()


def test_nobody_overtakes_a_request_that_waits_for_memory():
    fake = Fake(blocks=6, size=2, reuse=False)
    fake.submit([1] * 7, new=3)
    fake.step()
    fake.submit([2] * 8, new=1)  # four blocks, two are free
    fake.submit([3] * 2, new=1)
    assert fake.step() == [(0, 7, 1)]
    fake.finish()


def test_a_cancelled_request_holds_nothing_wherever_it_stood():
    fake = Fake(max_running=1)
    for _ in range(2):
        fake.submit([1, 2, 3])
    fake.step()
    for request in fake.requests:
        fake.scheduler.remove(request)
        fake.scheduler.check()
    assert len(fake.blocks.free) == 12 and not fake.scheduler.waiting and fake.step() == []


@pytest.mark.parametrize("mistake", ["lost", "twice", "shared"])
def test_check_notices(mistake):
    fake = Fake()
    one, two = fake.submit([1] * 6), fake.submit([2] * 6)
    fake.step()
    if mistake == "lost":
        one.blocks.pop()
    elif mistake == "twice":
        one.blocks[1] = one.blocks[0]
    else:
        one.blocks[0] = two.blocks[0]
    with pytest.raises(AssertionError):
        fake.scheduler.check()


def test_long_and_short_prompts_all_finish_in_about_the_steps_they_need():
    rng = random.Random(1)
    fake = Fake(blocks=60, size=4, max_running=8, max_tokens=16)
    for i in range(200):
        fake.submit([rng.randrange(5) for _ in range(100 if i % 10 == 0 else 5)], new=5)
    tokens = sum(len(request.prompt) + 4 for request in fake.requests)
    assert fake.finish() < 3 * tokens / 16 + 200


# ---- anything, in any order


class Anything(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(6, 14), size=st.integers(1, 5), running=st.integers(1, 5), more=st.integers(0, 12),
        chunked=st.booleans(), reuse=st.booleans(),
    )  # fmt: skip
    def begin(self, blocks, size, running, more, chunked, reuse):
        self.fake = Fake(blocks, size, reuse=reuse, max_running=running, max_tokens=running + more, chunked=chunked)

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        new=st.integers(1, 8),
        salt=st.sampled_from(["", "", "a"]),
    )
    def submit(self, prompt, new, salt):
        fits = self.fake.blocks.needed(len(prompt) + new - 1) <= self.fake.blocks.count
        try:
            self.fake.submit(prompt, new, salt)
            assert fits
        except Refusal:
            assert not fits

    @rule()
    def step(self):
        computed = self.fake.step()
        assert len({number for number, _, _ in computed}) == len(computed)
        budget = self.fake.scheduler.max_tokens
        assert sum(count for _, _, count in computed) <= budget or (
            not self.fake.scheduler.chunked and len(computed) == 1
        )

    @precondition(lambda self: self.fake.requests)
    @rule(which=st.integers(0, 100))
    def cancel(self, which):
        self.fake.scheduler.remove(self.fake.requests[which % len(self.fake.requests)])

    @invariant()
    def nothing_is_lost(self):
        if hasattr(self, "fake"):
            self.fake.scheduler.check()

    def teardown(self):
        if hasattr(self, "fake"):
            self.fake.finish()
            assert len(self.fake.blocks.free) == self.fake.blocks.count


TestAnything = pytest.mark.slow(Anything.TestCase)
TestAnything.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
