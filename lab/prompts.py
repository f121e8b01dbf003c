"""Prompts to measure with: questions as people ask them, and texts of an exact length in tokens."""

from collections.abc import Callable
from pathlib import Path


def questions() -> list[str]:
    """32 short requests."""
    return Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8").splitlines()


def exact(encode: Callable[[str], list[int]], tokens: int, number: int = 0) -> list[int]:
    """Token ids of a text that is exactly so many tokens long. Another number gives another text of that length.

    The text is the questions in a row, begun at another one each time; ids are cut, never padded.
    """
    lines = questions()
    turned = [*lines[number % len(lines) :], *lines[: number % len(lines)]]
    ids = encode(f"{number + 1}. " + " ".join(turned))
    while len(ids) < tokens:
        ids = ids + encode(" " + " ".join(turned))
    return ids[:tokens]


def lengths(kind: str, tokens: int, requests: int) -> list[int]:
    """The prompt lengths of a run. same: all alike. mixed: from a quarter of tokens to all of it, evenly spread.

    The mixed ones come in a fixed order that puts long beside short (multiples of the golden ratio, modulo 1), so that
    every batch has padding and every round the same.
    """
    if kind == "same":
        return [tokens] * requests
    spread = [(i * 0.6180339887) % 1 for i in range(requests)]
    return [max(round(tokens * (0.25 + 0.75 * share)), 1) for share in spread]
