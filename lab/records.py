"""What a run leaves behind: one JSON line in results/, and on request a record in notes.md.

Nothing that was measured may be lost, and nothing written may be half a record that looks whole. Lines are appended
under a lock with one write; notes.md is replaced by a longer copy of itself in one step.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from config import ROOT, Recorded, UserError

SCHEMA = 1


def new_record(script: str, question: str, config: Recorded, card: dict[str, str]) -> dict[str, Any]:
    """The part that every record has. Raw samples, verdicts and sizes are added by the script.

    Records are shared and committed: of a secret they say only that there was one.
    """
    now, secret = time.time(), {f.name for f in fields(config) if f.metadata.get("secret")}
    kept = {name: "set" if name in secret and value else value for name, value in asdict(config).items()}
    hidden = {getattr(config, name) for name in secret if getattr(config, name)}
    return {
        "schema": SCHEMA,
        "id": f"{script}-{time.strftime('%y%m%d', time.localtime(now))}-{secrets.token_hex(3)}",
        "script": script,
        "question": question,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now)),
        "command": shlex.join(["python3", *(without(word, hidden) for word in sys.orig_argv[1:])]),
        "config": kept,
        "card": card,
        "partial": False,
    }


def without(word: str, secrets: set[str]) -> str:
    for one in secrets:
        word = word.replace(one, "SECRET")
    return word


def output_hash(ids: Sequence[int]) -> str:
    """Twelve hex digits that two runs share when they produced the same tokens."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:12]


# ---- results/*.jsonl


def results_path(config: Recorded, script: str) -> Path | None:
    """Where the record's line goes; None when it goes to stdout (--json -)."""
    if config.json == "-":
        return None
    return Path(config.json) if config.json else ROOT / "results" / f"{script}.jsonl"


@contextlib.contextmanager
def kept_so_far(config: Recorded, record: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """A call that writes the record as far as it is, for whoever reads results/ after this process was killed.

    That file goes when all went well. It stays where the whole record could not be written where it belongs.
    """
    whole = results_path(config, record["script"])
    beside = bool(whole) and (whole.is_file() or not whole.exists())  # not when it goes to stdout or to a device
    path = whole.with_name(f"{record['id']}.jsonl") if beside else None

    def keep() -> None:
        with contextlib.suppress(OSError):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_whole(path, (json.dumps(record | {"partial": True, "verdicts": []}) + "\n").encode())

    try:
        yield keep
    except BrokenPipeError:  # nobody reads what is printed: the record is where it belongs
        if path:
            path.unlink(missing_ok=True)
        raise
    if path:
        path.unlink(missing_ok=True)


def check_writable(config: Recorded, script: str, *others: tuple[Path, str]) -> None:
    """Find out before measuring, not after it, that a file could not be written. UserError.

    others: further files, each with the remedy that its sentence names.
    """
    targets = [(results_path(config, script), "another --json FILE or --json -"), *others]
    if config.note is not None:
        targets += [(Path(config.notes_file), "--notes-file FILE"), (cited_path(config), "--notes-file FILE")]
    for path, remedy in targets:
        if path is None:
            continue
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            existed = path.exists()
            with path.open("ab"):
                pass
            if not existed:
                path.unlink()
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): make that possible, or give {remedy}."
            ) from error


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line. A half line that a killed run left is closed first, and read_lines() passes over it."""
    line = (json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file gives it back
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        try:
            write_all(file, b"\n" + line if torn else line)
            os.fsync(file)
        except OSError:  # a full disk: take back what was written, so that the file stays whole
            with contextlib.suppress(OSError):  # a device cannot be cut back
                os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def unfinished(config: Recorded, record: dict[str, Any], same: Sequence[str], trials: int) -> dict[str, Any] | None:
    """The last record of the --json file if it is this run, cut short: it can be gone on with.

    The same script, model, machine, versions and commit, and the same settings named in same; and it is partial, or has
    fewer than so many trials.
    """
    if config.json in (None, "-"):
        return None
    alike = (("script",), ("model", "hash"), ("model", "dtype"), ("model", "device"), ("card", "CPU"), ("card", "GPU"),
             ("card", "Threads in use"), ("card", "Versions"), ("card", "Commit"))  # fmt: skip
    for old in reversed(read_lines(Path(config.json))):
        if all(dig(old, path) == dig(record, path) for path in (*alike, *(("config", name) for name in same))):
            return old if old["partial"] or len(old["trials"]) < trials else None
    return None


def dig(value: Any, path: Sequence[str]) -> Any:
    """The value inside nested dicts; None where a step is missing."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a file; torn lines and lines of other kinds are passed over."""
    records = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict) and "id" in value:
                    records.append(value)
    return records


