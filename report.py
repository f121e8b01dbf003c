"""What has been measured so far, read from results/ and notes.md. Nothing is run.

python3 report.py checklist           # the wall: what is done, its evidence, what is missing
python3 report.py checklist --write   # and tick the rows of notes.md that records prove
"""

from config import ROOT, Settings, UserError, check_packages, knob

if __name__ == "__main__":
    check_packages()

import json
from dataclasses import dataclass
from pathlib import Path

from lab import checklist, console
from lab.records import rewrite
from metrics import table


@dataclass(frozen=True)
class ReportConfig(Settings):
    report: str = knob("", "which report", positional=True, choices=("checklist",))
    write: bool = knob(False, "set the boxes of notes.md's checklists; nothing else in it changes")
    notes_file: str = knob(str(ROOT / "notes.md"), "the notes to read; results/ is looked for beside them")
    json: bool = knob(False, "print JSON instead of a table")


def wall_table(wall: list[checklist.State]) -> str:
    rows = [
        (s.item.group, f"{s.item.chinese} · {s.item.english}", checklist.DONE if s.done else checklist.OPEN,
         " ".join(f"[{i}]" for i in s.evidence), s.missing)
        for s in wall
    ]  # fmt: skip
    columns = [("group", "left"), ("item", "left"), ("state", "left"), ("evidence", "left"), ("missing", "left")]
    return table(columns, rows)


def main(argv: list[str] | None = None) -> int:
    config = ReportConfig.from_cli(__doc__, argv)
    path = Path(config.notes_file)
    try:
        notes = path.read_bytes().decode(errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give --notes-file FILE.") from error
    wall = checklist.states(notes, checklist.all_records(path))
    if config.json:
        print(json.dumps([state.row() for state in wall], ensure_ascii=False, indent=1))
    else:
        print(wall_table(wall))
        print(f"\n{sum(s.done for s in wall)} of {len(wall)} done.")
    if config.write:
        found = 0

        def tick(old: bytes) -> bytes:
            nonlocal found
            text, found = checklist.ticked(old.decode(errors="surrogateescape"), wall)
            return text.encode(errors="surrogateescape")

        try:
            rewrite(path, tick)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): make it writable.") from error
        console.warn(None if found else f"{path} holds no checklist row, so nothing was ticked.")
    return 0


if __name__ == "__main__":
    console.run(main)
