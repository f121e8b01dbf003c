"""A service seen from outside: what its process holds, what its own metrics count, and how fast this machine is now.

Memory is RssAnon + VmSwap: what the process has written to and nobody else can give back. Resident memory as a whole
(RSS) moves with the files that the system keeps in memory.
"""

import contextlib
import hashlib
import threading
import time
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from config import UserError
from load import server

Look = dict[str, Any]
Series = list[tuple[str, dict[str, str], float]]
MIB = 1 << 20
PROBES = ("metrics", "health", "capacity", "config", "models")  # endpoints that no visitor of a mixed load asks
ANCHOR = bytes(8 * MIB)


class Ended(Exception):
    """The process that is looked at is not there any more."""


class Outside:
    """The process of this number, which answers at url."""

    def __init__(self, pid: int, url: str) -> None:
        self.folder, self.url, self.lock = Path(f"/proc/{pid}"), url, threading.Lock()
        if not (self.folder / "status").exists():
            raise UserError("A soak reads /proc/PID/status and /proc/PID/fd: run it on Linux.")

    def look(self) -> Look:
        """Now. ok: the metrics were answered; without them, what they say is missing."""
        with self.lock:  # two scrapes at once would see each other's connections
            start_s = time.perf_counter()
            raw = server.get(self.url, "/metrics", {})
            scraped_s = time.perf_counter() - start_s
            held = self.held()
        series = parsed(raw)
        if series is None:
            return {"ok": False, "scrape_s": scraped_s} | held
        total = totals(series)
        return held | {
            "ok": True, "scrape_s": scraped_s, "tasks": int(total["llmserve_event_loop_tasks"]),
            "running": int(total["llmserve_requests_running"]), "waiting": int(total["llmserve_requests_waiting"]),
            "kv": total["llmserve_kv_cache_usage_ratio"],
            "restarts": int(total.get("llmserve_engine_restarts_total", 0)),
            "computed": int(computed(series)),
            "broken": [labels["law"] for name, labels, value in series if name == "llmserve_law_ok" and not value],
            "outcomes": outcomes(series),
        }  # fmt: skip

    def held(self) -> dict[str, int]:
        """Bytes, open files and threads of the process. Ended when there is none."""
        try:
            lines = (line.partition(":") for line in (self.folder / "status").read_text().splitlines())
            said = {name: value.split() for name, _, value in lines}
            kib = int(said["RssAnon"][0]) + int(said.get("VmSwap", ["0"])[0])
            files = sum(1 for _ in (self.folder / "fd").iterdir())
        except (OSError, KeyError) as error:  # KeyError: it has ended, and nobody has asked for its status yet
            raise Ended from error
        return {"bytes": kib << 10, "files": files, "threads": int(said["Threads"][0])}

    def kv_tokens(self) -> int:
        """Tokens whose keys and values the whole pool holds."""
        total = totals(parsed(server.get(self.url, "/metrics", {})) or [])
        return int(total["llmserve_kv_blocks_total"] * total["llmserve_kv_block_size_tokens"])


def parsed(raw: bytes | None) -> Series | None:
    """name, labels and value of every sample."""
    if raw is None:
        return None
    families = text_string_to_metric_families(raw.decode())
    return [(one.name, one.labels, one.value) for family in families for one in family.samples]


def totals(series: Series) -> dict[str, float]:
    """name -> the sum over its labels."""
    found: dict[str, float] = {}
    for name, _, value in series:
        found[name] = found.get(name, 0.0) + value
    return found


def computed(series: Series) -> float:
    """Tokens whose keys and values were computed: of prompts, without what was found; and new ones."""
    found = [value for name, labels, value in series if name == "llmserve_prompt_tokens_total"
             and labels["cached"] == "false"]  # fmt: skip
    return sum(found) + totals(series)["llmserve_generated_tokens_total"]


def outcomes(series: Series) -> dict[str, int]:
    """How the requests of visitors ended, as the service counts them."""
    found: dict[str, int] = {}
    for name, labels, value in series:
        if name == "llmserve_requests_total" and labels["endpoint"] not in PROBES:
            found[labels["outcome"]] = found.get(labels["outcome"], 0) + int(value)
    return found


def anchor_s() -> float:
    """CPU seconds of a fixed piece of work in this thread: grows when the machine slows down, not when it is busy."""
    start_s = time.thread_time()
    hashlib.sha256(ANCHOR).digest()  # without Python's lock: nobody waits for it
    return time.thread_time() - start_s


class Watching:
    """with Watching(outside, every_s) as looks: a look every so often, from a thread, into a list that grows.

    at: seconds since start_s, a reading of time.perf_counter.
    """

    def __init__(self, outside: Outside, every_s: float, start_s: float, looks: list[Look]) -> None:
        self.outside, self.every_s, self.start_s, self.looks = outside, every_s, start_s, looks
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.loop, name="looking at the service", daemon=True)

    def __enter__(self) -> list[Look]:
        self.thread.start()
        return self.looks

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def loop(self) -> None:
        with contextlib.suppress(Ended):  # whoever sends requests will see it, too
            while not self.stop.wait(self.every_s):
                self.looks.append(seen_at(self.outside, self.start_s))


def seen_at(outside: Outside, start_s: float) -> Look:
    at = time.perf_counter() - start_s
    return {"at": at} | outside.look() | {"anchor_s": anchor_s()}
