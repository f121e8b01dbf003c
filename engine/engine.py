"""The engine: requests come in, every step moves each of them on, tokens go out as they are chosen.

    engine = load(EngineConfig())                      # engine/load.py
    answer = engine.submit(prompt, Sampling(max_new_tokens=50))
    for piece in answer:                               # drives the engine as far as needed
        print(piece.text, end="")

A step is: plan (scheduler), compute (runner), deliver (here). One thread calls step(); submit() and cancel() may be
called from any other, they only leave word for the next step.
"""

import itertools
import operator
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from engine.answer import Answer, Listener
from engine.request import Choice, Refusal, Request, Sampling, Status, StepFailed, Timeline
from engine.scheduler import Scheduler, Slice

STEPS_KEPT = 100_000


class Runner(Protocol):
    """What computes a plan. For each slice: the chosen token if the request has caught up, None if it has not, or the
    error that is this request's alone. An exception it raises is the failure of the whole plan; MemoryError says that
    a smaller one might succeed.
    """

    def run(self, slices: Sequence[Slice]) -> list[Choice | Exception | None]: ...

    def forget(self, request: Request) -> None: ...


@dataclass(frozen=True)
class StepTimes:
    """One step: when it started, was planned, was computed, had delivered (s); how many tokens of how many requests.

    context: tokens whose keys and values were read, of all requests together.
    """

    start: float
    planned: float
    computed: float
    end: float
    tokens: int
    requests: int
    context: int = 0


