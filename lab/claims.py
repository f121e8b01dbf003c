"""Quoted figures against the records they come from. report.py claims prints what does not hold.

A figure is a number with a unit: in a sentence, or in a table cell whose own text or column header has one. The
interval behind a ratio, ×4.49 [4.07, 4.96], belongs to it. Four rules:

1. Every figure stands under an [id]. Its row or paragraph names it; else its section does (the text under its nearest
   heading), else the section above that, up to the document's title. In notes.md every record's section stands under
   the id of its Evidence line, and under the ids that the paragraph names.
2. Every [id] is the id of a line in results/cited.jsonl.
3. Every figure is among its record's own: the tables printed again from the raw samples, the record's sentences and
   settings, and where a script's tables cannot be printed again, its numbers and their medians; rounded to the digits
   quoted, seconds as ms, shares as %.
4. What is a copy must be one: a row under a table header that the record prints is a row that the record prints, and
   a sentence under Verdict, or one that begins like a verdict outside Observations, is one of the record's verdicts.

No claims, and so not looked at: code blocks and `code`; limits, marked by a word or sign before the number (LIMIT) or
by a column called promised; confidence levels ("95 % interval"); and a row or paragraph that carries the comment
<!-- no record: why -->. What cannot be re-checked is counted, not passed over: figures of a table in notes.md that its
record does not print again, and what the same section quotes from such a table.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, median
from typing import Any

from lab import batch_tables, kv_tables, request_tables, scheduling_tables, serving_tables
from lab.claim_documents import ID, NUMBER, Figure, Passage, figures_of, passages_of, tables_in

Record = dict[str, Any]

DOCUMENTS = ("notes.md", "README.md", "README.zh.md")
SCALES = {"ms": (1e3,), "毫秒": (1e3,), "µs": (1e6, 1e3), "us": (1e6, 1e3), "%": (100,), "s": (1e-3,), "秒": (1e-3,),
          "μs": (1e6, 1e3), "percent": (100,), "sec": (1e-3,), "secs": (1e-3,), "seconds": (1e-3,),
          "k tokens/s": (1e-3,),
          "MB": (1e-6,), "GB": (1e-9, 1e-3), "GB/s": (1e-9,), "kB": (1e-3,)}  # fmt: skip
ALIKE = 20  # so many equal characters at its beginning make a sentence a copy of a verdict
RAW = (  # samples that the tables sum up
    "trials", "calibrations", "runs", "cold", "run_ceilings", "ids", "steps", "comparison", "server", "client_ceiling",
)  # fmt: skip


# ---- what a record holds


@dataclass(frozen=True)
class Source:
    """What may be quoted from a record."""

    numbers: tuple[float, ...]  # in its text, and in its raw values where no table sums them up
    rows: dict[str, set[str]]  # header of a table -> its rows, both without the padding
    verdicts: frozenset[str]


def claim_rows(record: Record) -> list[str]:
    """As benchmarks/claim.py prints them."""
    words = {True: "holds", False: "FAILS", None: "undecided"}
    rows = [
        f"| {c['what']} | {c['promised']} | {c['measured']} | {'left out' if c.get('skipped') else words[c['holds']]} |"
        for c in record["claims"]
    ]
    return ["\n".join(["| claim | promised | measured here |  |", "|--|--|--|--|", *rows])]


def request_sections(record: Record) -> list[str]:
    tables = (request_tables.model_table, request_tables.theory_table, request_tables.stats_table,
              request_tables.latency_lines, request_tables.ledger_table, request_tables.memory_table)  # fmt: skip
    return [print_table(record) for print_table in tables]


def batch_sections(record: Record) -> list[str]:
    percentiles = [float(p) for p in str(record["config"]["percentiles"]).split(",")]
    return batch_tables.sections(record, percentiles)


PRINT_AGAIN: dict[str, Callable[[Record], list[str]]] = {
    "infer": request_sections,
    "batch_experiment": batch_sections,
    "kv_experiment": kv_tables.sections,
    "continuous_batching": serving_tables.sections,
    "scheduling": scheduling_tables.sections,
    "benchmarks": claim_rows,
}


def source_of(record: Record) -> Source:
    text, printed = record.get("printed", ""), "printed" in record or record["script"] in PRINT_AGAIN
    if printed and not text:
        try:
            text = "\n\n".join(PRINT_AGAIN[record["script"]](record))
        except (KeyError, TypeError, ValueError, IndexError):  # a record of an older form
            printed = False
    kept = {name: inner for name, inner in record.items() if not (printed and name in RAW)}
    found = {number for words in (text, *strings(kept)) for number in numbers_in(words)}
    found |= set(raw_numbers(kept))
    rows: dict[str, set[str]] = {}
    for one in tables_in(text.split("\n")):
        rows.setdefault(one.header, set()).update(row for _, row in one.rows)
    return Source(tuple(sorted(found)), rows, frozenset(record.get("verdicts", [])))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def raw_numbers(value: Any) -> Iterator[float]:
    """The numbers of nested values, and of each list of numbers its sum, mean and median.

    The requests of a load record are left out: among so many moments every number would be found.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from () if name == "requests" and isinstance(inner, list) else raw_numbers(inner)
    elif isinstance(value, list):
        own = [x for x in value if isinstance(x, (int, float)) and not isinstance(x, bool)]
        if len(own) > 1:
            yield from (sum(own), mean(own), median(own))
        for inner in value:
            yield from raw_numbers(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def numbers_in(text: str) -> Iterator[float]:
    for match in re.finditer(rf"(?<![A-Za-z0-9_.,]){NUMBER}", text):
        yield float(match[0].rstrip(",").replace(",", ""))


def holds(source: Source, text: str, unit: str) -> bool:
    """Whether one of the source's numbers, rounded to the digits of text, is text."""
    plain = text.rstrip(",").replace(",", "")
    digits = len(plain.partition(".")[2])
    wanted, slack = float(plain), 0.5 * 10**-digits
    return any(
        abs(abs(number) * scale - wanted) <= slack * (1 + 1e-9)
        for scale in (1, *SCALES.get(unit, ()))
        for number in source.numbers
    )


# ---- the check


@dataclass(frozen=True)
class Findings:
    """problems: file:line: sentence. checked, unchecked: numbers of figures."""

    problems: tuple[str, ...]
    checked: int
    unchecked: int

    def text(self) -> str:
        left = f"; {self.unchecked} more stand under an id whose tables are not printed from the record"
        count = f"{self.checked} figures re-checked{left if self.unchecked else ''}; {len(self.problems)} do not hold."
        return "\n".join([*self.problems, count])


def check(documents: dict[str, str], records: Sequence[Record]) -> Findings:
    """documents: name -> text."""
    known = {record["id"]: record for record in records}

    @cache
    def source(one: str) -> Source:
        return source_of(known[one])

    problems, checked, unchecked = [], 0, 0
    for name, text in documents.items():
        for passage in passages_of(text.replace("\r\n", "\n")):
            said, good, open_ = passage_problems(passage, set(known), source)
            problems += [f"{name}:{line}: {sentence}" for line, sentence in said]
            checked, unchecked = checked + good, unchecked + open_
    return Findings(tuple(problems), checked, unchecked)


Said = list[tuple[int, str]]


def passage_problems(passage: Passage, known: set[str], source: Callable[[str], Source]) -> tuple[Said, int, int]:
    """(line, sentence) of what does not hold; how many figures were re-checked; how many cannot be."""
    said: Said = [
        (line_of(passage, one), f"[{one}] is in no line of results/cited.jsonl")
        for one in dict.fromkeys(passage.ids)
        if one not in known
    ]
    evidence = passage.section.record
    own = source(evidence) if evidence in known else None

    def sources_at(line: int) -> list[Source]:
        ids = [evidence] if evidence else ids_of(passage, line, None)
        return [source(one) for one in ids if one in known]

    said += copied_problems(passage, sources_at)
    checked = unchecked = 0
    for figure in figures_of(passage):
        ids = ids_of(passage, figure.line, evidence)
        sources = [source(one) for one in ids if one in known]
        if not ids:
            said.append((figure.line, f"{figure.text!r} names no [id], and neither does its section"))
        elif not sources:
            continue  # rule 2 has said so
        elif all(any(holds(one, number, figure.unit) for one in sources) for number in figure.numbers):
            checked += 1
        elif own and not_printed_again(passage, own, figure):
            unchecked += 1
        else:
            said.append((figure.line, f"{figure.text!r} is not among what [{'], ['.join(ids[:3])}] holds"))
    return said, checked, unchecked


def not_printed_again(passage: Passage, own: Source, figure: Figure) -> bool:
    """Whether it stands in a table that the record does not print again, or is quoted from one in the same section."""
    if passage.table:
        return passage.table.header not in own.rows
    tables = [p.text for p in passage.section.whole() if p.table and p.table.header not in own.rows]
    there = Source(tuple(number for text in tables for number in numbers_in(text)), {}, frozenset())
    return all(holds(there, number, figure.unit) for number in figure.numbers)


def line_of(passage: Passage, text: str) -> int:
    return passage.line + passage.text[: passage.text.index(text)].count("\n")


def ids_of(passage: Passage, line: int, evidence: str | None) -> list[str]:
    """Where to look for a figure: rule 1."""
    own = ID.findall(passage.text.split("\n")[line - passage.line]) if passage.table else passage.ids
    if evidence:
        own = [evidence, *own]
    return list(dict.fromkeys(own or passage.section.ids))


def copied_problems(passage: Passage, sources_at: Callable[[int], list[Source]]) -> Said:
    """Rule 4. sources_at: what the row or sentence at a line may be copied from."""
    if passage.table:
        return [
            (line, "this row is not one that its record prints")
            for line, row in passage.table.rows
            if (
                rows := [one.rows[passage.table.header] for one in sources_at(line) if passage.table.header in one.rows]
            )
            and not any(row in known for known in rows)
        ]
    verdicts = {verdict for one in sources_at(passage.line) for verdict in one.verdicts}
    said = ID.sub("", passage.text.removeprefix("- ")).strip()
    alike = passage.part != "Observations" and any(verdict[:ALIKE] == said[:ALIKE] for verdict in verdicts)
    if said in verdicts or not (alike or (passage.part == "Verdict" and verdicts)):
        return []
    return [(passage.line, "this sentence is not one of its record's verdicts")]
