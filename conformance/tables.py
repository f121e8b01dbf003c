"""Cards and tables: 74 characters to see at once, and a sentence for everything that is not as the matrix has it."""

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from tabulate import tabulate

from conformance.judge import Kind, Verdict
from conformance.matrix import cases, groups
from conformance.suite import Found, Outcome

FIVE = 5
Looked = Mapping[str, Mapping[int, Verdict]]  # a server's name -> what was found, by the case's number


def numbers_in(group: str) -> list[int]:
    return [number for number, case in cases().items() if case.group == group]


def span(group: str) -> str:
    numbers = numbers_in(group)
    return f"{numbers[0]}–{numbers[-1]}"


def marks(kinds: list[Any]) -> str:
    """One character for each, in fives."""
    row = "".join(kind.mark for kind in kinds)
    return " ".join(row[i : i + FIVE] for i in range(0, len(row), FIVE))


def table(headers: list[str], rows: list[list[Any]], right: tuple[int, ...] = ()) -> str:
    align = ["right" if i in right else "left" for i in range(len(headers))]
    return tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def legend(kinds: type[StrEnum], words: Mapping[str, str] | None = None) -> str:
    return ", ".join(f"{kind.mark} {(words or {}).get(kind, str(kind))}" for kind in kinds)


# ---- our own, by its tests


def suite_card(found: Mapping[int, Found]) -> str:
    """The cases of each group, and what becomes of them."""
    rows = []
    for group, name in groups().items():
        mine = [found[number] for number in numbers_in(group) if number in found]
        rows.append([f"{group} {name}", span(group), marks([one.outcome for one in mine]), *totals(mine)])
    rows.append(["all", f"1–{len(cases())}", "", *totals(list(found.values()))])
    headers = ["group", "cases", "card", *map(str, Outcome), "tests"]
    return table(headers, rows, tuple(range(3, len(headers)))) + f"\n\n{legend(Outcome)}"


def totals(found: list[Found]) -> list[str]:
    counts = Counter(one.outcome for one in found)
    return [str(counts[outcome]) for outcome in Outcome] + [str(sum(one.tests for one in found))]


def suite_rest(found: Mapping[int, Found]) -> str:
    """Whatever did not pass, and why. Empty when all did."""
    rows = [[str(number), cases()[number].case, str(one.outcome), one.why or "no test has this number"]
            for number, one in found.items() if one.outcome != Outcome.PASS]  # fmt: skip
    return table(["#", "case", "", "why"], rows, (0,)) if rows else ""


# ---- any server, from outside


def looks_card(looked: Looked) -> str:
    """The same cases of several servers, one below the other."""
    rows = []
    for group, name in groups().items():
        for i, (server, found) in enumerate(looked.items()):
            mine = [found[number].kind for number in numbers_in(group) if number in found]
            counts = Counter(mine)
            head = [f"{group} {name}", span(group)] if i == 0 else ["", ""]
            rows.append([*head, server, marks(mine), *(str(counts[kind]) for kind in Kind)])
    return table(["group", "cases", "server", "card", *map(str, Kind)], rows, tuple(range(4, 4 + len(Kind)))) + (
        f"\n\n{legend(Kind, {kind: kind.means for kind in Kind})}"
    )


def looks_totals(looked: Looked) -> str:
    """Two questions: is it as this matrix has it, and is it safe. Both of what can be seen and applies."""
    rows = []
    for server, found in looked.items():
        counts = Counter(verdict.kind for verdict in found.values())
        seen = sum(counts[kind] for kind in (Kind.PASS, Kind.OTHERWISE, Kind.UNSAFE))
        safe = seen - counts[Kind.UNSAFE]
        rows.append(
            [
                server,
                f"{counts[Kind.PASS]} of {seen}",
                f"{safe} of {seen}",
                str(counts[Kind.UNSEEN]),
                str(counts[Kind.NONE]),
            ]
        )
    return table(["server", "as the matrix has it", "safe", "not visible", "not applicable"], rows, (1, 2, 3, 4))


def looks_rest(server: str, found: Mapping[int, Verdict]) -> str:
    """What came instead, case by case."""
    rows = [[str(number), cases()[number].case, one.kind.mark, one.says]
            for number, one in found.items() if one.kind in (Kind.OTHERWISE, Kind.UNSAFE)]  # fmt: skip
    return f"### {server}\n\n" + (
        table(["#", "case", "", "what came instead"], rows, (0,)) if rows else "All as wanted."
    )


def unseen_reasons(looked: Looked) -> str:
    """Why some cases cannot be seen, or do not apply: the same for all servers, mostly."""
    reasons: dict[tuple[int, str], list[str]] = {}
    for server, found in looked.items():
        for number, one in found.items():
            if one.kind in (Kind.UNSEEN, Kind.NONE):
                reasons.setdefault((number, one.says), []).append(server)
    rows = [[str(number), cases()[number].case, why, "all" if len(servers) == len(looked) else ", ".join(servers)]
            for (number, why), servers in sorted(reasons.items())]  # fmt: skip
    return table(["#", "case", "not seen, or not applicable", "for"], rows, (0,)) if rows else ""