class Engine:
    """runner computes what scheduler plans. decode: ids -> text, None where nobody wants text.

    eos_ids end an answer. context and vocabulary: what the model can take, None where it names no limit.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, *, eos_ids: frozenset[int] = frozenset(),
        context: int | None = None, vocabulary: int | None = None,
        decode: Callable[[Sequence[int]], str] | None = None, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.runner, self.scheduler, self.clock, self.decode = runner, scheduler, clock, decode
        self.eos_ids, self.context, self.vocabulary = eos_ids, context, vocabulary
        self.inbox: deque[tuple[str, Answer]] = deque()  # append and popleft are atomic
        self.answers: dict[Request, Answer] = {}
        self.before_compute: Callable[[], object] = lambda: None  # the moment to let other threads of Python's work
        self.give_back: Callable[[Sequence[int]], object] = lambda _blocks: None  # their memory, to the system
        self.numbers = itertools.count()
        self.steps: deque[StepTimes] = deque(maxlen=STEPS_KEPT)
        self.counts = dict.fromkeys(
            ("steps", "requests", "computed", "delivered", "wasted", "reused", "failed_steps"), 0
        )

    # ---- asking

    def submit(
        self, prompt: Sequence[int], sampling: Sampling | None = None, *, salt: str = "",
        listener: Listener | None = None,
    ) -> Answer:  # fmt: skip
        """Queue a prompt of token ids. Refusal, at once, when it can never be served.

        listener: called in the engine's thread with every choice, and with None at the end. salt: requests of
        different salts share no prefix.
        """
        answer = self.prepared(prompt, sampling or Sampling(), salt, listener)
        self.inbox.append(("submit", answer))
        return answer

    def submit_many(self, prompt: Sequence[int], sampling: Sampling, n: int, **more: Any) -> list[Answer]:
        """n answers to one prompt; with a seed, the i-th has seed + i.

        The others are queued when the first has computed the prompt: they find it in the prefix cache.
        """
        answers = self.prepared_many(prompt, sampling, n, **more)
        self.queue(answers)
        return answers

    def prepared_many(self, prompt: Sequence[int], sampling: Sampling, n: int, **more: Any) -> list[Answer]:
        """The same, not queued yet."""
        if n < 1:
            raise Refusal(f"n must be at least 1, and is {n}.")
        seeds = [None if sampling.seed is None else sampling.seed + i for i in range(n)]
        first, *others = [self.prepared(prompt, replace(sampling, seed=seed), **more) for seed in seeds]
        first.followers = others
        return [first, *others]

    def queue(self, answers: Sequence[Answer]) -> None:
        """What was prepared together: the first now, the others follow it."""
        self.inbox.append(("submit", answers[0]))

    def hand_over_to(self, other: "Engine") -> None:
        """Give all that is unfinished to another engine on the same network, in the order in which it would have run.

        Tokens that are known stay known; their keys and values are computed again. This engine is not used any more.
        """
        unfinished = [self.answers[request] for request in (*self.scheduler.running, *self.scheduler.waiting)]
        for answer in unfinished:
            answer.request.restart()
            other.inbox.append(("submit", answer))
        while self.inbox:
            other.inbox.append(self.inbox.popleft())
        other.numbers = self.numbers  # two requests of one service never have the same
        for answer in (answer for _, answer in other.inbox):
            answer.moved_to(other)

    def prepared(
        self, prompt: Sequence[int], sampling: Sampling, salt: str = "",
        listener: Listener | None = None,
    ) -> Answer:  # fmt: skip
        try:
            tokens = list(map(operator.index, prompt))
        except TypeError as error:
            raise Refusal(f"A prompt is a list of token ids, whole numbers ({error}).") from error
        if not isinstance(salt, str):
            raise Refusal(f"salt must be a text, and is {salt!r}.")
        self.check_fits(tokens, sampling)
        request = Request(next(self.numbers), tokens, sampling, Timeline(self.clock()), salt)
        self.scheduler.check_fits(request)
        return Answer(self, request, listener)

    def check_fits(self, prompt: Sequence[int], sampling: Sampling) -> None:
        if not len(prompt):
            raise Refusal("The prompt is empty: give it at least one token.")
        if self.context is not None and len(prompt) + sampling.max_new_tokens > self.context:
            raise Refusal(
                f"A prompt of {len(prompt)} tokens and {sampling.max_new_tokens} new ones exceed the model's context "
                f"of {self.context}: shorten the prompt, or ask for less."
            )
        most = self.vocabulary
        if most is not None and not all(0 <= token < most for token in (*prompt, *sampling.logit_bias)):
            raise Refusal(f"Tokens must be from 0 to {most - 1}: the prompt or logit_bias holds another.")
        if sampling.stop and self.decode is None:
            raise Refusal("Stop strings need a tokenizer, and this engine was made without one: use stop_ids.")

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling],
        progress: Callable[[int], object] | None = None,
    ) -> list[Answer]:  # fmt: skip
        """All answers, in the order of the prompts; those that failed carry their error (answer.request.error).

        progress: told after every step how many more are complete (lab/console.py has a bar for it).
        """
        wishes = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        answers = [self.prepared(prompt, wish) for prompt, wish in zip(prompts, wishes, strict=True)]
        self.inbox.extend(("submit", answer) for answer in answers)  # all or none: a Refusal leaves nothing behind
        left = answers
        while left:
            self.step()
            going = [answer for answer in left if not answer.done]
            if progress and len(going) < len(left):
                progress(len(left) - len(going))
            left = going
        return answers

    # ---- the step

    def step(self) -> bool:
        """Plan, compute, deliver. False when there was nothing to do."""
        start = self.clock()
        self.read_inbox(start)
        slices = self.scheduler.plan(start)
        if not slices:
            return False
        planned = self.clock()
        self.before_compute()
        results = self.compute(slices)
        computed = self.clock()
        tokens = sum(part.count for part in slices)
        context = sum(part.start + part.count for part in slices)
        self.counts["steps"] += 1
        self.deliver(slices, results, start, computed)
        self.steps.append(StepTimes(start, planned, computed, self.clock(), tokens, len(slices), context))
        return True

    def read_inbox(self, now: float) -> None:
        while self.inbox:
            word, answer = self.inbox.popleft()
            if answer.done:
                continue
            if word == "submit":
                self.answers[answer.request] = answer
                self.scheduler.add(answer.request)
                self.counts["requests"] += 1
            else:
                self.finish(answer, "cancelled", now)

    def compute(self, slices: list[Slice]) -> list[Choice | Exception | None]:
        """The runner's results. A plan that does not fit in memory is tried once more, in two halves."""
        if len(slices) > 1 and any(part.request.alone for part in slices):
            return self.compute_apart(slices)
        try:
            return self.runner.run(slices)
        except MemoryError as error:
            if len(slices) == 1:
                return failed(slices, error)
            half = len(slices) // 2
            return self.attempt(slices[:half]) + self.attempt(slices[half:])
        except Exception as error:
            self.counts["failed_steps"] += 1
            return failed(slices, error)

    def compute_apart(self, slices: list[Slice]) -> list[Choice | Exception | None]:
        """First all that may share a pass, then each that may not: what that one fails on costs the others nothing."""
        passes = [[part for part in slices if not part.request.alone]]
        passes += [[part] for part in slices if part.request.alone]
        found = {
            part.request: result
            for parts in passes if parts
            for part, result in zip(parts, self.compute(parts), strict=True)
        }  # fmt: skip
        return [found[part.request] for part in slices]

    def attempt(self, slices: list[Slice]) -> list[Choice | Exception | None]:
        try:
            return self.runner.run(slices)
        except Exception as error:
            self.counts["failed_steps"] += not isinstance(error, MemoryError)
            return failed(slices, error)

    def deliver(self, slices: list[Slice], results: list, start: float, now: float) -> None:
        """Hand every request its token, or its error."""
        for part, result in zip(slices, results, strict=True):
            request, answer = part.request, self.answers[part.request]
            request.spent += part.count
            self.counts["computed"] += part.count  # here: whatever fails in between, the two agree
            request.timeline.slices.append((start, now, part.count, len(slices)))
            if isinstance(result, Exception):
                request.error = result
                self.finish(answer, "error", now)
            elif result is None:
                self.scheduler.computed(part)
            else:
                self.hand_over(answer, part, result, now)

    def hand_over(self, answer: Answer, part: Slice, choice: Choice, now: float) -> None:
        """One more token is known. It may be the last."""
        request, wish = answer.request, answer.request.sampling
        request.tokens.append(choice.token)
        self.scheduler.computed(part)  # not before: who has caught up, but has no next token, would never run again
        request.timeline.tokens.append(now)
        self.counts["delivered"] += 1
        answer.choices.append(choice)
        cut, reason = False, None
        if wish.stop:
            self.guarded(answer, answer.decode_new)
            cut = answer.writer.stopped_by is not None
        if cut or choice.token in wish.stop_ids or (choice.token in self.eos_ids and not wish.ignore_eos):
            reason = "stop"
        elif len(request.tokens) - len(request.prompt) >= wish.max_new_tokens:
            reason = "length"
        if answer.listener:
            self.guarded(answer, answer.listener, answer, choice)
        self.release_followers(answer)
        if request.error is not None:
            self.finish(answer, "error", now)
        elif reason:
            self.finish(answer, reason, now)

    def guarded(self, answer: Answer, do: Callable, *arguments: Any) -> None:
        """Its tokenizer and its listener are its own business: what they raise ends this answer and no other."""
        try:
            do(*arguments)
        except Exception as error:
            answer.request.error = answer.request.error or error

    def finish(self, answer: Answer, reason: str, now: float) -> None:
        """Whatever the reason: it holds no memory any more, and its books are closed."""
        request = answer.request
        useful = min(request.spent, request.computed - request.reused) if reason in ("stop", "length") else 0
        self.counts["wasted"] += request.spent - useful
        self.counts["reused"] += request.reused
        if request.sampling.stop and reason != "error":
            self.guarded(answer, answer.writer.end)
        request.finish_reason, request.timeline.finished = "error" if request.error else reason, now
        if request in self.answers:
            del self.answers[request]
            self.scheduler.remove(request)
        request.status = Status.DONE  # last: whoever reads in another thread finds all of it when it is done
        self.runner.forget(request)
        if answer.listener:
            self.guarded(answer, answer.listener, answer, None)
        self.release_followers(answer)

    def release_followers(self, answer: Answer) -> None:
        for follower in answer.followers:
            self.inbox.append(("submit", follower))
        answer.followers = []

    def drop_cache(self) -> None:
        """Forget the prefixes that no request holds, and give their memory back; in the thread that calls step()."""
        self.give_back(self.scheduler.blocks.drop())

    # ---- what it did

    def stats(self) -> dict[str, int]:
        """Counts since the start, and the state now; for the thread that calls step().

        Tokens: computed = useful + wasted once everything has ended. wasted: computed a second time after a preemption,
        or for an answer that failed or was cancelled. reused: prompt tokens found in the prefix cache. KV blocks: held
        by requests, cached (contents kept, nobody's), empty.
        """
        blocks, scheduler = self.scheduler.blocks, self.scheduler
        cached = sum(block in blocks.key_of for block in blocks.free)
        return self.counts | {
            "waiting": len(scheduler.waiting),
            "running": len(scheduler.running),
            "preemptions": scheduler.preemptions,
            "kv_blocks": blocks.count,
            "kv_blocks_held": blocks.count - len(blocks.free),
            "kv_blocks_cached": cached,
            "kv_blocks_empty": len(blocks.free) - cached,
        }


def failed(slices: Sequence[Slice], error: Exception) -> list[Exception]:
    """The same error for every request of a plan."""
    why = StepFailed(f"the forward pass failed ({type(error).__name__}: {error})")
    why.__cause__ = error
    return [why] * len(slices)
