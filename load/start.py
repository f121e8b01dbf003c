"""serve.py as a process of its own that ends with the run: its address, and its number for who looks from outside."""

import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from config import ROOT, UserError

START_S = 600.0  # a model may have to be converted first
SERVE = (sys.executable, str(ROOT / "serve.py"))


@dataclass(frozen=True)
class Started:
    url: str
    pid: int


@contextlib.contextmanager
def started(options: Sequence[str], command: Sequence[str] = SERVE) -> Iterator[Started]:
    """On a free port. Its own session: Ctrl-C is for who measures, who then ends it. UserError: it does not start."""
    process = subprocess.Popen(
        [*command, "--port", "0", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield Started(address_of(process), process.pid)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()
        process.stdout.close()


def address_of(process: subprocess.Popen) -> str:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and process.poll() is None:
        if select.select([process.stdout], [], [], 1.0)[0]:
            line = process.stdout.readline()
            if " at http" in line:
                return line.rsplit(" at ", 1)[1].strip()
    raise UserError(f"serve.py did not start (status {process.poll()}): try `python3 serve.py` by itself.")
