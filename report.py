"""What has been measured so far, read from results/ and notes.md. Nothing is run.

python3 report.py                     # the newest load record as results/report.md and results/report.html
python3 report.py compare A B         # two load records: FASTER, SLOWER, WITHIN NOISE or NO VERDICT, B against A
python3 report.py compare A B --gate throughput:-3%,ttft_p95:+5%
                                      # exit status 0: the gate holds, 1: worse than it, 3: no verdict, 2: misuse
python3 report.py compare A B --note "What was changed, and why."      # into notes.md, with a figure
python3 report.py claims              # every quoted figure of the documents against its record; 1: some do not hold
python3 report.py checklist           # the wall: what is done, its evidence, what is missing
python3 report.py checklist --write   # and tick the rows of notes.md that records prove

A and B are ids of records, the beginnings of ids, or .jsonl files (their last record counts).
"""

from config import ROOT, Recorded, Settings, UserError, check_packages, knob

if __name__ == "__main__":
    check_packages()

import json
import math
from dataclasses import dataclass
from pathlib import Path

from lab import checklist, claims, compare, compare_figure, console, load_runs, records, report_page, report_render
from lab.records import rewrite
from metrics import table


@dataclass(frozen=True)
class ReportConfig(Settings):
    report: str = knob(
        "page", "which report; without a word, the page", positional=True, optional=True,
        choices=("page", "compare", "claims", "checklist"),
    )  # fmt: skip
    a: str = knob("", "compare: the baseline, a record's id or a file", positional=True, optional=True)
    b: str = knob("", "compare: what is compared with it", positional=True, optional=True)
    gate: str = knob("", "compare: figure:change, such as throughput:-3%, with commas between several")
    baseline: str = knob("", "page: the id of the record to compare the newest with")
    machine_price: float = knob(0.0, "page: price of the machine per hour; 0 = no costs", least=0)
    note: str | None = knob(
        None, "compare: append it to notes.md with a figure; TEXT goes under Observations", optional_text=True
    )
    out: str = knob("", "page: the folder to write to (default: results/ beside the notes)", metavar="DIR")
    write: bool = knob(False, "checklist: set the boxes of notes.md's checklists; nothing else in it changes")
    notes_file: str = knob(str(ROOT / "notes.md"), "the notes to read; results/ is looked for beside them")
    json: bool = knob(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.report == "compare" and not (self.a and self.b):
            raise UserError("compare takes two records: python3 report.py compare A B, each an id or a file.")
        if self.report != "compare" and (self.a or self.gate or self.note is not None):
            stray = self.a or ("--gate" if self.gate else "--note")
            raise UserError(f"{stray!r} belongs to compare: python3 report.py compare A B --gate throughput:-3%.")
        if not math.isfinite(self.machine_price):
            raise UserError("--machine-price must be a number, the price of an hour.")

    @property
    def results(self) -> Path:
        return Path(self.notes_file).parent / "results"


def wall_table(wall: list[checklist.State]) -> str:
    rows = [
        (s.item.group, f"{s.item.chinese} · {s.item.english}", checklist.DONE if s.done else checklist.OPEN,
         " ".join(f"[{i}]" for i in s.evidence), s.missing)
        for s in wall
    ]  # fmt: skip
    columns = [("group", "left"), ("item", "left"), ("state", "left"), ("evidence", "left"), ("missing", "left")]
    return table(columns, rows)


def read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give --notes-file FILE.") from error


def check_list(config: ReportConfig) -> int:
    path = Path(config.notes_file)
    wall = checklist.states(read(path), checklist.all_records(path))
    if config.json:
        print(json.dumps([state.row() for state in wall], ensure_ascii=False, indent=1))
    else:
        print(wall_table(wall))
        print(f"\n{sum(s.done for s in wall)} of {len(wall)} done.")
    if config.write:
        tick_boxes(path, wall)
    return 0


def tick_boxes(path: Path, wall: list[checklist.State]) -> None:
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


def compare_two(config: ReportConfig) -> int:
    gates = compare.gates_of(config.gate) if config.gate else {}
    a, b = (load_runs.find(name, config.results) for name in (config.a, config.b))
    found = compare.compare(a, b, gates)
    print(json.dumps(found.as_json(), ensure_ascii=False, indent=1) if config.json else found.text())
    if config.note is not None:
        keep(config, a, b, found)
    return found.status


def keep(config: ReportConfig, a: load_runs.Record, b: load_runs.Record, found: compare.Comparison) -> None:
    """A record of its own, so that what is quoted of the comparison can be checked against it."""
    wishes = Recorded(
        json=str(config.results / "report.jsonl"), note=config.note or "None.", notes_file=config.notes_file
    )
    records.check_writable(wishes, "report")
    record = records.new_record("report", "baseline-against-optimised", wishes, b["card"])
    names = ("model", "prompt", "prompt_tokens", "batch_policy", "kv_cache", "gpu_utilisation")
    record |= {"kind": "comparison", "of": [a["id"], b["id"]]} | {name: b.get(name, "?") for name in names}
    record["config"]["max_new_tokens"] = b["config"].get("max_new_tokens", "?")
    record |= {"comparison": found.as_json(), "verdicts": found.sentences(), "printed": found.text()}
    figure = compare_figure.save(a, b, record["id"], config.results / "figures")
    cited = records.cited_path(wishes)
    known = {one["id"] for one in records.read_lines(cited)}
    for one in (a, b):  # what it rests on is committed beside it
        if one["id"] not in known:
            records.append_line(cited, one)
    if failure := records.save(wishes, record, "\n\n".join(filter(None, [found.text(), figure]))):
        raise failure
    print(f"\nRecord [{record['id']}] in {config.notes_file}.")


def check_claims(config: ReportConfig) -> int:
    """The notes must be there; the READMEs beside them are read where they are."""
    notes = Path(config.notes_file)
    others = [notes.parent / name for name in claims.DOCUMENTS if (notes.parent / name).is_file()]
    paths = list(dict.fromkeys([notes, *others]))
    found = claims.check({path.name: read(path) for path in paths}, checklist.all_records(notes))
    if config.json:
        print(json.dumps(vars(found), ensure_ascii=False, indent=1))
    else:
        print(found.text())
    return 1 if found.problems else 0


def write_page(config: ReportConfig) -> int:
    found = report_page.load_records(config.results)
    if config.baseline:
        load_runs.find(config.baseline, config.results)  # a wrong id is a mistake, not an empty section
    blocks = report_page.blocks_of(found, config.machine_price, config.baseline)
    folder = Path(config.out) if config.out else config.results
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(report_render.markdown(blocks), encoding="utf-8")
        (folder / "report.html").write_text(report_render.page(blocks), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): give --out DIR.") from error
    print(f"{folder / 'report.md'} and {folder / 'report.html'}, from [{found[-1]['id']}].")
    return 0


REPORTS = {"page": write_page, "compare": compare_two, "claims": check_claims, "checklist": check_list}


def main(argv: list[str] | None = None) -> int:
    config = ReportConfig.from_cli(__doc__, argv)
    return REPORTS[config.report](config)


if __name__ == "__main__":
    console.run(main)
