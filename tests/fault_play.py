"""Faults that nobody can cause from outside, made in a service in this process, so that one sees what it says of them.

    python3 tests/fault_play.py stalled     # one of FAULTS; RUNBOOK.md has what each prints

The service is that of service_kit.py, whose engine can be held and made to fail.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import orjson
from service_kit import Reply, Served, served
from step_kit import figure

from weights import tiny

SOME_S = 0.5  # for the log's line, which follows the reply


def said(what: str, found: Any) -> None:
    """One line: a reply as its status and its JSON."""
    if isinstance(found, Reply):
        found = f"{found.status} {found.body.decode()}"
    print(f"{what}: {found if isinstance(found, str) else orjson.dumps(found).decode()}", flush=True)


def failing(here: Served, text: str) -> Reply:
    """A request whose first step fails."""
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("CUDA error: an illegal memory access")
    return here.chat(text)


def stalled(here: Served) -> None:
    here.runner.hold()
    late = here.later(here.chat, headers={"X_Request_Deadline_Ms": "2000"})
    here.until(lambda: here.ask("/health/live").status == 503)
    said("/health/live", here.ask("/health/live"))
    said("/health/ready", here.ask("/health/ready"))
    said("the request", late.result())
    here.runner.go()


def failed(here: Served) -> None:
    said("the request", failing(here, "hello"))
    time.sleep(SOME_S)
    line = here.lines()[-1]
    said("the log", {name: line[name] for name in ("request_id", "status", "outcome", "error")})
    said("/health", {"engine_restarts": here.ask("/health").json["engine_restarts"]})
    said("llmserve_engine_restarts_total", str(figure(here, "engine_restarts_total")))


def quarantined(here: Served) -> None:
    said("twice", [failing(here, "poison").status for _ in range(2)])
    said("the third time", here.chat("poison"))
    said("somebody else", str(here.chat("an innocent one").status))
    said("llmserve_quarantine_inputs", str(figure(here, "quarantine_inputs", state="quarantined")))


def broken(here: Served) -> None:
    here.bridge.useful += 5  # five tokens more than were computed
    here.until(lambda: here.chat() and here.ask("/health").json["broken_laws"])
    health = here.ask("/health").json
    said("/health", {name: health[name] for name in ("status", "broken_laws")})
    said('llmserve_law_ok{law="tokens"}', str(figure(here, "law_ok", law="tokens")))
    here.bridge.useful -= 5


def circuit(here: Served) -> None:
    told = [failing(here, f"number {i}").status for i in range(20)]
    said("twenty requests", {str(status): told.count(status) for status in set(told)})
    said("the next", here.chat())
    said("/health", here.ask("/health").json["breakers"])
    here.house.serving.relief.engine.force(None)


def memory(here: Served) -> None:
    here.house.watch.memory.used = lambda: 0.97
    here.until(lambda: here.admission.closed)
    said("a request", here.chat())
    said("/health/ready", here.ask("/health/ready"))
    here.house.watch.memory.used = lambda: 0.9
    here.until(lambda: not here.admission.closed)
    said("below 92 %", str(here.chat().status))


def capped(here: Served) -> None:
    here.runner.hold()
    held = [here.later(here.chat, f"number {i}", max_tokens=30) for i in range(7)]
    here.until(lambda: here.admission.answers == len(held))
    last = here.later(here.chat, "the last", max_tokens=30)
    here.until(lambda: here.admission.answers == len(held) + 1)
    here.runner.go()
    reply = last.result()
    said("x-degraded", reply.headers["x-degraded"])
    said("its end", {"completion_tokens": reply.json["usage"]["completion_tokens"],
                     "finish_reason": reply.json["choices"][0]["finish_reason"]})  # fmt: skip
    for one in held:
        one.result()


FAULTS: dict[str, tuple[Callable[[Served], None], dict[str, Any]]] = {
    "stalled": (stalled, {"stall_after": 1.0}), "failed": (failed, {}), "quarantined": (quarantined, {}),
    "broken": (broken, {}), "circuit": (circuit, {}), "memory": (memory, {}),
    "capped": (capped, {"degrade_max_tokens": 8}),
}  # fmt: skip


def play(name: str) -> None:
    fault, settings = FAULTS[name]
    with tempfile.TemporaryDirectory() as folder, served(tiny.checkpoint(Path(folder)), **settings) as here:
        here.house.watch.laws_s = 0.0  # at every step
        fault(here)
        here.runner.faults.clear()
        here.until(here.idle)


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in FAULTS]:
        sys.exit(f"fault_play.py takes one of {', '.join(FAULTS)}.")
    play(sys.argv[1])
