"""Lines through measured points, and the law by which something grows.

"It grows exponentially" is said of much that is quadratic or linear. Five laws are fitted, each is judged by how well
it predicts points that it has not seen, and the simplest of those that predict alike is named.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    """law: the chosen one, fitted to all points. errors: name -> RMS relative error on points held out."""

    law: Law
    errors: dict[str, float]
    span: tuple[float, float]


def growth(x: Sequence[float], y: Sequence[float]) -> Growth:
    """The law by which y grows with x: the simplest whose held-out error is not worse than the best one's.

    Blocks of neighbouring places are held out in turn, so that the ends must be predicted from the rest: laws part
    where they are extended. "Not worse": a one-sided t test at 5 % over the blocks does not show it to be worse (in the
    spirit of Breiman, Friedman, Olshen, Stone 1984, section 3.4.3). ValueError below four places.
    """
    order = sorted(range(len(x)), key=lambda i: x[i])
    xs, ys = [x[i] for i in order], [y[i] for i in order]
    if len(set(xs)) < FEWEST_PLACES:
        raise ValueError(f"a law needs points at {FEWEST_PLACES} places at least, and there are {len(set(xs))}")
    squares = {name: held_out(lambda a, b, name=name: fitted(name, a, b), xs, ys) for name in LAWS}
    best = min(LAWS, key=lambda name: mean(squares[name]))
    chosen = next(name for name in LAWS if alike(squares[name], squares[best]))
    errors = {name: math.sqrt(mean(values)) for name, values in squares.items()}
    return Growth(fitted(chosen, xs, ys), errors, (xs[0], xs[-1]))


def held_out(fit: Callable[[Sequence, Sequence], Law], xs: list[float], ys: list[float]) -> list[float]:
    """For each block of neighbours: the mean squared relative error of the law fitted to the other blocks."""
    places = sorted(set(xs))
    blocks = min(BLOCKS, len(places))
    edges = [round(i * len(places) / blocks) for i in range(blocks + 1)]
    found = []
    for low, high in pairwise(edges):
        out = set(places[low:high])
        kept = [i for i, x in enumerate(xs) if x not in out]
        law = fit([xs[i] for i in kept], [ys[i] for i in kept])
        found.append(mean((law(x) / y - 1) ** 2 for x, y in zip(xs, ys, strict=True) if x in out))
    return found


def alike(errors: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the first law's errors are not shown to be greater than the best one's, as ratios paired by block."""
    ratios = [math.log(max(a, TINY) / max(b, TINY)) for a, b in zip(errors, best, strict=True)]
    return mean(ratios) <= t_half_width(ratios, 0.9)
