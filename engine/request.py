"""What one request asks for, what is known and computed of it so far, and when each thing happened.

One rule drives the engine: computed tokens catch up with known tokens. Known are the prompt and every token chosen so
far; computed are those whose keys and values lie in the cache. A new request has a prompt to catch up with (prefill),
a running one a single token (decode); a reused prefix is a head start, and a preempted request starts over. Whenever
nothing is missing any more, the network's last output says what the next token is, and one more becomes known.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

MOST_LOGPROBS = 20
MOST_STOPS = 16
COLDEST = 1e-5  # below it, dividing by the temperature overflows; the likeliest token is what would be drawn anyway


class Refusal(ValueError):
    """A request that can never be served as it was asked for. One sentence: what is wrong, what to do."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop. The defaults: the likeliest token each time, until the end token.

    temperature: 0 (or below 1e-5) takes the likeliest; otherwise logits are divided by it. top_k (0: all), top_p,
    min_p: which tokens may be drawn at all. repetition_penalty (Keskar et al. 2019, arXiv 1909.05858) divides what
    occurred in prompt or answer; frequency_penalty and presence_penalty are subtracted for what occurred in the answer,
    per occurrence and once. logit_bias: token -> added. seed: the same seed gives the same answer, whoever shares the
    batch.
    logprobs: how many of the likeliest alternatives to tell for each token; 0 the chosen one's only, None nothing.
    stop: strings at which the answer is cut, themselves not in it. stop_ids: tokens that end it, as the end token does.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "logprobs"):
            value = getattr(self, name)
            if not (isinstance(value, int) or (value is None and name in ("seed", "logprobs"))):
                raise Refusal(f"{name} must be a whole number, and is {value!r}.")
        within("max_new_tokens", self.max_new_tokens, 1, 2**31)
        within("seed", self.seed or 0, 0, 2**63 - 1)
        within("temperature", self.temperature, 0, 100)
        within("top_k", self.top_k, 0, 2**31)
        within("top_p", self.top_p, 0, 1, open_below=True)
        within("min_p", self.min_p, 0, 1)
        within("repetition_penalty", self.repetition_penalty, 0, 100, open_below=True)
        within("frequency_penalty", self.frequency_penalty, -2, 2)
        within("presence_penalty", self.presence_penalty, -2, 2)
        within("logprobs", self.logprobs or 0, 0, MOST_LOGPROBS)
        for token, bias in self.logit_bias.items():
            within(f"logit_bias of token {token}", bias, -100, 100)
        if isinstance(self.stop, str) or len(self.stop) > MOST_STOPS or not all(self.stop):
            raise Refusal(f"stop takes a list of up to {MOST_STOPS} strings, none of them empty.")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST


def within(name: str, value: float, least: float, most: float, *, open_below: bool = False) -> None:
    """Refusal unless value is a finite number from least to most (above least, with open_below)."""
    if not math.isfinite(value) or value > most or value < least or (open_below and value == least):
        raise Refusal(f"{name} must be {'above' if open_below else 'from'} {least:g} to {most:g}, and is {value}.")


class BadLogits(ArithmeticError):
    """The network gave no usable numbers for a request."""


@dataclass(slots=True)
class Choice:
    """The chosen token; with logprobs asked for, its own log probability and the likeliest tokens with theirs.

    Log probabilities are the network's own, before penalties and temperature.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class StepFailed(RuntimeError):
    """The forward pass that a request was in raised an error; its text is in this one's."""


class Status(Enum):
    WAITING = "waiting"  # no memory of its own
    RUNNING = "running"  # holds blocks; computed in every step that has room for it
    DONE = "done"


@dataclass
class Timeline:
    """When things happened, in seconds of the engine's clock. slices: of every step that
    it took part in, start, end, its tokens that were computed, and how many requests shared the step.
    """

    arrived: float
    admitted: float | None = None
    slices: list[tuple[float, float, int, int]] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    finished: float | None = None


@dataclass(eq=False)
class Request:
    """One sequence of tokens on its way. Two requests are never equal: each is itself."""

    number: int
    prompt: list[int]
    sampling: Sampling
    timeline: Timeline
    salt: str = ""  # requests of different salts never share blocks of a prefix
    alone: bool = False  # it may be the end of a pass: computed in one of its own, behind the others'
    tokens: list[int] = field(init=False)  # all that are known: the prompt, then the answer
    computed: int = 0  # how many of them have keys and values in the cache
    blocks: list[int] = field(default_factory=list)  # where those lie, in order
    keys: list[bytes] = field(default_factory=list)  # the hash of each full block of tokens, as far as it was needed
    published: int = 0  # of its blocks, how many can be found by others
    reused: int = 0  # prompt tokens that were found in the cache when it was first admitted
    status: Status = Status.WAITING
    preemptions: int = 0
    spent: int = 0  # tokens computed for it, those computed twice counted twice
    finish_reason: str | None = None  # stop, length, cancelled or error
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    def restart(self) -> None:
        """Nothing of it is computed any more; what is known stays."""
        self.computed = self.published = 0
        self.blocks.clear()
        self.status = Status.WAITING

    @property
    def missing(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.tokens) - self.computed

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]
