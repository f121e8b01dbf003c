"""Answers that are kept, for requests that can only have one: at temperature 0, or with a seed. Off by default.

Found again by everything that decides an answer: the messages, how tokens are chosen, the model's weights and how they
are computed, and whose key asked: nobody is answered from another one's requests. Bounded in bytes; what is older than
its time is found only by who asks for stale answers too.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson
from cachetools import LRUCache

from engine.request import Refusal
from service.protocol import Reply
from service.schemas import ChatRequest, CompletionRequest

BESIDE = 400  # bytes of an entry beside its text: its key and the objects around them
Asked = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class Kept:
    """choices: as of a whole answer. age_s: since it was computed."""

    choices: list[dict[str, Any]]
    prompt_tokens: int
    completion_tokens: int
    age_s: float

    def events(self, reply: Reply) -> list[dict[str, Any]]:
        """The chunks of a stream that joined are this answer; the usage is the asker's business."""
        found = []
        for choice in self.choices:
            i, said = choice["index"], choice["message"]["content"] if reply.chat else choice["text"]
            if (opening := reply.opening(i)) is not None:
                found.append(opening)
            content = {"content": said} if reply.chat else said
            found.append(reply.chunk([reply.piece(i, content, choice["logprobs"], None)]))
            found.append(reply.chunk([reply.piece(i, {} if reply.chat else "", None, choice["finish_reason"])]))
        return found


@dataclass(frozen=True)
class Wishes:
    """What a client's cache-control says. read: a kept answer will do; write: this one may be kept."""

    read: bool = True
    write: bool = True

    @classmethod
    def of(cls, header: str | None) -> "Wishes":
        words = {word.strip().lower() for word in (header or "").split(",")}
        return cls(read=not words & {"no-cache", "no-store"}, write="no-store" not in words)


class Results:
    """most: bytes. ttl_s: how long an answer is fresh. scope: what else decides an answer: weights, versions."""

    def __init__(self, most: int, ttl_s: float, scope: Mapping[str, Any], clock: Callable[[], float]) -> None:
        self.ttl_s, self.scope, self.clock = ttl_s, dict(scope), clock
        self.kept: LRUCache[str, tuple[float, bytes]] = LRUCache(most, getsizeof=lambda one: len(one[1]) + BESIDE)
        self.hits = self.misses = 0

    @property
    def bytes(self) -> int:
        return int(self.kept.currsize)

    def name(self, asked: Asked, owner: str, new_tokens: int) -> str | None:
        """Under what its answer is kept; None for one that may have a different answer each time."""
        try:
            sampling = asked.sampling(new_tokens)
        except Refusal:  # who asks the engine for it is told why
            return None
        if not sampling.greedy and sampling.seed is None:
            return None
        if isinstance(asked, ChatRequest):
            said: Any = [(message.role, message.text) for message in asked.messages]
        else:
            said = asked.prompt
        how = asdict(sampling)
        how |= {"logit_bias": sorted(how["logit_bias"].items()), "stop_ids": sorted(how["stop_ids"])}
        whole = [type(asked).__name__, said, how, asked.n or 1, owner, asked.cache_salt, self.scope]
        return hashlib.sha256(orjson.dumps(whole, option=orjson.OPT_SORT_KEYS)).hexdigest()

    def find(self, name: str, *, stale: bool = False) -> Kept | None:
        """stale: however old it is."""
        at_s, raw = self.kept.get(name, (0.0, b""))
        age_s = self.clock() - at_s
        if not raw or (age_s > self.ttl_s and not stale):
            self.misses += not stale  # who asks for a stale one has been counted before
            return None
        self.hits += 1
        return Kept(**orjson.loads(raw), age_s=age_s)

    def keep(self, name: str, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> None:
        """A whole answer that ended well. One larger than all there is room for is not kept."""
        counts = {what: usage[what] for what in ("prompt_tokens", "completion_tokens")}
        raw = orjson.dumps({"choices": choices} | counts)
        if len(raw) + BESIDE <= self.kept.maxsize:
            self.kept[name] = (self.clock(), raw)
