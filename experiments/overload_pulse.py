"""Three times what it can do, for twenty seconds: what does the service do, and how soon is it what it was?

An open loop: a steady load of 0.6 of the measured capacity, then the pulse, then the steady load again; nobody waits
for anybody. Seen are the answers a second, who is refused and how fast, the queue, and the wait for a first token. The
service has recovered when those who come now are served like those who came before the pulse. Of the steady parts it is
said which of three targets they keep: half of the answers within 500 ms, 99 % within 2 s, 99.9 % of the requests
served; and for those that are missed, what they would need, by a simulation with the measured times of a step.

    python3 -m experiments.overload_pulse --model smollm2 --figure     # six rounds, about nine minutes
    python3 -m experiments.overload_pulse --quick                      # two rounds: to see it once, no verdict
    python3 -m experiments.overload_pulse --max-queued 16              # a shorter queue is empty sooner
"""

from config import Recorded, UserError, check_packages, knob

if __name__ == "__main__":
    check_packages("httptools", "orjson", "prometheus_client", target="serve", requirements="requirements-serve.txt")

import os
import re
import signal
from dataclasses import dataclass
from typing import Any

from lab import arrivals, console, pulse_tables, pulse_words, records
from lab.arrivals import Planned
from lab.card import machine_card
from lab.request_tables import card_table
from load import measure, measures, server
from load.measures import INTERRUPTED
from load.plan import Cell
from load.prompts import Prompts
from load.start import started

CLIENTS_MORE = 8  # than slots: nobody's slot is ever empty while the capacity is measured
CAPACITY_S = 20.0
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class PulseConfig(Recorded):
    model: str | None = knob(None, "what serve.py serves", env="LLM_INFER_MODEL")
    load: float = knob(0.6, "of the capacity, before and after", least=0.05, most=0.95)
    pulse: float = knob(3.0, "times the capacity, in the pulse", least=1.1)
    before: float = knob(25.0, "seconds before the pulse, the first five of which do not count", least=8.0)
    seconds: float = knob(20.0, "of the pulse", least=1.0)
    after: float = knob(35.0, "seconds after it", least=12.0)
    rounds: int = knob(6, "of before, pulse and after; six are the fewest for an interval", least=1, quick=2)
    prompt_tokens: int = knob(32, "length of a prompt, about", least=4)
    max_new_tokens: int = knob(16, "new tokens of an answer", least=2)
    max_running: int = knob(16, "answers computed at once", least=1)
    max_queued: int = knob(0, "requests that may wait; 0 = twice max_running", least=0)
    capacity_s: float = knob(CAPACITY_S, "seconds in which the capacity is measured", least=2.0, quick=8.0)
    seed: int = knob(0, "of arrivals and prompts", least=0)
    figure: bool = knob(False, "draw arrivals, answers, refusals, queue and waits over time")
    quick: bool = knob(False, "a first look: two rounds")


def pulse_load(config: PulseConfig, capacity: float, number: int) -> list[Planned]:
    """The arrivals of one round: independent users, at three rates one after the other."""
    steady, high = config.load * capacity, config.pulse * capacity
    dues, begin = [], 0.0
    for part, (rate, length) in enumerate(((steady, config.before), (high, config.seconds), (steady, config.after))):
        for due in arrivals.moments("poisson", rate, config.seed + 1000 * number + part):
            if due >= length:
                break
            dues.append(begin + due)
        begin += length
    return [Planned(due, config.prompt_tokens, config.max_new_tokens) for due in dues]


def cell(planned: list[Planned]) -> Cell:
    return Cell(None, None, None, None, None, len(planned), recorded=tuple(planned))


def round_of(run: measure.Run) -> dict[str, Any]:
    """What is kept of a round: every request's moments and how it ended, and the service's queue."""
    asked = [one for one in run["requests"] if one["error"] != INTERRUPTED]
    requests = [
        {"due": one["due"], "end": one["end"], "ttft": measures.ttft(one) if one["ok"] else None,
         "e2e": measures.e2e(one) if one["ok"] else None, "kind": kind_of(one)}
        for one in asked
    ]  # fmt: skip
    looks = [{name: look.get(name) for name in ("at", "running", "waiting")} for look in run["metrics"]["during"]]
    return {"requests": requests, "looks": looks, "laws": run["laws"]}


