"""Lines through measured points."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
