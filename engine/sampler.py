"""From logits to the next token of each request: penalties, temperature, what may be drawn at all, and the draw.

Requests share a forward pass but nothing here: each has its own random numbers, so its answer does not depend on those
beside it. The draw is by inverse cumulative probability from one uniform number, which is the same on every device.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence

import torch

from engine.request import BadLogits, Choice, Request, Sampling


class Sampler:
    """Keeps the random numbers of every request that draws, from its first token to its last."""

    def __init__(self) -> None:
        self.dice: dict[Request, random.Random] = {}

    def choose(
        self, logits: torch.Tensor, requests: Sequence[Request], found: tuple[list[float], list[int]] | None = None
    ) -> list[Choice | Exception]:
        """logits (B, vocabulary), a row per request -> its choice, or the error that is this request's alone.

        found: each row's greatest and its token, where somebody knows them already.
        """
        return [
            self.guarded(logits, row, request, best, token)
            for row, (request, best, token) in enumerate(zip(requests, *(found or likeliest(logits)), strict=True))
        ]

    def guarded(self, logits: torch.Tensor, row: int, request: Request, best: float, token: int) -> Choice | Exception:
        try:
            if not math.isfinite(best):  # the likeliest is the NaN, where there is one
                raise BadLogits(f"the network's output for request {request.number} is {best}: its weights are damaged")
            return Choice(token) if plain(request.sampling) else self.one(logits[row].float(), request)
        except Exception as error:
            return error

    def one(self, row: torch.Tensor, request: Request) -> Choice:
        wish = request.sampling
        scores = adjusted(row, request)
        token = int(scores.argmax()) if wish.greedy else draw(scores, wish, self.roll(request))
        if wish.logprobs is None:
            return Choice(token)
        logprobs = row.log_softmax(dim=-1)
        values, tokens = logprobs.topk(wish.logprobs)
        return Choice(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))

    def roll(self, request: Request) -> float:
        """The request's next uniform number, from 0 to below 1."""
        if request not in self.dice:
            self.dice[request] = random.Random(request.sampling.seed)
            for _ in request.answer:  # drawn before it came to this engine
                self.dice[request].random()
        return self.dice[request].random()

    def forget(self, request: Request) -> None:
        self.dice.pop(request, None)


def likeliest(logits: torch.Tensor) -> tuple[list[float], list[int]]:
    """The greatest of each row, and its token. On a CPU by numpy, whose argmax takes a fifth of PyTorch's time."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        best, tokens = logits.max(dim=-1)
        return best.tolist(), tokens.tolist()
    rows = logits.numpy()
    tokens = rows.argmax(axis=-1)
    return rows[range(len(rows)), tokens].tolist(), tokens.tolist()


def plain(wish: Sampling) -> bool:
    """Whether the likeliest token is the answer as it stands."""
    return (
        wish.greedy
        and wish.repetition_penalty == 1
        and wish.frequency_penalty == wish.presence_penalty == 0
        and not wish.logit_bias
        and wish.logprobs is None
    )


def adjusted(row: torch.Tensor, request: Request) -> torch.Tensor:
    """The logits with penalties and biases; row itself stays as it is."""
    wish, scores = request.sampling, row.clone()
    if wish.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(request.tokens)), device=row.device)
        old = scores[seen]
        scores[seen] = torch.where(old > 0, old / wish.repetition_penalty, old * wish.repetition_penalty)
    if (wish.frequency_penalty or wish.presence_penalty) and request.answer:
        counts = Counter(request.answer)
        seen = torch.tensor(list(counts), device=row.device)
        often = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
        scores[seen] -= wish.frequency_penalty * often + wish.presence_penalty
    for token, bias in wish.logit_bias.items():
        scores[token] += bias
    return scores


def draw(scores: torch.Tensor, wish: Sampling, uniform: float) -> int:
    """A token by its probability, among those that top_k, top_p and min_p leave; uniform: from 0 to below 1.

    top_p keeps the likeliest tokens up to the one that reaches it (nucleus sampling, arXiv 1904.09751); min_p those
    with at least this share of the likeliest one's probability (arXiv 2407.01082).
    """
    if wish.top_k and wish.top_k < len(scores):
        sorted_scores, tokens = scores.topk(wish.top_k)
    else:
        sorted_scores, tokens = scores.sort(descending=True, stable=True)
    probabilities = (sorted_scores.double() / wish.temperature).softmax(dim=-1)
    kept = torch.ones_like(probabilities, dtype=torch.bool)
    if wish.top_p < 1:
        kept &= probabilities.cumsum(dim=-1) - probabilities < wish.top_p
    if wish.min_p > 0:
        kept &= probabilities >= wish.min_p * probabilities[0]
    reach = (probabilities * kept).cumsum(dim=-1)
    place = int(torch.searchsorted(reach, uniform * reach[-1], right=True))
    return int(tokens[min(place, int(kept.sum()) - 1)])