# ---- notes.md


def cited_path(config: Recorded) -> Path:
    """The committed file with the raw lines of the records that notes.md holds."""
    return Path(config.notes_file).parent / "results" / "cited.jsonl"


def append_note(path: Path, text: str) -> None:
    """Append a record to notes.md, in the file's own line endings, in one step: the old file or the new, never half."""

    def longer(old: bytes) -> bytes:
        newline = b"\r\n" if b"\r\n" in old else b"\n"
        kept = old.rstrip(b"\r\n") + 2 * newline if old.strip() else b""
        return kept + text.strip("\n").encode().replace(b"\n", newline) + newline

    rewrite(path, longer)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file by change(its content), while no other process of this kit does."""
    path = path.resolve()  # a linked notes.md is replaced where it lies
    with folder_locked(path.parent):
        old = path.read_bytes() if path.exists() else b""
        new = change(old)
        if new != old:
            replace_whole(path, new)


@contextlib.contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Hold a folder's own lock: a lock file would stay behind beside notes.md."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def replace_whole(path: Path, content: bytes) -> None:
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, scratch)
        else:
            os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except OSError:
        Path(scratch).unlink(missing_ok=True)
        raise


def note_text(record: dict[str, Any], tables: str, observations: str) -> str:
    """A record in the form of notes.md's template."""
    model, run = record["model"], record["config"]
    items = {
        "Date": record["time"][:10],
        "Hardware": "{CPU}; {Cores}; RAM {RAM}; GPU {GPU}".format(**record["card"]),
        "Model": f"{model['name']} @ {model['dtype']} on {model['device']} ({model['origin']}, hash {model['hash']})",
        "Prompt": f"{json.dumps(record['prompt'], ensure_ascii=False)} ({record['prompt_tokens']} tokens)",
        "Max tokens": run.get("max_new_tokens", "–"),
        "Batch policy": record["batch_policy"],
        "KV cache": record["kv_cache"],
        "GPU utilisation": record["gpu_utilisation"],
        "Command": f"`{record['command']}`",
        "Commit": record["card"]["Commit"],
        "Evidence": f"[{record['id']}]" + (" (partial: interrupted)" if record["partial"] else ""),
    }
    head = "\n".join(f"- **{name}**: {value}" for name, value in items.items())
    verdicts = "\n".join(f"- {sentence}" for sentence in record["verdicts"])
    return (
        f"## Experiment: {record['question']}\n\n{head}\n\n**Metrics**\n\n{tables.strip()}\n\n"
        f"**Verdict**\n\n{verdicts}\n\n**Observations**\n\n{observations.strip()}\n"
    )


# ---- the end of a run


def save(config: Recorded, record: dict[str, Any], tables: str) -> UserError | None:
    """Write the record wherever it belongs. A failure is returned, not raised, so that the tables are still printed.

    When the results file cannot be written any more, the line goes to the temporary folder: it is never lost.
    """
    path = results_path(config, record["script"])
    try:
        if path is not None:
            append_line(path, record)
        if config.note is not None:
            append_line(cited_path(config), record)
            append_note(Path(config.notes_file), note_text(record, tables, config.note))
    except OSError as error:
        try:
            rescue = Path(tempfile.gettempdir()) / f"{record['id']}.json"
            rescue.write_text(json.dumps(record, ensure_ascii=False))
            where = f"it was saved as {rescue} instead"
        except OSError:
            where = "and it could not be saved in the temporary folder either: copy the tables"
        return UserError(f"The record could not be written ({error}): {where}.")
    return None