def kind_of(request: measures.Request) -> str:
    """served; or the status with the limit that was hit, as the refusal says it; or what went wrong."""
    if request["ok"]:
        return "served"
    said = request["error"]
    limit = re.search(r'"limit_hit": ?"(\w+)"', said) or re.search(r'"code": ?"(\w+)"', said)
    return f"{request['status']} {limit[1]}" if request["status"] and limit else said.partition(":")[0]


def measured(config: PulseConfig, record: dict[str, Any], url: str) -> None:
    """The capacity, then round after round. Ctrl-C keeps the rounds that had ended."""
    model = (server.models(url, {}) or [""])[0]
    about = server.about(url, {})
    prompts = Prompts("completions", model, config.seed)
    target = measure.Target(url, "/v1/completions", {}, prompts.of, TIMEOUT_S, 0, config.seed)
    record |= {"server": {"url": url, "model": model} | about} | described(config, model, about)
    try:
        record["capacity_per_s"] = capacity = capacity_of(config, target)
        record["rate_per_s"] = config.load * capacity
        for number in range(config.rounds):
            run = measure.run(target, cell(pulse_load(config, capacity, number)))
            if run["ended"]:
                record["partial"] = True
                break
            record["rounds"].append(round_of(run))
    except KeyboardInterrupt:
        record["partial"] = True
    record["capacity_after"] = server.about(url, {}).get("capacity")


def capacity_of(config: PulseConfig, target: measure.Target) -> float:
    """Requests a second that clients get through who all wait for their answers. UserError; KeyboardInterrupt."""
    clients = config.max_running + CLIENTS_MORE
    full = Cell(clients, None, None, config.prompt_tokens, config.max_new_tokens, clients)
    measure.warm_up(target, full)
    timed = measure.Target(**vars(target) | {"seconds": config.capacity_s})
    run = measure.run(timed, full)
    if run["ended"] == "interrupted":
        raise KeyboardInterrupt
    if not run["figures"]["requests_per_s"]:
        why = ", ".join(f"{count} times {kind}" for kind, count in run["figures"]["errors"].items()) or "too slow"
        raise UserError(
            f"The service answered nobody in {config.capacity_s:g} s ({why}): is this machine busy with something "
            "else? Try `python3 serve.py` by itself, or a longer --capacity-s."
        )
    return run["figures"]["requests_per_s"]


def described(config: PulseConfig, model: str, about: dict[str, Any]) -> dict[str, Any]:
    """What notes.md has a line for."""
    known = about["about"].get("model") or {}
    return {
        "model": {"name": model, "dtype": known.get("weights", "?"), "device": known.get("device", "?"),
                  "origin": "serve.py", "hash": known.get("hash", "?")},
        "prompt": "synthetic, each begun differently", "prompt_tokens": config.prompt_tokens,
        "batch_policy": f"the service's, {config.max_running} at once", "kv_cache": "the service's",
        "gpu_utilisation": "not sampled",
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    config = PulseConfig.from_cli(__doc__, argv)
    records.check_writable(config, "overload_pulse")
    page, card = console.Page(silent=config.json == "-"), machine_card()
    page.show(
        f"# An overload of {config.pulse:g} times the capacity, {config.seconds:g} s\n\n{card_table(card)}", keep=False
    )
    record = records.new_record("overload_pulse", "overload-pulse", config, card)
    record |= {"rounds": [], "pulse_begin_s": config.before, "pulse_end_s": config.before + config.seconds,
               "round_s": config.before + config.seconds + config.after}  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to end, it keeps what it has, as after Ctrl-C
    options = ["--log-file", os.devnull, "--max-running", str(config.max_running)]
    options += ["--max-queued", str(config.max_queued)] if config.max_queued else []
    options += ["--model", config.model] if config.model else []
    with started(options) as service:
        measured(config, record, service.url)
    if not record["rounds"]:
        raise KeyboardInterrupt
    found = pulse_words.judged(record)
    record |= {"judged": [vars(one) for one in found], "verdicts": pulse_words.sentences(record, found)}
    sections = pulse_tables.sections(record, found)
    if config.figure:
        from lab import pulse_plots  # matplotlib takes a second

        sections.append(pulse_plots.draw(record))
    record["printed"] = "\n\n".join(sections)  # what may be quoted of it, as it was shown
    status = console.conclude(config, record, page, sections)
    return status or (1 if found[0].holds is False else 0)  # the recovery; the targets are the reader's to judge


if __name__ == "__main__":
    console.run(main)
