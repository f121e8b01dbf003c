"""Ways to serve the same requests by the same schedule. Each tells, for every request, when its asker had which token.

All run in this process, on the same threads, one way at a time, and with end tokens ignored, so that the work is the
same. (experiments/endpoint.py is the way to a server of another process.) Moments are seconds from the first due.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from batcher import DynamicBatcher
from engine.engine import Answer, Engine, Listener
from engine.request import Choice, Sampling
from lab.batch_trial import Served, run_trial
from lab.records import output_hash
from metrics import Stats
from model import Model, generate, ids_tensor
from tokenizer import left_pad

LEAD_S = 0.02  # between setting up and the first due moment


@dataclass(frozen=True)
class Load:
    """Prompts, how many new tokens each gets, and when each is due."""

    prompts: list[list[int]]
    new_tokens: list[int]
    dues_s: list[float]

    @property
    def useful(self) -> int:
        """Positions that must be computed: every token but the last of each answer."""
        return sum(len(p) + n - 1 for p, n in zip(self.prompts, self.new_tokens, strict=True))


@dataclass
class Moments:
    """Collects what happened. answers[i]: the new tokens of request i; token_s[i]: when its asker had each."""

    load: Load
    start_s: float = 0.0
    began_s: dict[int, float] = field(default_factory=dict)
    token_s: dict[int, list[float]] = field(default_factory=dict)
    answers: dict[int, list[int]] = field(default_factory=dict)

    def begin(self) -> None:
        self.start_s = time.perf_counter() + LEAD_S
        self.token_s = {i: [] for i in range(len(self.load.prompts))}

    def now(self) -> float:
        return time.perf_counter() - self.start_s

    def wait(self, until_s: float) -> None:
        while (left := until_s - self.now()) > 0:
            time.sleep(left)

    def trial(self, **more: Any) -> dict[str, Any]:
        count = range(len(self.load.prompts))
        rounded = [[round(moment, 6) for moment in self.token_s[i]] for i in count]
        found = {
            "due_s": [round(due, 6) for due in self.load.dues_s],
            "began_s": [round(self.began_s[i], 6) if i in self.began_s else None for i in count],
            "token_s": rounded,
            "done_s": [moments[-1] for moments in rounded],
            "useful_positions": self.load.useful,
        }
        if self.answers:
            found["new_tokens"] = sum(len(self.answers[i]) for i in count)
            found["answers"] = [output_hash(self.answers[i]) for i in count]
        return found | more


class Way(Protocol):
    """name: as tables print it. run: serve the load once."""

    name: str

    def run(self, load: Load) -> dict[str, Any]: ...


class OneByOne:
    """transformers' generate(), a request at a time, in the order in which they came."""

    name = "transformers, one by one"

    def __init__(self, model: Model) -> None:
        self.model, self.served = model, Served(lambda *_: [], model.net)

    def run(self, load: Load) -> dict[str, Any]:
        seen = Moments(load)
        with self.served.counting():
            seen.begin()
            for i, (prompt, new, due) in enumerate(zip(load.prompts, load.new_tokens, load.dues_s, strict=True)):
                seen.wait(due)
                seen.began_s[i] = seen.now()
                ids = ids_tensor([prompt]).to(self.model.device)
                out = self.model.net.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                    eos_token_id=None, pad_token_id=0, streamer=Watcher(seen, i),
                )  # fmt: skip
                seen.answers[i] = out[0, len(prompt) :].tolist()
        return seen.trial(computed_positions=self.served.positions)


class Watcher(BaseStreamer):
    """Hears of every token of one request. The first call is the prompt."""

    def __init__(self, seen: Moments, i: int) -> None:
        self.seen, self.i, self.prompt_came = seen, i, False

    def put(self, _tokens: Any) -> None:
        if self.prompt_came:
            self.seen.token_s[self.i].append(self.seen.now())
        self.prompt_came = True

    def end(self) -> None:
        pass


class StaticBatches:
    """Day 2's batcher. An asker gets the whole answer when the batch is done: nothing is streamed."""

    def __init__(self, model: Model, pad_id: int, size: int, window_ms: float) -> None:
        self.model, self.pad_id, self.cell = model, pad_id, (size, window_ms)
        self.name = f"Day 2's batcher, {size} at a time"

    def run(self, load: Load) -> dict[str, Any]:
        seen = Moments(load)
        seen.begin()
        limits = {id(prompt): new for prompt, new in zip(load.prompts, load.new_tokens, strict=True)}
        served = Served(lambda prompts, stats: self.answer(prompts, limits, stats, seen, load), self.model.net)
        trial = run_trial(DynamicBatcher, served, load.prompts, self.cell, load.dues_s)
        rows = {i: batch for batch in trial["batches"] for i in batch["members"]}
        for i, done in enumerate(trial["done_s"]):
            seen.token_s[i] = [done] * load.new_tokens[i]
            seen.began_s[i] = rows[i]["started_s"]
        return seen.trial(
            computed_positions=trial["computed_positions"], streamed=False,
            prefill_s=[rows[i]["prefill_s"] for i in range(len(load.prompts))],
        )  # fmt: skip

    def answer(self, prompts: Sequence[list[int]], limits: dict, stats: Stats, seen: Moments, load: Load) -> list:
        padded, mask = left_pad(prompts, self.pad_id)
        ids = ids_tensor(padded).to(self.model.device)
        new = generate(
            self.model, ids, None if all(map(all, mask)) else ids_tensor(mask).to(self.model.device),
            max_new_tokens=[limits[id(prompt)] for prompt in prompts], stats=stats,
        )  # fmt: skip
        places = {id(prompt): i for i, prompt in enumerate(load.prompts)}
        seen.answers |= {places[id(prompt)]: tokens for prompt, tokens in zip(prompts, new, strict=True)}
        return new


