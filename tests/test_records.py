"""Nothing measured is lost, and nothing half-written looks whole: under kills, full disks, and hands in notes.md."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config import Config, UserError
from lab import records
from lab.records import append_line, append_note, check_writable, note_text, read_lines, save

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def config_for(folder: Path, **fields) -> Config:
    return Config(notes_file=str(folder / "notes.md"), json=str(folder / "results" / "x.jsonl"), **fields)


def record(number: int = 1) -> dict:
    return {
        "id": f"infer-261121-{number:06x}", "script": "infer", "question": "day1-one-request",
        "time": "2026-11-21T08:00:00+0000", "command": "python3 infer.py", "partial": False,
        "config": {"max_new_tokens": 50}, "prompt": "Why?", "prompt_tokens": 2, "batch_policy": "one at a time",
        "kv_cache": "on", "gpu_utilisation": "N/A", "verdicts": ["Decode is where the time goes."],
        "card": {"CPU": "c", "Cores": "2", "RAM": "1 GB", "GPU": "none", "Commit": "abc"},
        "model": {"name": "m", "dtype": "float32", "device": "cpu", "origin": "test", "hash": "h"},
    }  # fmt: skip


def test_a_record_is_one_line_that_reads_back_as_it_was(tmp_path):
    append_line(tmp_path / "new" / "x.jsonl", record(1))
    append_line(tmp_path / "new" / "x.jsonl", record(2) | {"text": "first\nsecond ▁█"})
    assert [r["id"] for r in read_lines(tmp_path / "new" / "x.jsonl")] == [record(1)["id"], record(2)["id"]]
    assert (tmp_path / "new" / "x.jsonl").read_bytes().count(b"\n") == 2


def test_a_torn_line_is_closed_and_passed_over(tmp_path):
    path = tmp_path / "x.jsonl"
    append_line(path, record(1))
    path.write_bytes(path.read_bytes() + b'{"id": "half')
    append_line(path, record(2))
    assert [r["id"] for r in read_lines(path)] == [record(1)["id"], record(2)["id"]]


def write_for_ever(path: Path) -> None:
    number = 0
    while True:
        number += 1
        append_line(path, record(number) | {"samples": list(range(3000))})
        append_note(path.with_name("notes.md"), f"## Experiment: {number}\n" + "x" * 5_000 + "\nend")


def test_a_kill_at_any_moment_loses_at_most_the_record_being_written(tmp_path):
    """SIGKILL at random moments: every line but torn ones parses, every record in notes.md is whole."""
    path, rng = tmp_path / "x.jsonl", random.Random(0)
    context = multiprocessing.get_context("fork")
    (tmp_path / "notes.md").write_text("# Notes\n")
    seen = 0
    for _ in range(15):
        writer = context.Process(target=write_for_ever, args=(path,))
        writer.start()
        time.sleep(rng.uniform(0.02, 0.12))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        torn = sum(1 for line in path.read_bytes().split(b"\n") if line) - len(read_lines(path))
        notes = (tmp_path / "notes.md").read_text()
        assert torn <= 15 and len(read_lines(path)) >= seen
        assert notes.startswith("# Notes\n") and notes.count("## Experiment:") == notes.count("\nend")
        seen = len(read_lines(path))
    assert seen >= 15


def append_many(path: Path, first: int) -> None:
    for number in range(first, first + 40):
        append_line(path, record(number) | {"samples": list(range(5000))})
        append_note(path.with_name("notes.md"), f"## Experiment: {number}")


def test_processes_that_write_at_once_mix_no_lines_and_lose_no_notes(tmp_path):
    context = multiprocessing.get_context("fork")
    (tmp_path / "notes.md").write_text("# Notes\n")
    writers = [context.Process(target=append_many, args=(tmp_path / "x.jsonl", 40 * i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert sorted(r["id"] for r in read_lines(tmp_path / "x.jsonl")) == sorted(record(i)["id"] for i in range(160))
    assert (tmp_path / "notes.md").read_text().count("## Experiment:") == 160


# ---- notes.md


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["", "1", "3"])
def test_a_note_is_appended_after_one_empty_line_in_the_files_own_line_endings(tmp_path, newline, ending):
    path = tmp_path / "notes.md"
    path.write_bytes(f"# Mine{newline}text{newline * int(ending or 0)}".encode())
    append_note(path, "## Experiment: x\nline")
    assert path.read_bytes() == newline.join(["# Mine", "text", "", "## Experiment: x", "line", ""]).encode()


def test_a_missing_notes_file_is_begun_and_a_linked_one_stays_a_link(tmp_path):
    append_note(tmp_path / "notes.md", "## Experiment: x")
    assert (tmp_path / "notes.md").read_text() == "## Experiment: x\n"
    (tmp_path / "link.md").symlink_to("notes.md")
    append_note(tmp_path / "link.md", "## Experiment: y")
    assert (tmp_path / "link.md").is_symlink()
    assert "Experiment: y" in (tmp_path / "notes.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.md", "notes.md"]  # no lock, no scratch file


def test_what_a_person_wrote_survives_byte_for_byte(tmp_path):
    """Hand-edited notes may hold anything: odd bytes, half a record, no checklist."""
    path = tmp_path / "notes.md"
    mine = b"\xff odd \xe4\xbd\n## Experiment: half\n- **Date**: 20"
    path.write_bytes(mine)
    append_note(path, "## Experiment: x")
    assert path.read_bytes() == mine + b"\n\n## Experiment: x\n"


def test_the_record_in_notes_has_the_templates_lines():
    text = note_text(record() | {"partial": True}, "| a |\n|---|", "I saw this.\n")
    assert text == Path(__file__).with_name("golden").joinpath("note.md").read_text()


# ---- saving


def test_save_writes_the_line_the_note_and_the_cited_line(tmp_path):
    config = config_for(tmp_path, note="seen")
    check_writable(config, "infer")
    assert save(config, record(), "| t |") is None
    for name in ("x.jsonl", "cited.jsonl"):
        assert [r["id"] for r in read_lines(tmp_path / "results" / name)] == [record()["id"]]
    assert "[infer-261121-000001]" in (tmp_path / "notes.md").read_text()


def test_without_note_nothing_but_the_line_is_written(tmp_path):
    assert save(config_for(tmp_path), record(), "") is None
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["x.jsonl"]


def test_checking_leaves_no_empty_files_behind(tmp_path):
    check_writable(config_for(tmp_path, note=""), "infer")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_place_that_cannot_be_written_is_refused_before_measuring(tmp_path):
    (tmp_path / "results").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot be written") as refused:
        check_writable(config_for(tmp_path), "infer")
    assert "--json" in str(refused.value)
    with pytest.raises(UserError, match="notes"):
        check_writable(Config(json="-", note="", notes_file="/proc/notes.md"), "infer")


def test_a_disk_that_fills_up_tears_no_line_and_the_record_is_saved_elsewhere(tmp_path, monkeypatch):
    """The write fails in the middle: the file is cut back, the tables still appear, the record is not lost."""
    config = config_for(tmp_path)
    append_line(tmp_path / "results" / "x.jsonl", record(1))
    before = (tmp_path / "results" / "x.jsonl").read_bytes()
    fill_the_disk(monkeypatch)
    monkeypatch.setattr(records.tempfile, "gettempdir", lambda: str(tmp_path))
    failure = save(config, record(2), "")
    monkeypatch.undo()
    assert isinstance(failure, UserError) and "No space left" in str(failure)
    assert (tmp_path / "results" / "x.jsonl").read_bytes() == before
    assert json.loads((tmp_path / f"{record(2)['id']}.json").read_text()) == record(2)


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on os.write() takes 100 bytes and then no more."""
    real, taken = os.write, []

    def full(file: int, data: bytes) -> int:
        if taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken.append(real(file, data[:100]))
        return taken[0]

    monkeypatch.setattr(records.os, "write", full)


def test_when_the_temporary_folder_is_full_too_the_tables_still_appear(tmp_path, monkeypatch):
    fill_the_disk(monkeypatch)
    monkeypatch.setattr(records.tempfile, "gettempdir", lambda: "/proc")
    failure = save(config_for(tmp_path), record(), "")
    assert isinstance(failure, UserError) and "copy the tables" in str(failure)


def test_records_name_a_command_that_can_be_typed_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from lab.records import new_record\nfrom config import Config\n"
        "r = new_record('infer', 'q', Config(), {})\nprint(r['command'], r['id'][:6], r['schema'])\n"
    )
    done = subprocess.run([sys.executable, str(script), "--prompt", "a b"], capture_output=True, text=True)
    assert done.stdout == f"python3 {script} --prompt 'a b' infer- 1\n"
