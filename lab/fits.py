"""Lines through measured points, and the law by which something grows.

"It grows exponentially" is said of much that is quadratic or linear. Five laws are fitted, each is judged by how well
it predicts points that it has not seen, and the simplest of those that predict alike is named.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

import numpy as np

from lab.verdict import t_half_width

LAWS = ("constant", "linear", "power", "quadratic", "exponential")  # from simple to bold
BLOCKS = 5
FEWEST_PLACES = 4
TINY = 1e-12  # an error below this is rounding


@dataclass(frozen=True)
class Line:
    """y = start + slope * x."""

    start: float
    slope: float


def line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The least-squares line. ValueError when the points do not lie at two places at least."""
    xs = np.asarray(x, float)
    if len(xs) < 2 or np.ptp(xs) == 0:
        raise ValueError("a line needs points at two places")
    slope, start = np.polyfit(xs, np.asarray(y, float), 1)
    return Line(float(start), float(slope))


# ---- laws of growth


@dataclass(frozen=True)
class Law:
    """Its numbers: constant a; linear a + b x; quadratic a + b x + c x²; power a x^p; exponential a e^(b x)."""

    name: str
    numbers: tuple[float, ...]

    def __call__(self, x: float) -> float:
        a, *rest = self.numbers
        if self.name == "power":
            return a * x ** rest[0]
        if self.name == "exponential":
            return a * math.exp(min(rest[0] * x, 700))
        return a + sum(number * x ** (i + 1) for i, number in enumerate(rest))

    def __str__(self) -> str:
        n = [f"{number:.3g}" for number in self.numbers]
        shapes = {"constant": "{}", "linear": "{} + {}·n", "quadratic": "{} + {}·n + {}·n²", "power": "{}·n^{}",
                  "exponential": "{}·e^({}·n)"}  # fmt: skip
        return shapes[self.name].format(*n)


def fitted(name: str, x: Sequence[float], y: Sequence[float]) -> Law:
    """Least squares of the relative error: a step that is 5 % off counts alike, whether it is a long or a short one."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if name in ("power", "exponential"):
        across = np.log(xs) if name == "power" else xs
        slope, start = np.polyfit(across, np.log(ys), 1)
        return Law(name, (float(np.exp(start)), float(slope)))
    degree = {"constant": 0, "linear": 1, "quadratic": 2}[name]
    return Law(name, tuple(float(number) for number in np.polyfit(xs, ys, degree, w=1 / ys)[::-1]))


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of the power law through the points: what doubling x does, as a power of two."""
    return fitted("power", x, y).numbers[1]


@dataclass(frozen=True)
class Growth:
    """law: the chosen one, fitted to all points. errors: name -> RMS relative error on points held out.

    alike: every law that is not shown to predict worse than the best; the chosen one is the simplest of them.
    """

    law: Law
    errors: dict[str, float]
    span: tuple[float, float]
    alike: tuple[str, ...] = ()


def growth(x: Sequence[float], y: Sequence[float], groups: Sequence[int] | None = None) -> Growth:
    """The law by which y grows with x: the simplest whose held-out error is not worse than the best one's.

    Parts are held out in turn, so that the ends must be predicted from the rest: laws part where they are extended.
    groups: the part of each point, such as the run that it comes from; what all points of a run have in common (the
    machine was slow then) must not help to predict them. Without it, or with fewer than four, parts are blocks of
    neighbours. "Not worse": a one-sided t test at 5 % over the parts does not show it to be worse (in the spirit of
    Breiman, Friedman, Olshen, Stone 1984, section 3.4.3). ValueError below four places.
    """
    if len(set(x)) < FEWEST_PLACES:
        raise ValueError(f"a law needs points at {FEWEST_PLACES} places at least, and there are {len(set(x))}")
    parts = groups if groups is not None and len(set(groups)) >= FEWEST_PLACES else blocks(x)
    squares = {name: held_out(partial(fitted, name), x, y, parts) for name in LAWS}
    best = min(LAWS, key=lambda name: mean(squares[name]))
    alike = tuple(name for name in LAWS if not_worse(squares[name], squares[best]))
    errors = {name: math.sqrt(mean(values)) for name, values in squares.items()}
    return Growth(fitted(alike[0], x, y), errors, (min(x), max(x)), alike)


def blocks(x: Sequence[float]) -> list[int]:
    """The number of the block of neighbouring places that each point lies in."""
    places = sorted(set(x))
    count = min(BLOCKS, len(places))
    return [places.index(place) * count // len(places) for place in x]


def held_out(
    fit: Callable[[Sequence, Sequence], Law], x: Sequence[float], y: Sequence[float], parts: Sequence[int]
) -> list[float]:
    """For each part: the mean squared relative error of the law fitted to the others."""
    found = []
    for part in sorted(set(parts)):
        kept = [i for i, other in enumerate(parts) if other != part]
        law = fit([x[i] for i in kept], [y[i] for i in kept])
        found.append(mean((law(x[i]) / y[i] - 1) ** 2 for i, other in enumerate(parts) if other == part))
    return found


def not_worse(errors: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the first law's errors are not shown to be greater than the best one's, as ratios paired by part."""
    ratios = [math.log(max(a, TINY) / max(b, TINY)) for a, b in zip(errors, best, strict=True)]
    return mean(ratios) <= t_half_width(ratios, 0.9)
