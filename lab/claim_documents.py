"""A document as passages under headings, and the figures that they quote. claims.py says what counts as one."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

ID = re.compile(r"\[([a-z_]+-\d{6}-[0-9a-f]{6})\]")
UNIT = (
    r"ms|[µμ]s|us|ns|s|secs?|seconds?|min|minutes?|hours?|%|percent|"
    r"[kM]? ?tok(?:ens?)?(?:/s| per s(?:econd)?)|req(?:uests?)?(?:/s| per s(?:econd)?)|requests?/min|"
    r"(?:[kKMGT]i?B|bytes)(?:/s)?|[GT]?FLOPs?(?:/s)?|times|倍|秒|毫秒|字节"
)
NUMBER = r"\d[\d,]*(?:\.\d+)?"
FIGURE = re.compile(
    rf"(?P<ratio>×)(?P<r>{NUMBER})(?:\s*\[(?P<low>{NUMBER})%?, (?P<high>{NUMBER})%?\])?"
    rf"|(?<![A-Za-z0-9_.,/^])(?<![A-Za-z0-9_.,/^]-)(?P<n>{NUMBER})(?:[–-](?P<to>{NUMBER}))?\s?"
    rf"(?P<unit>{UNIT}|[×x](?=\s|$|[.,;)]))(?![A-Za-z0-9_])"
)
LIMIT = re.compile(
    r"(?:[≤≥<>±~]|at most|at least|within|up to|below|above|under|law:?|allows|limit(?: of)?|more than|less than|every|"
    r"定律：?|至多|至少|以内|不超过)\s*$",
    re.IGNORECASE,
)
LEVEL = re.compile(r"\s?(?:interval|confidence|t interval|置信)")
HEADER_UNIT = re.compile(rf"(?<![A-Za-z])(?:{UNIT}|token/s)(?![A-Za-z])|×")
PART = re.compile(r"\*\*(Metrics|Verdict|Observations)\*\*\s*")
PROMISES = ("promised", "承诺", "target", "目标")
NOT_MEASURED = "<!-- no record"


@dataclass(frozen=True)
class Table:
    header: str
    rows: tuple[tuple[int, str], ...]  # (line number, row), cells joined without padding


@dataclass(frozen=True)
class Passage:
    """A paragraph, a list item or a table. ids: named in itself. section: where to look when it names none.

    part: in a record's section of notes.md Metrics, Verdict or Observations.
    """

    line: int
    text: str
    section: "Section"
    part: str
    table: Table | None = None

    @property
    def ids(self) -> list[str]:
        return ID.findall(self.text)


@dataclass(eq=False)
class Section:
    """The text under one heading. evidence: the id of a record's section in notes.md."""

    title: str
    level: int
    above: "Section | None"
    passages: list[Passage] = field(default_factory=list)
    inner: "list[Section]" = field(default_factory=list)
    evidence: str | None = None

    @property
    def ids(self) -> list[str]:
        """The ids it names; without any, those of the section above it. A document's title covers nothing."""
        own = [one for passage in self.passages for one in passage.ids]
        if own or self.above is None or self.above.level < 2:
            return own
        return self.above.ids

    def whole(self) -> Iterator[Passage]:
        """The passages of the record's section that this one belongs to, its inner sections' included."""
        top = self
        while top.evidence is None and top.above:
            top = top.above
        yield from top.passages
        for inner in top.inner:
            yield from inner.passages

    @property
    def record(self) -> str | None:
        """The Evidence of the record that this section belongs to."""
        return self.evidence or (self.above.record if self.above else None)


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def plain_row(row: str) -> str:
    """A row without padding and without the ids that a document adds to it."""
    return "|".join(re.sub(rf"\s*`?{ID.pattern}`?", "", cell).strip() for cell in cells_of(row))


def tables_in(lines: Sequence[str], first_line: int = 1) -> Iterator[Table]:
    block: list[tuple[int, str]] = []
    for number, line in [*enumerate(lines, first_line), (0, "")]:
        if line.lstrip().startswith("|"):
            block.append((number, plain_row(line)))
        else:
            if len(block) > 2 and not block[1][1].strip("|:-"):
                yield Table(block[0][1], tuple(block[2:]))
            block = []


def passages_of(text: str) -> list[Passage]:
    """A document in pieces. Code blocks are left out."""
    section, part, found, block, fence = Section("", 0, None), "", [], [], ""

    def close() -> None:
        nonlocal block
        if block:
            words = "\n".join(line for _, line in block)
            table = next(tables_in([line for _, line in block], block[0][0]), None)
            passage = Passage(block[0][0], words, section, part, table)
            section.passages.append(passage)
            found.append(passage)
            mark = re.search(r"\*\*Evidence\*\*:\s*" + ID.pattern, words)
            if mark:
                section.evidence = mark[1]
        block = []

    for number, line in enumerate(text.split("\n"), 1):
        heading = None if fence else re.match(r"(#+) ", line)
        ticks = re.match(r"`{3,}|~{3,}", line)
        if ticks and (not fence or (ticks[0].startswith(fence) and line.strip() == ticks[0])):
            close()
            fence = "" if fence else ticks[0]
        elif fence:
            continue
        elif heading:
            close()
            level = len(heading[1])
            while section.above and section.level >= level:
                section = section.above
            section = Section(line, level, section)
            section.above.inner.append(section)
            part = part if level > 2 else ""
            if level > 1:  # a heading may quote a figure too
                found.append(Passage(number, line, section, part))
                section.passages.append(found[-1])
        elif PART.fullmatch(line):
            close()
            part = PART.fullmatch(line)[1]
        elif not line.strip():
            close()
        else:
            if block and (line.startswith("|") != block[-1][1].startswith("|") or re.match(r"[-*] |\d+\. ", line)):
                close()
            block.append((number, line))
    close()
    return found


@dataclass(frozen=True)
class Figure:
    line: int
    text: str
    unit: str
    numbers: tuple[str, ...]


def figures_of(passage: Passage) -> Iterator[Figure]:
    if NOT_MEASURED in passage.text and passage.table is None:
        return
    if passage.table is None:
        for offset, line in enumerate(passage.text.split("\n")):
            yield from figures_in(line, passage.line + offset)
        return
    source_lines = passage.text.split("\n")
    headers = passage.table.header.split("|")
    for number, row in passage.table.rows:
        if NOT_MEASURED not in source_lines[number - passage.line]:
            yield from figures_of_row(headers, row.split("|"), number)


def figures_of_row(headers: Sequence[str], cells: Sequence[str], line: int) -> Iterator[Figure]:
    for header, cell in zip(headers, cells, strict=False):
        if header.lower() in PROMISES:
            continue
        unit = HEADER_UNIT.search(header)
        own = list(figures_in(cell, line))
        if unit and re.fullmatch(rf"[+−-]?{NUMBER}(?:–{NUMBER})?(?: \(.*\)| \[.*\])?", cell):
            numbers = re.findall(NUMBER, cell.split("(")[0])
            yield Figure(line, cell, unit[0], tuple(numbers))
            own = own if "(" in cell else []
        yield from own


def figures_in(line: str, number: int) -> Iterator[Figure]:
    line = re.sub(r"`[^`]*`", lambda code: " " * len(code[0]), line).replace("**", "")
    for match in FIGURE.finditer(line):
        if LIMIT.search(line[: match.start()]) or LEVEL.match(line[match.end() :]):
            continue
        parts = [match[name] for name in ("r", "low", "high", "n", "to") if match[name]]
        yield Figure(number, match[0].strip(), match["unit"] or "×", tuple(parts))
