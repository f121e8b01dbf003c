"""For pytest: run the tests whose names begin with a case's number, and write down what became of each.

python3 -m pytest -p conformance.plugin        # with CONFORMANCE_OUT=FILE
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from conformance.matrix import numbers_of

OUT = "CONFORMANCE_OUT"
ONLY = "CONFORMANCE_ONLY"  # numbers with commas between them; by default all
NUMBERS = "conformance"


def covered(item: pytest.Item) -> tuple[int, ...]:
    """The cases of a test, or of one of its rows where the row has a number of its own."""
    numbers = numbers_of(getattr(item, "originalname", None) or item.name)
    row = getattr(item, "callspec", None)
    number = row.params.get("number") if row is not None and numbers else None
    return (number,) if type(number) is int else numbers  # not an enum's: signals have numbers too


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only = {int(number) for number in os.environ.get(ONLY, "").split(",") if number}
    wanted = [item for item in items if (found := set(covered(item))) and (not only or found & only)]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    for item in wanted:
        item.user_properties.append((NUMBERS, covered(item)))
    items[:] = wanted


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Results(), "conformance-results")


class Results:
    """Every test's outcome. A test that fails in its fixtures has failed."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        numbers = dict(report.user_properties).get(NUMBERS, ())
        one = self.tests.setdefault(
            report.nodeid,
            {"test": report.nodeid, "numbers": list(numbers), "outcome": "passed", "why": "", "took_s": 0.0},
        )
        one["took_s"] += report.duration
        if report.outcome != "passed" and one["outcome"] != "failed":
            one |= {"outcome": report.outcome, "why": why(report)}

    def pytest_sessionfinish(self) -> None:
        if place := os.environ.get(OUT):
            Path(place).write_text(json.dumps(self.of_all()), encoding="utf-8")

    def of_all(self) -> list[dict[str, Any]]:
        return [one for one in self.tests.values() if one["numbers"]]


def why(report: pytest.TestReport) -> str:
    """A skip's reason, or the last line of an error: a sentence where there is one."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    lines: Iterable[str] = str(report.longreprtext).splitlines()
    told = [line.removeprefix("E").strip() for line in lines if line.startswith("E  ")]
    return (told or [""])[0][:200]
