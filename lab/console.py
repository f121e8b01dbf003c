"""Scripts as good Unix tools: exit statuses, pipes, narrow locales, progress on a terminal only."""

import codecs
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import config
from config import Recorded, UserError
from lab import records

# What to print where the terminal's encoding lacks a character. One for one, so that columns stay aligned.
ASCII = dict(zip("▁▂▃▄▅▆▇█", ".:-=+*#@", strict=True)) | {
    "–": "-",
    "—": "-",
    "−": "-",
    "×": "x",
    "±": "~",
    "≤": "<",
    "≥": ">",
    "→": ">",
    "·": ".",
    "…": ".",
    "µ": "u",
    "²": "2",
    "☐": "o",
    "☑": "x",
    "’": "'",
    "“": '"',
    "”": '"',
}

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPE_CLOSED = 141  # 128 + SIGPIPE


def run(main: Callable[[], int | None]) -> None:
    """Call main, then leave: status 0, 2 for the user's mistakes, 130 after Ctrl-C, 141 for a closed pipe."""
    prepare_streams()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # until here check_packages()'s held
    program = config.program()
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        status = complain(program, str(error))
    except KeyboardInterrupt:
        complain(program, "interrupted before anything was measured.")
        status = INTERRUPTED
    except BrokenPipeError:
        status = PIPE_CLOSED
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        status = complain(program, f"the output could not be written ({error.strerror}): make room or print elsewhere.")
    leave(status)


def complain(program: str, sentence: str) -> int:
    print(f"{program}: {sentence}", file=sys.stderr)
    return 2


def leave(status: int) -> None:
    """Exit without a second complaint from Python about a pipe that is gone or a disk that is full."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def prepare_streams() -> None:
    """Make printing never fail: a character that the terminal lacks is replaced by one that looks like it."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # a closed stdout is None
    sys.stderr = sys.stderr or open(os.devnull, "w")
    codecs.register_error("look-alike", look_alike)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="look-alike")


def look_alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII.get(character, "?") for character in text), error.end


def warn(sentence: str | None) -> None:
    """Print a warning on stderr; None is no warning."""
    if sentence:
        print(f"warning: {sentence}", file=sys.stderr)


def progress(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    """The items, with a bar and the time left on stderr while it is a terminal; it leaves nothing behind."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=label, leave=False, disable=None, file=sys.stderr, dynamic_ncols=True)


@contextlib.contextmanager
def bar(total: float, label: str) -> Iterator[Callable[[float], object]]:
    """A bar for parts of unequal length: with bar(sum of weights, label) as advance: advance(weight) after each."""
    from tqdm import tqdm

    shown = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"
    with tqdm(
        total=total, desc=label, leave=False, disable=None, file=sys.stderr, dynamic_ncols=True, bar_format=shown
    ) as inner:
        yield inner.update


class Page:
    """Shows each part of the output as soon as it is known, and keeps all of it for the record."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent
        self.closed = False  # the reader went away: what is still to be measured is measured and saved all the same
        self.parts: list[str] = []

    def show(self, text: str, keep: bool = True) -> None:
        """Print a paragraph, unless only JSON was asked for; keep it for the record in notes.md."""
        if keep:
            self.parts.append(text)
        if not self.silent:
            self.write(text + "\n")

    def write(self, text: str) -> None:
        try:
            if not self.closed:
                print(text, flush=True)
        except BrokenPipeError:
            self.closed = True

    @property
    def text(self) -> str:
        return "\n\n".join(self.parts)


def conclude(wishes: Recorded, record: dict[str, Any], page: Page, sections: Sequence[str]) -> int:
    """The end of every script: save first, then print the sections and the verdict. Returns the exit status.

    In this order a closed pipe or a full disk cannot cost what was measured.
    """
    verdict = "### Verdict\n\n" + "\n".join(f"- {sentence}" for sentence in record["verdicts"])
    failure = records.save(wishes, record, "\n\n".join([*page.parts, *sections]))
    for section in (*sections, verdict):
        page.show(section)
    page.show(f"Record [{record['id']}]" + (" PARTIAL: interrupted" if record["partial"] else ""))
    if wishes.json == "-":
        page.write(json.dumps(record))  # ASCII: no terminal's encoding can change it
    if failure:
        raise failure
    if page.closed:
        raise BrokenPipeError
    return INTERRUPTED if record["partial"] else 0
