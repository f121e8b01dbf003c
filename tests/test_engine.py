"""The engine: the same tokens as transformers whatever the schedule, and each failure kept to those it concerns."""

import random
import threading
from itertools import pairwise

import pytest

from engine.engine import Engine
from engine.kv_blocks import Blocks
from engine.request import BadLogits, Choice, Refusal, Sampling, StepFailed
from engine.scheduler import Scheduler


def next_of(tokens: list[int]) -> int:
    """What the fake network answers: a token that depends on every token before it."""
    return hash(tuple(tokens)) % 90


class FakeRunner:
    """Tokens by next_of(); raises what `faults` says, at the step of that number, or for a request's number."""

    def __init__(self, faults: dict | None = None, most_slices: int = 10**9) -> None:
        self.faults, self.most_slices, self.calls, self.sizes = faults or {}, most_slices, 0, []

    def run(self, slices):
        self.calls += 1
        self.sizes.append(len(slices))
        if self.calls in self.faults:
            raise self.faults[self.calls]
        if len(slices) > self.most_slices:
            raise MemoryError("too many")
        return [self.one(part) for part in slices]

    def one(self, part):
        request = part.request
        assert request.computed == part.start
        if f"request {request.number}" in self.faults:
            return self.faults[f"request {request.number}"]
        return Choice(next_of(request.tokens)) if part.last else None

    def forget(self, request) -> None:
        pass


