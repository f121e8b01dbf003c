"""The 74 cases as the matrix's file has them, and which of them a test's name says it covers."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("matrix.toml")
LAST = 74
STARTS = {"B1": 1, "B2": 20, "B3": 28, "B4": 51, "B5": 60, "B6": 68}  # the first number of each group
RANGE = re.compile(r"b(\d+)_to_b?(\d+)(?=_|$)")
NUMBER = re.compile(r"b?(\d+)(?=_|$)")


@dataclass(frozen=True)
class Case:
    """One line of the matrix. changed: why it differs from what was set out to be done, where it does."""

    number: int
    case: str
    expected: str
    state: str = ""
    changed: str = ""

    @property
    def group(self) -> str:
        return next(name for name, start in reversed(STARTS.items()) if self.number >= start)


@cache
def cases() -> dict[int, Case]:
    return {one["number"]: Case(**one) for one in tomllib.loads(FILE.read_text(encoding="utf-8"))["case"]}


@cache
def groups() -> dict[str, str]:
    """B1 and so on -> its name."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))["groups"]


def numbers_of(test: str) -> tuple[int, ...]:
    """The cases that a test's name begins with: test_b1_2_10_what_is_true, test_b67_b68_…, test_b33_to_43_…"""
    if not re.match(r"test_b\d", test):
        return ()
    rest, found = test.removeprefix("test_"), []
    while True:
        if span := RANGE.match(rest):
            found += range(int(span[1]), int(span[2]) + 1)
        elif (span := NUMBER.match(rest)) and int(span[1]) <= LAST:  # else it is a number of the sentence
            found.append(int(span[1]))
        else:
            return tuple(dict.fromkeys(found))
        rest = rest[span.end() :].removeprefix("_")
