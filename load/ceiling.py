"""What this client can do at most, measured against a server that does nothing but answer. Kept for later runs."""

import json
from typing import Any

from config import cache_dir, keep
from lab.card import cpu_model
from lab.client import Client
from load import drive, golden
from load.measures import measured
from load.script import MODEL, NULL, Script

CLIENTS, REQUESTS, NEW = 16, 1500, 32
STREAMS, STREAM_NEW, GAP_S = 96, 100, 0.01  # streams that together send more pieces than one core can take apart


def measure() -> dict[str, Any]:
    """requests_per_s: short answers, one after the other. pieces_per_s: of many slow streams, each piece by itself."""
    with golden.started(NULL) as server:
        answered, _, seconds = done(server.url, REQUESTS, NEW, CLIENTS)
    with golden.started(Script(0.0, GAP_S)) as server:
        _, pieces, streaming_s = done(server.url, 5 * STREAMS, STREAM_NEW, STREAMS)
    found = {"requests_per_s": answered / seconds, "pieces_per_s": pieces / streaming_s, "cpu": cpu_model()}
    keep(cache_dir() / "client_ceiling.json", json.dumps(found))
    return found


def done(url: str, requests: int, new: int, clients: int) -> tuple[int, int, float]:
    """(answers, pieces of text, seconds)."""
    body = {"model": MODEL, "prompt": "x", "max_tokens": new, "stream": True}
    ran = drive.closed(Client(url + "/v1/completions"), [body] * requests, clients)
    found = [one for one in measured(ran.traces, ran.start_s) if one["ok"]]
    return len(found), sum(len(one["chunks"]) for one in found), ran.end_s - ran.start_s


def known() -> dict[str, Any] | None:
    """What was measured on this machine before."""
    try:
        found = json.loads((cache_dir() / "client_ceiling.json").read_text())
        return found if found["cpu"] == cpu_model() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
