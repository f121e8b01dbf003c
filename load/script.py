"""What a golden server can be told to do: its moments, its manners, and what goes wrong."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from config import Settings, UserError, knob

MODEL = "golden"


class Fault(StrEnum):
    """What goes wrong. Where an answer is said to break, that is after its first Script.after pieces of text."""

    meaning: str

    def __new__(cls, name: str, meaning: str) -> "Fault":
        fault = str.__new__(cls, name)
        fault._value_, fault.meaning = name, meaning
        return fault

    REFUSE = "refuse", "nothing listens at the address"
    TLS = "tls", "the address says https, and the port speaks plain HTTP"
    WRONG_MODEL = "wrong_model", "404: there is no such model"
    TOO_MANY = "429", "too many requests, with Retry-After"
    UNAVAILABLE = "503", "overloaded, with Retry-After"
    HTML_500 = "500", "a proxy's page in HTML, where JSON is expected"
    HANG = "hang", "the request is read, and nothing is ever answered"
    SLOW_HEADERS = "slow_headers", "one half of the head comes at once, the other with the first token"
    HANG_MIDWAY = "hang_midway", "it breaks off, and the connection stays open"
    DIE = "die", "it breaks off, and the connection is reset"
    CUT = "cut", "it breaks off, and the connection is closed, as if all had been said"
    NO_DONE = "no_done", "everything comes but the last event, [DONE]"
    MALFORMED = "malformed", "one event is no JSON; what follows is whole"
    ERROR_EVENT = "error_event", "an event tells of an error, and the stream ends in order"
    NOT_A_STREAM = "not_a_stream", "one JSON body, though a stream was asked for"
    EMPTY = "empty", "the role and empty pieces, and not one token"


@dataclass(frozen=True)
class Script(Settings):
    """What every answer does. Moments are counted from the request's arrival, so that delays do not add up."""

    first_s: float = knob(0.05, "seconds from the request to the first token", least=0)
    gap_s: float = knob(0.01, "seconds between two pieces of text", least=0)
    tokens: int | None = knob(None, "new tokens of every answer; by default as many as the request allows")
    per_chunk: int = knob(1, "tokens of a piece of text", least=1)
    role_chunk: bool = knob(True, "whether the role comes before the text", flags={"--no-role-chunk": False})
    usage: bool = knob(True, "whether who asks for usage gets it", flags={"--no-usage": False})
    done: bool = knob(True, "whether a stream's last event is [DONE]", flags={"--no-done": False})
    stream: bool = knob(True, "whether who asks for a stream gets one", flags={"--no-stream": False})
    queue_s: float | None = knob(None, "of the seconds to the first token, those said to be spent in a queue")
    fault: str | None = knob(None, "what goes wrong", choices=tuple(map(str, Fault)))
    after: int = knob(2, "pieces of text before the fault", least=0)
    times: int | None = knob(None, "only so many requests meet the fault; by default all do")
    retry_after_s: int = knob(1, "what Retry-After says, in seconds", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue_s is not None and self.queue_s > self.first_s:
            raise UserError(
                f"--queue-s {self.queue_s:g} is a part of --first-s and cannot be longer: it is {self.first_s:g}."
            )

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Numbers that may be missing come as text. UserError."""
        kinds = {"tokens": int, "queue_s": float, "times": int}
        return given | {name: number(given[name], name, kind) for name, kind in kinds.items() if name in given}


NULL = Script(first_s=0.0, gap_s=0.0)  # no delays: how fast can a client be?


def number(text: str, name: str, kind: type) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not value >= 0:  # nor NaN
        raise UserError(f"--{name.replace('_', '-')} takes a number from 0 on, and was given {text!r}.")
    return value