class Clock:
    """Each look takes a millisecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def engine(runner=None, blocks: int = 64, reuse: bool = True, decode=None, **wishes) -> Engine:
    wishes = {"max_running": 8, "max_tokens": 64} | wishes
    scheduler = Scheduler(Blocks(blocks, reuse=reuse), **wishes)
    return Engine(
        runner or FakeRunner(), scheduler, eos_ids=frozenset({96}), context=256, vocabulary=97, decode=decode,
        clock=Clock(),
    )  # fmt: skip


def alone(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_of(tokens))
    return tokens[len(prompt) :]


def prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(90) for _ in range(dice.randrange(1, longest))] for _ in range(count)]


# ---- the same tokens whatever the schedule


@pytest.mark.parametrize("max_tokens", [8, 11, 24, 10_000])
@pytest.mark.parametrize("blocks", [6, 12, 64])
def test_answers_do_not_depend_on_budget_and_memory(max_tokens, blocks):
    asked = prompts(25)
    made = engine(blocks=blocks, max_tokens=max_tokens)
    answers = made.generate(asked, Sampling(max_new_tokens=20))
    assert [answer.tokens for answer in answers] == [alone(prompt, 20) for prompt in asked]
    assert made.scheduler.preemptions > 0 or blocks > 6
    made.scheduler.check()
    stats = made.stats()
    assert stats["kv_blocks_held"] == stats["waiting"] == stats["running"] == 0
    assert stats["delivered"] == 500
    # Every token is computed once but the last of each answer; what was computed again is called wasted.
    assert stats["computed"] == sum(map(len, asked)) + 25 * 19 - stats["reused"] + stats["wasted"]
    assert (stats["wasted"] == 0) == (made.scheduler.preemptions == 0)


def test_a_common_beginning_is_computed_once():
    shared = list(range(48))
    made = engine()
    first = made.submit([*shared, 1], Sampling(max_new_tokens=2)).result()
    second = made.submit([*shared, 2], Sampling(max_new_tokens=2)).result()
    salted = made.submit([*shared, 2], Sampling(max_new_tokens=2), salt="another tenant").result()
    assert [answer.request.reused for answer in (first, second, salted)] == [0, 48, 0]
    assert second.tokens == salted.tokens == alone([*shared, 2], 2)
    assert made.stats()["reused"] == 48
    cold = engine(reuse=False)
    cold.submit(shared, Sampling(max_new_tokens=1)).result()
    assert cold.submit(shared, Sampling(max_new_tokens=1)).result().request.reused == 0


def test_streamed_and_offline_answers_are_the_same():
    asked, offline, streamed = prompts(6), engine(), engine()
    whole = offline.generate(asked, Sampling(max_new_tokens=9))
    handles = [streamed.submit(prompt, Sampling(max_new_tokens=9)) for prompt in asked]
    told = [[choice.token for piece in handle for choice in piece.choices] for handle in handles]
    assert told == [answer.tokens for answer in whole]


def test_n_answers_wait_for_the_first_and_find_its_prompt():
    made = engine()
    answers = made.submit_many(list(range(40)), Sampling(max_new_tokens=3, seed=5), 3)
    assert [answer.request.sampling.seed for answer in answers] == [5, 6, 7]
    for answer in answers:
        answer.result()
    assert [answer.request.reused for answer in answers] == [0, 32, 32]


def test_n_answers_go_on_when_the_first_is_cancelled():
    made = engine()
    first, second = made.submit_many([1, 2, 3], Sampling(max_new_tokens=3), 2)
    first.cancel()
    assert second.result().tokens == alone([1, 2, 3], 3)
    assert first.request.finish_reason == "cancelled"


# ---- when an answer ends


def test_an_answer_ends_at_its_length_its_end_token_or_a_stop_token():
    made = engine()
    third = alone([1, 2], 8)[2]
    ended = made.submit([1, 2], Sampling(max_new_tokens=8, stop_ids=frozenset({third}))).result()
    assert (ended.tokens, ended.request.finish_reason) == (alone([1, 2], 3), "stop")
    made.eos_ids = frozenset({third})
    assert len(made.submit([1, 2], Sampling(max_new_tokens=8)).result().tokens) == 3
    full = made.submit([1, 2], Sampling(max_new_tokens=8, ignore_eos=True)).result()
    assert (full.tokens, full.request.finish_reason) == (alone([1, 2], 8), "length")


def test_a_stop_string_ends_the_answer_and_is_not_in_its_text():
    made = engine(decode=lambda ids: "".join(f"<{i}>" for i in ids))
    tokens = alone([1, 2], 8)
    stop = f"{tokens[2]}><{str(tokens[3])[0]}"  # begins inside one token and ends inside the next
    answer = made.submit([1, 2], Sampling(max_new_tokens=8, stop=(stop,)))
    shown = "".join(piece.text for piece in answer)
    assert shown == answer.text == f"<{tokens[0]}><{tokens[1]}><"
    assert (answer.tokens, answer.request.finish_reason) == (tokens[:4], "stop")


# ---- what is refused at once


@pytest.mark.parametrize(
    ("prompt", "wishes", "says"),
    [
        ([], {}, "empty"),
        ([1] * 200, {"max_new_tokens": 57}, "context of 256"),
        ([97], {}, "from 0 to 96"),
        ([-1], {}, "from 0 to 96"),
        ([1], {"logit_bias": {200: 1.0}}, "from 0 to 96"),
        ([1], {"stop": ("x",)}, "tokenizer"),
        ([1] * 60, {"max_new_tokens": 100}, "KV memory"),
    ],
    ids=str,
)
def test_what_can_never_be_served_is_refused_by_name(prompt, wishes, says):
    made = engine(blocks=8)
    with pytest.raises(Refusal, match=says):
        made.submit(prompt, Sampling(**wishes))
    assert not made.step()


# ---- cancelling


@pytest.mark.parametrize("steps", range(7))
def test_cancelled_at_any_stage_it_holds_nothing_and_disturbs_nobody(steps):
    made = engine(max_tokens=10, max_running=2)  # queued, in pieces of its prompt, decoding, done
    leaving, staying = made.submit(list(range(40)), Sampling(max_new_tokens=2)), made.submit([5], Sampling())
    for _ in range(steps):
        made.step()
    leaving.cancel()
    assert staying.result().tokens == alone([5], 128)
    assert leaving.request.finish_reason == ("length" if steps >= 5 else "cancelled")
    assert made.stats()["kv_blocks_held"] == 0
    leaving.cancel()  # again: nothing happens
    made.step()
    made.scheduler.check()


def test_a_listener_may_cancel_and_hears_the_end_once():
    made, heard = engine(), []

    def listener(answer, choice):
        heard.append(choice.token if choice else answer.request.finish_reason)
        if len(heard) == 3:
            answer.cancel()

    made.submit([1], Sampling(max_new_tokens=50), listener=listener).result()
    assert heard == [*alone([1], 3), "cancelled"]


def test_requests_may_come_from_other_threads():
    made, answers = engine(), []
    asked = prompts(40)
    ask = lambda part: [answers.append(made.submit(p, Sampling(max_new_tokens=4))) for p in part]  # noqa: E731
    threads = [threading.Thread(target=ask, args=(asked[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or not (
        len(answers) == 40 and all(answer.done for answer in answers)
    ):
        made.step()
    assert all(answer.tokens == alone(answer.request.prompt, 4) for answer in answers)


# ---- failures


def test_an_error_in_one_requests_sampler_fails_only_it():
    made = engine(FakeRunner({"request 1": BadLogits("nan")}))
    answers = made.generate([[1], [2], [3]], Sampling(max_new_tokens=3))
    assert [answer.request.finish_reason for answer in answers] == ["length", "error", "length"]
    with pytest.raises(BadLogits):
        answers[1].result()
    assert made.stats()["kv_blocks_held"] == 0


def test_a_failed_forward_pass_fails_its_requests_and_the_engine_goes_on():
    made = engine(FakeRunner({2: RuntimeError("kernel exploded")}), max_running=2)
    answers = made.generate([[1], [2], [3]], Sampling(max_new_tokens=3))
    assert [answer.request.finish_reason for answer in answers] == ["error", "error", "length"]
    assert answers[2].tokens == alone([3], 3)
    assert isinstance(answers[0].request.error, StepFailed)
    assert "kernel exploded" in str(answers[0].request.error)
    stats = made.stats()
    assert stats["kv_blocks_held"] == 0
    assert stats["wasted"] == 4  # a prompt token and a decoded one of each


@pytest.mark.parametrize("at", [1, 3, "the end"])
def test_a_listener_that_fails_fails_its_own_request_only(at):
    heard = []

    def broken(_answer, choice):
        heard.append(choice)
        if len(heard) == at or (choice is None and at == "the end"):
            raise OSError("the client is gone")

    made = engine()
    bad = made.submit([1], Sampling(max_new_tokens=5), listener=broken)
    good = made.submit([2], Sampling(max_new_tokens=5))
    assert good.result().tokens == alone([2], 5)
    assert isinstance(bad.request.error, OSError)
    assert bad.request.finish_reason == ("length" if at == "the end" else "error")
    assert made.stats()["kv_blocks_held"] == 0
    made.scheduler.check()


def test_a_tokenizer_that_fails_fails_its_own_request_only():
    def decode(ids):
        if 96 in ids:
            raise ValueError("no such token")
        return ""

    third = alone([1], 3)[2]
    made = engine(decode=lambda ids: decode([96]) if third in ids else "")
    bad = made.submit([1], Sampling(max_new_tokens=5, stop=("x",)))
    good = made.submit([2], Sampling(max_new_tokens=5))
    assert good.result().tokens == alone([2], 5)
    assert bad.request.finish_reason == "error"
    assert made.stats()["kv_blocks_held"] == 0


def test_an_answer_that_nobody_can_compute_is_said_and_not_waited_for():
    made = engine()
    answer = made.submit([1])
    made.inbox.clear()  # as if the word had been lost
    with pytest.raises(RuntimeError, match="nothing to do"):
        answer.result()


def test_too_little_memory_halves_the_batch_once():
    runner = FakeRunner(most_slices=2)
    answers = engine(runner).generate([[1], [2], [3], [4]], Sampling(max_new_tokens=2))
    assert [answer.tokens for answer in answers] == [alone([i], 2) for i in (1, 2, 3, 4)]
    assert runner.sizes == [4, 2, 2, 4, 2, 2]
    hopeless = engine(FakeRunner(most_slices=1)).generate([[1], [2], [3], [4], [5]], Sampling(max_new_tokens=2))
    assert {answer.request.finish_reason for answer in hopeless} == {"error"}
    single = engine(FakeRunner(most_slices=0))
    with pytest.raises(StepFailed, match="MemoryError"):
        single.submit([1]).result()


# ---- time


def test_every_moment_of_a_request_is_accounted_for():
    made = engine(max_tokens=16, max_running=4)
    answers = made.generate(prompts(10), Sampling(max_new_tokens=5))
    for answer in answers:
        line = answer.request.timeline
        assert line.arrived < line.admitted <= line.slices[0][0]
        assert line.finished == line.slices[-1][1] == line.tokens[-1]
        assert all(before[1] <= after[0] for before, after in pairwise(line.slices))
        assert sum(count for _, _, count, _ in line.slices) == answer.request.spent
        assert len(line.tokens) == 5
        assert set(line.tokens) <= {end for _, end, *_ in line.slices}
    steps = list(made.steps)
    assert all(step.start < step.planned < step.computed < step.end for step in steps)
    assert sum(step.tokens for step in steps) == made.stats()["computed"]


def test_nobody_starves_behind_a_stream_of_short_prompts():
    made = engine(max_tokens=16, max_running=4)
    long = made.submit(list(range(80)), Sampling(max_new_tokens=2))
    dice = random.Random(0)
    for _ in range(60):
        made.submit([dice.randrange(90)], Sampling(max_new_tokens=2))
        made.step()
    assert long.done
    assert long.request.timeline.finished < 0.1


def test_a_long_queue_does_not_slow_a_step():
    """Steps are counted in looks at the plan, not in time: a step touches those it runs, not those who wait."""
    made = engine(max_running=2, max_tokens=4)
    for _ in range(1000):
        made.submit([1, 2, 3], Sampling(max_new_tokens=2))
    made.step()
    waiting = made.scheduler.waiting
    assert len(waiting) == 998

    class Watched(type(waiting)):
        def __iter__(self):
            raise AssertionError("a step looked through the queue")

    made.scheduler.waiting = Watched(waiting)
    for _ in range(10):
        made.step()


# ---- what a careless asker may do


@pytest.mark.parametrize("prompt", [[1.5] * 20, ["a"], [None, 1], 7], ids=str)
def test_a_prompt_that_is_no_list_of_ids_is_refused_and_holds_up_nobody(prompt):
    made = engine()
    with pytest.raises(Refusal, match="whole numbers"):
        made.submit(prompt)
    with pytest.raises(Refusal, match="salt"):
        made.submit([1], salt=None)
    assert made.submit([1, 2], Sampling(max_new_tokens=3)).result().tokens == alone([1, 2], 3)


@pytest.mark.parametrize(
    "wishes",
    [{"max_new_tokens": 2.5}, {"top_k": 1.5}, {"seed": 0.5}, {"seed": -1}, {"logprobs": 1.5}, {"stop": "END"}],
    ids=str,
)
def test_wishes_that_are_no_whole_numbers_or_no_list_are_refused(wishes):
    with pytest.raises(Refusal):
        Sampling(**wishes)


def test_many_prompts_are_queued_all_or_none():
    made = engine()
    with pytest.raises(Refusal, match="empty"):
        made.generate([[1], [2], []], Sampling())
    assert not made.step() and made.stats()["requests"] == 0


def test_nobody_asks_for_no_answers():
    with pytest.raises(Refusal, match="at least 1"):
        engine().submit_many([1], Sampling(), 0)


def test_reading_a_failed_answer_raises_its_error_after_its_text():
    made, seen = engine(FakeRunner({3: RuntimeError("forward")})), []
    with pytest.raises(StepFailed, match="forward"):
        for piece in made.submit([1, 2], Sampling(max_new_tokens=8)):
            seen += piece.choices
    assert [choice.token for choice in seen] == alone([1, 2], 2)


def test_what_was_held_back_comes_when_an_answer_is_cancelled():
    made = engine(decode=lambda ids: "E" * len(ids))
    answer, shown = made.submit([1, 2], Sampling(max_new_tokens=40, stop=("E" * 30 + "!",))), ""
    for piece in answer:
        shown += piece.text
        if len(answer.choices) == 5:
            answer.cancel()
    assert shown == answer.text == "E" * 5


def test_a_listener_hears_the_end_though_the_tokenizer_failed():
    def decode(ids):
        if len(ids) > 1:
            raise UnicodeError("no such token")
        return "x"

    heard = []
    made = engine(decode=decode)
    answer = made.submit([1, 2], Sampling(max_new_tokens=8, stop=("y",)), listener=lambda _, c: heard.append(c))
    while made.step():
        pass
    assert heard[-1] is None and heard.count(None) == 1
    assert isinstance(answer.request.error, UnicodeError) and answer.request.finish_reason == "error"
    assert made.stats()["wasted"] == made.stats()["computed"]


def test_an_interruption_while_tokens_are_handed_over_loses_nobody():
    """Ctrl-C in a notebook: the next step goes on where this one stopped."""
    made, interrupts = engine(), [KeyboardInterrupt()]

    def listener(*_):
        if interrupts:
            raise interrupts.pop()

    first = made.submit([1, 2], Sampling(max_new_tokens=6), listener=listener)
    second = made.submit([3, 4], Sampling(max_new_tokens=6))
    with pytest.raises(KeyboardInterrupt):
        made.step()
    assert (first.result().tokens, second.result().tokens) == (alone([1, 2], 6), alone([3, 4], 6))
    made.scheduler.check()
