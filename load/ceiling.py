"""What this client can do at most, measured against a server that does nothing but answer. Kept for later runs."""

import json
from collections.abc import Callable
from typing import Any

from config import cache_dir, keep
from lab.card import cpu_model
from lab.client import Client
from load import drive, golden
from load.script import MODEL, NULL, Script

CLIENTS, REQUESTS, NEW = 16, 1500, 32
STREAMS = (96, 192, 384, 768)  # at once, more and more; the clock is exact below a thousand open files (load/clock.py)
STREAM_NEW, GAP_S = 200, 0.01
CLEARLY = 0.9  # of what the script sends: who takes less is at a limit, and else the script may be the limit


def measure() -> dict[str, Any]:
    """requests_per_s: short answers, one after the other. pieces_per_s: of many slow streams, each piece by itself.
    at_least: no more pieces than that were sent.
    """
    with golden.started(NULL) as server:
        answers, _, seconds = done(server.url, REQUESTS, NEW, CLIENTS)
    with golden.started(Script(0.0, GAP_S)) as server:
        pieces_per_s, at_least = most_pieces(lambda streams: streamed(server.url, streams))
    found = {"requests_per_s": answers / seconds, "pieces_per_s": pieces_per_s, "at_least": at_least,
             "cpu": cpu_model()}  # fmt: skip
    keep(cache_dir() / "client_ceiling.json", json.dumps(found))
    return found


def most_pieces(taken: Callable[[int], float]) -> tuple[float, bool]:
    """(pieces a second, whether the script sent no more). taken(streams): pieces a second of so many at once."""
    for streams in STREAMS:
        rate = taken(streams)
        if rate < CLEARLY * sent_by(streams):
            return rate, False
    return rate, True


def sent_by(streams: int) -> float:
    """Pieces a second of the script, which cannot send more."""
    return streams * STREAM_NEW / ((STREAM_NEW - 1) * GAP_S)


def streamed(url: str, streams: int) -> float:
    _, pieces, seconds = done(url, streams, STREAM_NEW, streams)
    return pieces / seconds


def done(url: str, requests: int, new: int, clients: int) -> tuple[int, int, float]:
    """(answers, pieces that were read by themselves, seconds). Who is late reads several at once, with one stamp."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": new, "stream": True}
    ran = drive.closed(Client(url + "/v1/completions"), [body] * requests, clients)
    if ran.interrupted:
        raise KeyboardInterrupt
    whole = [trace for trace in ran.traces if trace.complete]
    reads = sum(len({moment for moment, _ in trace.pieces}) for trace in whole)
    return len(whole), reads, ran.end_s - ran.start_s


def known() -> dict[str, Any] | None:
    """What was measured on this machine before."""
    try:
        found = json.loads((cache_dir() / "client_ceiling.json").read_text())
        return found if found["cpu"] == cpu_model() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
