"""The asker's side of a request: its tokens as they come, their text, its end."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.request import Choice, Request, Status
from engine.text import Text


class Driver(Protocol):
    """What an answer needs of the engine."""

    inbox: "deque[tuple[str, Answer]]"
    decode: Callable[[Sequence[int]], str] | None

    def step(self) -> bool: ...


@dataclass(frozen=True)
class Piece:
    """Some new tokens, mostly one, and the text that has become certain by now."""

    choices: tuple[Choice, ...]
    text: str


class Answer:
    """Iterate over it for its pieces; result() waits for the end. Both raise the request's error, if it failed.

    choices: every token so far. Its text is decoded when the asker wants it, in the asker's time and not in the step's;
    except where a stop string is looked for. One thread reads it; that may be another than the engine's.
    """

    def __init__(self, engine: Driver, request: Request, listener: "Listener | None") -> None:
        self.engine, self.request, self.listener = engine, request, listener
        self.choices: list[Choice] = []
        self.read = self.written = 0  # of the choices: taken by __iter__, and handed to the writer
        self.writer = Text(engine.decode, request.sampling.stop) if engine.decode else None
        self.followers: list[Answer] = []

    @property
    def tokens(self) -> list[int]:
        return self.request.answer

    @property
    def text(self) -> str:
        """All of it so far."""
        self.catch_up()
        return self.writer.text if self.writer else ""

    def new_text(self) -> str:
        """What has become certain since it was last asked for."""
        self.catch_up()
        return self.writer.take() if self.writer else ""

    def catch_up(self) -> None:
        """Decode the tokens that are not decoded yet; with stop strings, the engine has done it."""
        if self.writer and not self.request.sampling.stop:
            self.decode_new()

    def decode_new(self) -> None:
        done = self.done  # asked first: a token may come meanwhile, but not after the end
        while self.written < len(self.choices):
            self.writer.add(self.choices[self.written].token)
            self.written += 1
        if done and not self.writer.ended:
            self.writer.end()

    @property
    def done(self) -> bool:
        return self.request.status is Status.DONE

    def __iter__(self) -> Iterator[Piece]:
        while not self.done or self.read < len(self.choices):
            new = tuple(self.choices[self.read :])
            if new:
                self.read += len(new)
                yield Piece(new, self.new_text())
            else:
                self.drive()
        if rest := self.new_text():
            yield Piece((), rest)
        if self.request.error is not None:
            raise self.request.error

    def result(self) -> "Answer":
        """Drive the engine until this answer is complete. Raises the request's error, if it failed."""
        while not self.done:
            self.drive()
        if self.request.error is not None:
            raise self.request.error
        return self

    def drive(self) -> None:
        if not self.engine.step() and not self.done:
            raise RuntimeError(f"request {self.request.number} waits, and the engine has nothing to do")

    def moved_to(self, engine: Driver) -> None:
        """Another engine goes on with it."""
        self.engine = engine
        for follower in self.followers:
            follower.engine = engine

    def cancel(self) -> None:
        """Stop it before the next step, wherever it stands. From any thread; nothing happens when it is done."""
        self.engine.inbox.append(("cancel", self))


Listener = Callable[[Answer, Choice | None], None]  # called with every choice, and with None at the end
