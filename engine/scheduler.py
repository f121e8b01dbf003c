"""Who computes how many tokens in the next step. Plain Python on integers.

Continuous batching (Orca, Yu et al., OSDI 2022): requests join and leave between steps, none waits for a batch to end.
A step has a budget of tokens. Those who only miss one token (decode) come first, so that nobody's answer stalls behind
a long prompt; what is left of the budget goes to prompts, in pieces where they are long (Sarathi-Serve, Agrawal et al.,
OSDI 2024). When memory runs out, the request admitted last gives up its blocks and starts over later: its tokens
are known, so nothing is lost but work.
"""

from collections import deque
from dataclasses import dataclass

from engine.kv_blocks import Blocks
from engine.request import Refusal, Request, Status


@dataclass(slots=True)  # not frozen: a step makes some dozens of these, and those take three times as long to make
class Slice:
    """Compute the request's tokens from start to start + count; their keys and values go to its blocks."""

    request: Request
    start: int
    count: int

    @property
    def last(self) -> bool:
        """Whether the request has caught up after it, so that its next token is to be chosen."""
        return self.start + self.count == len(self.request.tokens)


class Scheduler:
    """max_running: requests that may hold memory at once. max_tokens: computed in one step.

    chunked: whether a prompt may be computed in pieces; if not, it waits for a step that has room for all of it (or is
    computed alone, when it is longer than any step).
    """

    def __init__(self, blocks: Blocks, *, max_running: int, max_tokens: int, chunked: bool = True) -> None:
        if max_running < 1 or max_tokens < max_running:
            raise ValueError(f"max_tokens ({max_tokens}) must be at least max_running ({max_running}), and that 1")
        self.blocks, self.max_running, self.max_tokens, self.chunked = blocks, max_running, max_tokens, chunked
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of their admission
        self.preemptions = 0

    def check_fits(self, request: Request) -> None:
        """Refusal when it could never run, even alone: it would wait for ever."""
        most = len(request.prompt) + request.sampling.max_new_tokens - 1  # the last token is never computed
        room = self.blocks.count * self.blocks.size
        if self.blocks.needed(most) > self.blocks.count:
            raise Refusal(f"{most} tokens do not fit the {room} of the KV memory: shorten the prompt or the answer.")

    def add(self, request: Request) -> None:
        """Queue it. Refusal when it can never run."""
        self.check_fits(request)
        self.waiting.append(request)

    def plan(self, now: float = 0.0) -> list[Slice]:
        """The next step: at most one slice for each request, within the budget and the memory there is."""
        slices: dict[Request, Slice] = {}
        left = self.max_tokens
        for request in sorted(self.running, key=lambda one: one.missing > 1):  # stable: then by admission
            if request.status is Status.RUNNING:  # else it was preempted a moment ago
                left -= self.give(request, left, slices)
        while self.waiting and len(self.running) < self.max_running and left > 0:
            if not self.admit(self.waiting[0], left, slices, now):
                break  # nobody overtakes: the first in the queue would starve
            left -= slices[self.running[-1]].count
        return list(slices.values())

    def give(self, request: Request, left: int, slices: dict[Request, Slice]) -> int:
        """Plan the request's missing tokens, as many as fit; the change in the budget that is left."""
        count = self.share(request.missing, left, alone=not slices)
        if count == 0:
            return 0
        freed = 0
        while not self.blocks.grow(request, request.computed + count):
            victim = self.running[-1]
            freed += slices.pop(victim).count if victim in slices else 0
            self.preempt(victim)
            if victim is request:
                return -freed
        slices[request] = Slice(request, request.computed, count)
        return count - freed

    def share(self, missing: int, left: int, alone: bool) -> int:
        """How many of the missing tokens a step takes that has room for so many."""
        if self.chunked or missing <= left:
            return min(missing, left)
        return missing if alone and left == self.max_tokens else 0

    def admit(self, request: Request, left: int, slices: dict[Request, Slice], now: float) -> bool:
        """Let the first of the queue run, when there is memory for all that is known of it."""
        found = self.blocks.reuse_prefix(request)
        count = self.share(len(request.tokens) - found, left, alone=not slices)
        if count == 0 or not self.blocks.grow(request, len(request.tokens)):
            self.blocks.release(request)
            return False
        request.computed = found
        if request.timeline.admitted is None:
            request.timeline.admitted, request.reused = now, found
        request.status = Status.RUNNING
        self.waiting.popleft()
        self.running.append(request)
        slices[request] = Slice(request, found, count)
        return True

    def preempt(self, request: Request) -> None:
        """Take its memory and put it first in the queue. It will compute all its tokens again."""
        self.running.remove(request)
        self.blocks.release(request)
        request.restart()
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def computed(self, part: Slice) -> None:
        """The step was done: these tokens have their keys and values now."""
        part.request.computed = part.start + part.count
        self.blocks.publish(part.request)

    def remove(self, request: Request) -> None:
        """It is done, cancelled or failed: wherever it stood, it holds nothing any more."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self.blocks.release(request)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        request.status = Status.DONE

    def check(self) -> None:
        """AssertionError unless all that must be true is."""
        self.blocks.check(self.running)
        assert len(self.running) <= self.max_running
        assert all(request.status is Status.RUNNING for request in self.running)
        assert all(request.status is Status.WAITING and not request.blocks for request in self.waiting)
        assert all(0 <= request.computed <= len(request.tokens) for request in self.running)