class TransformersContinuous:
    """transformers' own continuous batching. Its manager computes on a thread of its own."""

    name = "transformers, continuous"

    def __init__(self, model: Model, max_tokens: int) -> None:
        self.model, self.served = model, Served(lambda *_: [], model.net)
        self.settings = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=max_tokens)

    def run(self, load: Load) -> dict[str, Any]:
        seen = Moments(load)
        wish = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = self.model.net.init_continuous_batching(
            generation_config=wish, continuous_batching_config=self.settings
        )
        manager.start()
        try:
            manager.add_request(load.prompts[0], request_id="warm", max_new_tokens=2)
            while manager.get_result(timeout=60).request_id != "warm":
                pass
            with self.served.counting():
                seen.begin()
                asker = threading.Thread(target=self.ask, args=(manager, load, seen))
                asker.start()
                self.collect(manager, load, seen)
                asker.join()
        finally:
            manager.stop(block=True)
        return seen.trial(computed_positions=self.served.positions)

    def ask(self, manager: Any, load: Load, seen: Moments) -> None:
        for i, due in enumerate(load.dues_s):
            seen.wait(due)
            manager.add_request(load.prompts[i], request_id=str(i), max_new_tokens=load.new_tokens[i], streaming=True)

    def collect(self, manager: Any, load: Load, seen: Moments) -> None:
        while len(seen.answers) < len(load.prompts):
            result = manager.get_result(timeout=60)
            if result is None or result.error:
                raise RuntimeError(f"transformers' continuous batching failed: {result and result.error}")
            i, moment = int(result.request_id), seen.now()
            fresh = len(result.generated_tokens) - len(seen.token_s[i])
            seen.token_s[i] += [moment] * fresh
            if result.is_finished():
                seen.answers[i] = list(result.generated_tokens)


class OurEngine:
    """The engine of this house, driven by this thread.

    static: hand it so many requests at a time, and the next ones when all of those are done: the same arithmetic, with
    the batches of Day 2. 0 hands over each request when it is due.
    """

    def __init__(self, make: Callable[[], Engine], name: str = "this engine", static: int = 0) -> None:
        self.make, self.name, self.static = make, name, static

    def run(self, load: Load) -> dict[str, Any]:
        """A fresh engine each time: an empty prefix cache, counts from zero. The weights are the same."""
        engine, seen = self.make(), Moments(load)
        seen.begin()
        order = sorted(range(len(load.prompts)), key=load.dues_s.__getitem__)
        answers: dict[int, Answer] = {}
        while len(answers) < len(order) or any(not answer.done for answer in answers.values()):
            open_places = self.open_places(answers, len(order))
            while open_places and len(answers) < len(order) and load.dues_s[order[len(answers)]] <= seen.now():
                i = order[len(answers)]
                answers[i] = engine.submit(load.prompts[i], wish(load.new_tokens[i]), listener=self.heard(seen, i))
                open_places -= 1
            if not engine.step() and len(answers) < len(order):
                seen.wait(load.dues_s[order[len(answers)]])
        seen.answers = {i: answer.result().tokens for i, answer in answers.items()}
        zero = seen.start_s
        return seen.trial(
            computed_positions=engine.counts["computed"],
            stats=engine.stats(),
            timelines=[timeline(answers[i], zero) for i in range(len(order))],
            steps=[
                [round(moment - zero, 6) for moment in (s.start, s.planned, s.computed, s.end)] + [s.tokens, s.requests]
                for s in engine.steps
            ],
        )

    def open_places(self, answers: dict[int, Answer], all_of_them: int) -> int:
        """How many requests may be handed over now."""
        if not self.static:
            return all_of_them
        return 0 if any(not answer.done for answer in answers.values()) else self.static

    def heard(self, seen: Moments, i: int) -> Listener:
        def listener(_answer: Answer, choice: Choice | None) -> None:
            if choice is not None:
                seen.token_s[i].append(seen.now())

        return listener


def wish(new_tokens: int) -> Sampling:
    return Sampling(max_new_tokens=new_tokens, ignore_eos=True)


def timeline(answer: Answer, zero: float) -> dict[str, Any]:
    """A request's timeline as records keep it."""
    line = answer.request.timeline
    return {
        "arrived_s": round(line.arrived - zero, 6),
        "admitted_s": round(line.admitted - zero, 6),
        "slices": [[round(start - zero, 6), round(end - zero, 6), count] for start, end, count, _ in line.slices],
        "finished_s": round(line.finished - zero, 6),
        "preemptions": answer.request.preemptions,
    }
