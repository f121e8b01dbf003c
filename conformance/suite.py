"""The card of this kit's own service: each case as its tests found it, in this process's sight and with every tool."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from config import ROOT, UserError
from conformance.matrix import cases
from conformance.plugin import ONLY, OUT

TIMEOUT_S = 1800.0


class Outcome(StrEnum):
    """What the tests of a case say. mark: one character for it in a card."""

    mark: str

    def __new__(cls, name: str, mark: str) -> "Outcome":
        outcome = str.__new__(cls, name)
        outcome._value_, outcome.mark = name, mark
        return outcome

    PASS = "pass", "●"
    FAIL = "fail", "✗"
    SKIPPED = "skipped", "○"
    MISSING = "missing", "?"


@dataclass(frozen=True)
class Found:
    """One case. why: of a failure or a skip."""

    outcome: Outcome
    tests: int = 0
    took_s: float = 0.0
    why: str = ""


def files() -> list[Path]:
    """Those with tests of the matrix: collecting the others takes half a minute."""
    every = sorted((ROOT / "tests").glob("test_*.py"))
    return [
        path for path in every if re.search(r"^(async )?def test_b\d", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def command(paths: Iterable[Path], *options: str) -> list[str]:
    """What runs the tests of the matrix in these files, and nothing else."""
    plugins = ("-p", "conformance.plugin", "-p", "no:cacheprovider")
    return [sys.executable, "-m", "pytest", *plugins, *options, *map(str, paths)]


def run(numbers: set[int] | None = None) -> list[dict[str, Any]]:
    """The tests of the matrix, one after the other; what pytest prints goes to stderr. UserError."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "results.json"
        wanted = {ONLY: ",".join(map(str, sorted(numbers)))} if numbers else {}
        ran = subprocess.run(
            command(files()),
            cwd=ROOT,
            stdout=sys.stderr,
            env=os.environ | {OUT: str(place)} | wanted,
            timeout=TIMEOUT_S,
        )
        if ran.returncode not in (0, 1, 5) or not place.exists():
            raise UserError(f"pytest ended with status {ran.returncode} before the tests were run: type make test.")
        return json.loads(place.read_text(encoding="utf-8"))


def card(tests: Iterable[dict[str, Any]]) -> dict[int, Found]:
    """A case passes when it has tests and all of them pass: what is skipped, or not there, is no pass."""
    mine: dict[int, list[dict[str, Any]]] = {number: [] for number in cases()}
    for test in tests:
        for number in test["numbers"]:
            if number in mine:
                mine[number].append(test)
    return {number: of_case(found) for number, found in mine.items()}


def of_case(tests: list[dict[str, Any]]) -> Found:
    took_s = sum(test["took_s"] for test in tests)
    for word, outcome in (("failed", Outcome.FAIL), ("skipped", Outcome.SKIPPED)):
        bad = [test for test in tests if test["outcome"] == word]
        if bad:
            name = bad[0]["test"].partition("::")[2]
            return Found(outcome, len(tests), took_s, f"{name}: {bad[0]['why'] or word}")
    return Found(Outcome.PASS if tests else Outcome.MISSING, len(tests), took_s)
