"""OpenAI's objects, from the engine's answers: whole, and piece by piece.

One place makes both, so that a stream joined is the whole answer. Chunks of a stream: one that names the role, then
text as it becomes certain, one that says how it ended, and the usage if it was asked for.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from engine.answer import Answer
from engine.request import Choice

REASONS = {"stop": "stop", "length": "length", "cancelled": "stop"}
Token = Callable[[int], tuple[str, bytes]]  # what one token reads as, and its bytes


@dataclass
class Reply:
    """What all chunks of one reply share. chat: which of the two endpoints. token: for log probabilities."""

    id: str
    model: str
    chat: bool
    fingerprint: str
    token: Token
    logprobs: bool = False
    tells_usage: bool = False  # of a stream: in its last chunk, null in all others
    told_chars: dict[int, int] = field(default_factory=dict)  # of each choice, by the texts of its tokens
    created: int = field(default_factory=lambda: int(time.time()))

    def shell(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model,
                "system_fingerprint": self.fingerprint}  # fmt: skip

    # ---- a whole answer

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [self.whole_choice(i, answer) for i, answer in enumerate(answers)]
        return self.shell("chat.completion" if self.chat else "text_completion") | {"choices": choices, "usage": usage}

    def whole_choice(self, i: int, answer: Answer) -> dict[str, Any]:
        text, told = answer.text, self.told(i, answer.choices)
        ended = {"index": i, "logprobs": told, "finish_reason": REASONS[answer.request.finish_reason]}
        if self.chat:
            return ended | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return ended | {"text": text}

    # ---- chunks

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return (
            self.shell("chat.completion.chunk" if self.chat else "text_completion")
            | {"choices": choices}
            | more
            | ({"usage": None} if self.tells_usage and "usage" not in more else {})
        )

    def opening(self, i: int) -> dict[str, Any] | None:
        """Chat only: says who speaks. It is no token."""
        if not self.chat:
            return None
        return self.chunk([self.piece(i, {"role": "assistant", "content": ""}, None, None)])

    def text(self, i: int, text: str, fresh: Sequence[Choice]) -> dict[str, Any]:
        return self.chunk([self.piece(i, {"content": text} if self.chat else text, self.told(i, fresh), None)])

    def ending(self, i: int, answer: Answer) -> dict[str, Any]:
        return self.chunk([self.piece(i, {} if self.chat else "", None, REASONS[answer.request.finish_reason])])

    def piece(self, i: int, what: Any, told: Any, reason: str | None) -> dict[str, Any]:
        name = "delta" if self.chat else "text"
        return {"index": i, name: what, "logprobs": told, "finish_reason": reason}

    # ---- log probabilities

    def told(self, i: int, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {"content": [self.chat_token(choice) for choice in choices], "refusal": None}
        texts = [self.token(choice.token)[0] for choice in choices]
        *offsets, self.told_chars[i] = accumulate(map(len, texts), initial=self.told_chars.get(i, 0))
        return {
            "tokens": texts,
            "text_offset": offsets,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [{self.token(t)[0]: value for t, value in choice.top} for choice in choices],
        }

    def chat_token(self, choice: Choice) -> dict[str, Any]:
        top = [self.one_token(token, logprob) for token, logprob in choice.top]
        return self.one_token(choice.token, choice.logprob) | {"top_logprobs": top}

    def one_token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, raw = self.token(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


def usage(prompt_tokens: int, answers: Sequence[Answer], timing: dict[str, float]) -> dict[str, Any]:
    """timing: the parts of the request's time in seconds; they add up to their total."""
    new = sum(len(answer.choices) for answer in answers)
    return told_usage(prompt_tokens, new, max((answer.request.reused for answer in answers[:1]), default=0), timing)


def told_usage(prompt_tokens: int, new: int, cached: int, timing: dict[str, float]) -> dict[str, Any]:
    """cached: tokens of the prompt that were not computed for this request."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": cached},
        "timing": {name: round(seconds, 6) for name, seconds in timing.items()},
    }  # fmt: skip
