"""What is asked: request bodies of a wanted prompt length, none of which a prefix cache has seen.

Every prompt begins with a mark of its own, made from the run's nonce and the number of the request. A server that keeps
prefixes would else answer the second run, or the second request, from its cache, and what is measured is not prefill.
Where reuse is the question, shared_prefix() and conversations() make exactly the reuse that is meant.
"""

import hashlib
import json
import random
import secrets
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from config import UserError
from lab.arrivals import json_rows, text_of
from load.texts import WORDS, Counted, about

Body = dict[str, Any]
Messages = list[dict[str, str]]
KINDS = ("completions", "chat")
MARK_IDS = 8  # so many random ids are as good as a mark


class Shape(Protocol):
    """How long a request and its answer are to be. A file's prompts have their own length."""

    prompt_tokens: int | None
    new_tokens: int


class Prompts:
    """The bodies of a run.

    kind: completions, or chat, where tokens means the text's, since only the server knows what its template adds.
    tokenizer: a folder with tokenizer.json, for exact lengths; without it they are about right, and usage counts them.
    file: prompts to ask instead, in turn. ids: token ids instead of text (completions only).
    eos: let answers end where the model ends them; also for servers that refuse the field ignore_eos.
    nonce: by default a new one; "" for none, to ask the very same prompts again.
    """

    def __init__(
        self, kind: str, model: str, seed: int, tokenizer: str | Path | None = None, *, file: str | Path | None = None,
        eos: bool = False, ids: bool = False, stream: bool = True, nonce: str | None = None,
    ) -> None:  # fmt: skip
        if kind not in KINDS:
            raise UserError(f"Prompts are for {' or '.join(KINDS)}, and not for {kind!r}.")
        if ids and (kind == "chat" or tokenizer is None):
            raise UserError("Token ids are for completions, and need the model's tokenizer: name its folder.")
        self.kind, self.model, self.seed, self.eos, self.stream = kind, model, seed, eos, stream
        self.counted = Counted(tokenizer, special=kind == "completions" and not ids) if tokenizer is not None else None
        self.pool = self.counted.pool() if ids and self.counted else None
        self.lines = from_file(file, kind) if file is not None else None
        self.nonce = secrets.token_hex(4) if nonce is None else nonce
        self.numbers = count()

    @property
    def exact(self) -> bool:
        """Whether a prompt has exactly the tokens that were asked."""
        return self.counted is not None and self.lines is None

    @property
    def hash(self) -> str:
        """Twelve hex digits over all that decides what is asked, but for the lengths, the model's name and the nonce.

        Equal hashes and equal loads mean equal work: the prompts differ in their marks only.
        """
        decides = {
            "kind": self.kind, "seed": self.seed, "eos": self.eos, "ids": self.pool is not None, "words": WORDS,
            "tokenizer": self.counted.digest if self.counted else None, "lines": self.lines,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]

    def of(self, shape: Shape, number: int) -> list[Body]:
        """So many bodies of one shape. To be called before the clock starts: it may tokenise much text."""
        return [self.body(shape.prompt_tokens, shape.new_tokens) for _ in range(number)]

    def body(self, prompt_tokens: int | None, new_tokens: int) -> Body:
        """The next request. UserError where no length is known."""
        i = next(self.numbers)
        if self.lines is not None:
            return self.asking(marked(self.lines[i % len(self.lines)], self.mark(i)), new_tokens)
        return self.asking(self.prompt(i, needed(prompt_tokens)), new_tokens)

    def asking(self, prompt: str | list[int] | Messages, new_tokens: int) -> Body:
        """The body around a prompt. Greedy, so that an answer depends on its prompt only."""
        what: Body = {"prompt": prompt}
        if self.kind == "chat":
            what = {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
        body = {"model": self.model, **what, "max_tokens": new_tokens, "temperature": 0, "stream": self.stream}
        body |= {"stream_options": {"include_usage": True}} if self.stream else {}
        return body | ({} if self.eos else {"ignore_eos": True})

    def prompt(self, i: int, tokens: int) -> str | list[int]:
        return self.text(self.mark(i), i, tokens) if self.pool is None else self.ids(f"{self.nonce} {i}", i, tokens)

    def mark(self, i: int) -> str:
        """Eight hex digits that no other request has, of this run or another. Without a nonce: the number's."""
        return hashlib.sha256(f"{self.nonce} {i}".encode()).hexdigest()[:8]

    def text(self, start: str, i: int, tokens: int) -> str:
        seed = f"{self.seed} {i}"
        return self.counted.text(start, seed, tokens) if self.counted else about(start, seed, tokens)

    def ids(self, mark: str, i: int, tokens: int) -> list[int]:
        """The first ids by the mark, the others by the seed."""
        first, rest = random.Random(mark), random.Random(f"{self.seed} {i}")
        return [(first if place < MARK_IDS else rest).choice(self.pool) for place in range(tokens)]

    # ---- where reuse is the question

    def shared_prefix(self, tokens: int, share: float) -> "SharedPrefix":
        """Prompts of which this share is the same in all, and the rest in none."""
        return SharedPrefix(self, tokens, share)

    def conversations(self, number: int, turns: int, prompt_tokens: int, new_tokens: int) -> list["Conversation"]:
        """Conversations that have nothing in common. prompt_tokens: what the user says in one turn."""
        return [Conversation(self, turns, prompt_tokens, new_tokens) for _ in range(number)]


class SharedPrefix:
    """Prompts that begin alike: with the run's own prefix, so that the first request of a run still has to compute it.

    prefix_tokens of them are the same ids in all prompts; then each goes on with a mark of its own.
    """

    def __init__(self, prompts: Prompts, tokens: int, share: float) -> None:
        if not 0 < share < 1:
            raise UserError(f"The shared part of a prompt lies between 0 and 1, and {share:g} does not.")
        if prompts.lines is not None:
            raise UserError("A file's prompts have the prefixes that it gives them: leave one of the two out.")
        self.prompts, self.tokens = prompts, tokens
        self.prefix_tokens = round(tokens * share)
        if not 1 <= self.prefix_tokens < tokens:
            raise UserError(f"{share:g} of {tokens} tokens is no prefix with a rest: give longer prompts.")
        self.prefix = prompts.prompt(-1, self.prefix_tokens)

    def body(self, new_tokens: int) -> Body:
        """The next request."""
        i = next(self.prompts.numbers)
        return self.prompts.asking(self.prompt(i), new_tokens)

    def of(self, shape: Shape, number: int) -> list[Body]:
        return [self.body(shape.new_tokens) for _ in range(number)]

    def prompt(self, i: int) -> str | list[int]:
        prompts, mark = self.prompts, self.prompts.mark(i)
        if not isinstance(self.prefix, str):
            return self.prefix + prompts.ids(mark, i, self.tokens - self.prefix_tokens)
        text = prompts.text(f"{self.prefix} {mark}", i, self.tokens)
        if prompts.counted and prompts.counted.ids(text)[: self.prefix_tokens] != prompts.counted.ids(self.prefix):
            raise UserError("This tokenizer joins a prefix with what follows it: ask with token ids instead.")
        return text


class Conversation:
    """One user and one model in turn: each turn sends all that was said before, the model's answers among it.

    opening() is the first request; reply(answer) takes the text that came back and gives the next one, or None at the
    end. Both are called by who sends, as the answers come: the next turn's prompt holds the last one's answer.
    """

    def __init__(self, prompts: Prompts, turns: int, prompt_tokens: int, new_tokens: int) -> None:
        if turns < 1:
            raise UserError(f"A conversation has at least one turn, and not {turns}.")
        if prompts.pool is not None or prompts.lines is not None:
            raise UserError("Conversations are made of synthetic text: leave token ids and the prompts' file out.")
        self.prompts, self.turns, self.new_tokens = prompts, turns, new_tokens
        self.said: Messages = []
        numbers = [next(prompts.numbers) for _ in range(turns)]
        self.texts = iter([prompts.text(prompts.mark(i), i, needed(prompt_tokens)) for i in numbers])

    def opening(self) -> Body:
        if self.said:
            raise ValueError("this conversation has begun: reply() goes on")
        return self.turn()

    def reply(self, answer: str) -> Body | None:
        """The next turn after this answer. None: it was the last."""
        self.said.append({"role": "assistant", "content": answer})
        return self.turn() if len(self.said) < 2 * self.turns else None

    def turn(self) -> Body:
        self.said.append({"role": "user", "content": next(self.texts)})
        if self.prompts.kind == "chat":
            return self.prompts.asking([dict(one) for one in self.said], self.new_tokens)
        return self.prompts.asking("\n".join(one["content"] for one in self.said), self.new_tokens)


def needed(prompt_tokens: int | None) -> int:
    if prompt_tokens is None or prompt_tokens < 1:
        raise UserError(f"Synthetic prompts need a length of at least 1 token, and not {prompt_tokens}.")
    return prompt_tokens


# ---- from a file


def from_file(path: str | Path, kind: str) -> list[str | Messages]:
    """The prompts of a file: JSON lines with prompt or messages, or one text a line. UserError."""
    text = text_of(path)
    if text.lstrip().startswith("{"):
        found = [prompt_in(row, f"{path}, line {line}", kind) for line, row in json_rows(path, text)]
    else:
        found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise UserError(f"{path} holds no prompts: write one a line.")
    return found


def prompt_in(row: Body, where: str, kind: str) -> str | Messages:
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        raise UserError(f"{where} must have either prompt or messages.")
    if messages is None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where}: prompt must be a text that is not empty.")
        return prompt
    if kind != "chat":
        raise UserError(f"{where} has messages, which only chat takes: write prompt, or ask with --endpoint chat.")
    if not (isinstance(messages, list) and messages and all(map(is_message, messages))):
        raise UserError(f"{where}: messages must be a list of objects with the texts role and content.")
    return messages


def is_message(one: Any) -> bool:
    return isinstance(one, dict) and all(isinstance(one.get(name), str) for name in ("role", "content"))


def marked(prompt: str | Messages, mark: str) -> str | Messages:
    """The prompt with the mark in front: of messages, of the first one's content."""
    if isinstance(prompt, str):
        return f"{mark} {prompt}"
    first, *others = prompt
    return [first | {"content": f"{mark} {first['content']}"}, *others]
