"""A planned step as the arithmetic wants it: the tokens of all its requests in one row of numbers, none padded."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.scheduler import Slice


@dataclass(slots=True)
class Part:
    """One request's share: `count` rows from row `first`; after it, `length` of its tokens lie in these blocks."""

    first: int
    count: int
    length: int
    blocks: list[int]

    @property
    def positions(self) -> range:
        return range(self.length - self.count, self.length)

    def slots(self, count: int, size: int) -> list[int]:
        """Where its first `count` tokens lie in the cache: block * size + place in the block."""
        return [self.blocks[i // size] * size + i % size for i in range(count)]


@dataclass(frozen=True)
class Step:
    """tokens: one per row. wanted: the rows whose output is asked for, the last of each request that has caught up."""

    tokens: list[int]
    parts: list[Part]
    wanted: list[int]

    @property
    def positions(self) -> list[int]:
        return [position for part in self.parts for position in part.positions]

    def slots(self, size: int) -> list[int]:
        """Where each row's key and value go."""
        return [
            part.blocks[position // size] * size + position % size for part in self.parts for position in part.positions
        ]


def layout(slices: Sequence[Slice]) -> Step:
    """The slices of a plan, one behind the other."""
    tokens: list[int] = []
    parts: list[Part] = []
    wanted: list[int] = []
    for part in slices:
        end = part.start + part.count
        parts.append(Part(len(tokens), part.count, end, part.request.blocks))
        tokens += part.request.tokens[part.start : end]
        if part.last:
            wanted.append(len(tokens) - 1)
    return Step(tokens, parts, wanted)
