"""What do clients notice when one of two replicas is killed under load?

Two serve.py and HAProxy in front of them, as deploy/haproxy/haproxy.cfg has it; an open loop of requests, half of them
streams. In the middle of each round one replica is killed with signal 9, left dead for a moment, and started again, in
turn. Of what had not begun nothing may fail; a stream that had begun ends with an error that its client can see.

    python3 -m experiments.replica_kill --model smollm2             # four kills, about three minutes
    python3 -m experiments.replica_kill --model smollm2 --quick     # one kill
    python3 -m experiments.replica_kill --model smollm2 --rate 4 --note "what I saw"
"""

from config import SERVE_PACKAGES, Recorded, check_packages, knob

if __name__ == "__main__":
    check_packages(*SERVE_PACKAGES, target="serve", requirements="requirements-serve.txt")

import contextlib
import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from config import UserError
from experiments.replicas import NAMES, START_S, Balancer, Replica, pair
from lab import arrivals, availability, availability_plots, console, records
from lab.card import machine_card
from lab.client import INTERRUPTED, Body, Client
from lab.request_tables import card_table
from load import drive, server
from load.prompts import Prompts

PATH = "/v1/chat/completions"
LOOK_S = 0.02  # between two looks at what HAProxy thinks
TIMEOUT_S = 120.0  # for one answer


@dataclass(frozen=True)
class ReplicaKillConfig(Recorded):
    model: str | None = knob(None, "what the replicas serve, as serve.py takes it", env="LLM_INFER_MODEL")
    threads: int = knob(1, "CPU threads of each replica; 0 = PyTorch's own choice", least=0)
    kills: int = knob(4, "rounds, each with a kill in its middle; the replicas take turns", least=1, quick=1)
    period: float = knob(40.0, "seconds of a round", least=2, quick=30.0)
    dead: float = knob(2.0, "seconds between the kill and the new start", least=0)
    rate: float = knob(0.0, "requests/s; 0 = --share of what one replica can decode", least=0)
    share: float = knob(0.5, "share of one replica's decoding that is asked for where no rate is given", least=0.01)
    prompt_tokens: int = knob(64, "tokens of a prompt, about", least=8)
    max_new_tokens: int = knob(48, "new tokens of every answer", least=2)
    native: str = knob("wait", "the replicas' --native", choices=("auto", "wait", "off"))
    kv_memory: float = knob(0.0, "the replicas' --kv-memory in GB; 0 = theirs", least=0)
    seed: int = knob(0, "seed of the arrivals and the texts", least=0)
    figure: bool = knob(False, "draw what became of the requests into results/figures/; --note draws it too")
    quick: bool = knob(False, "a first look: one kill")

    def replica_arguments(self) -> list[str]:
        found = ["--threads", str(self.threads), "--native", self.native]
        found += ["--model", self.model] if self.model else []
        return found + (["--kv-memory", str(self.kv_memory)] if self.kv_memory else [])


# ---- the kills


class Chaos:
    """Kills, waits, starts again and looks, in a thread of its own. All moments are seconds from the load's start."""

    def __init__(self, config: ReplicaKillConfig, balancer: Balancer, replicas: dict[str, Replica]) -> None:
        self.config, self.balancer, self.replicas = config, balancer, replicas
        self.start_s = 0.0
        self.began, self.over, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.kills: list[dict[str, Any]] = []
        self.error: str | None = None  # why there are no more kills
        self.thread = threading.Thread(target=self.run, name="chaos", daemon=True)

    def begin(self, running: drive.Drive) -> None:
        """Called by the load, again and again; the first call starts the clock."""
        if not self.began.is_set():
            self.start_s = running.found.start_s
            self.began.set()

    def now_s(self) -> float:
        return time.perf_counter() - self.start_s

    def run(self) -> None:
        self.began.wait()
        try:
            for i in range(self.config.kills):
                self.one(i)
        except Exception as error:  # a thread's end is heard by nobody, and what was measured until then counts
            self.error = str(error) if isinstance(error, UserError) else repr(error)
        finally:
            self.ended.set()

    def one(self, i: int) -> None:
        """The kill of one round, if its replica is back from the last one before that round is over."""
        period_s, name = self.config.period, NAMES[i % len(NAMES)]
        kill: dict[str, Any] = {
            "replica": name, "round_start": i * period_s, "round_end": (i + 1) * period_s, "killed": None, "down": None,
            "started": None, "ready": None, "up": None, "sent_again": None,
        }  # fmt: skip
        if self.over.wait(max((i + 0.5) * period_s - self.now_s(), 0)) or self.now_s() >= kill["round_end"]:
            return
        before = self.sent_again()
        kill["killed"] = self.now_s()
        self.kills.append(kill)
        self.replicas[name].kill()
        try:
            self.bring_back(name, kill)
        finally:
            after = self.sent_again()
            kill["sent_again"] = None if before is None or after is None else after - before

    def bring_back(self, name: str, kill: dict[str, Any]) -> None:
        """UserError: it does not come."""
        start_s = kill["killed"] + self.config.dead
        kill["down"] = self.moment(lambda: self.balancer.state(name) == "DOWN", start_s)
        if self.over.wait(max(start_s - self.now_s(), 0)):
            return
        kill["started"] = self.now_s()
        self.replicas[name].start()
        end_s = self.now_s() + START_S
        kill["ready"] = self.moment(self.replicas[name].ready, end_s)
        kill["up"] = self.moment(lambda: self.balancer.state(name) == "UP", end_s)
        if kill["up"] is None and not self.over.is_set():
            raise UserError(f"{name} was not back in rotation {START_S:.0f} s after its start.")

    def moment(self, condition: Callable[[], bool], end_s: float) -> float | None:
        """When it came true; None when it did not, in time or before an interruption."""
        while self.now_s() < end_s:
            with contextlib.suppress(OSError):  # HAProxy's page may be slow to come on a busy machine
                if condition():
                    return self.now_s()
            if self.over.wait(LOOK_S):
                return None
        return None

    def sent_again(self) -> int | None:
        """So far, by all replicas; None where HAProxy's page does not come."""
        with contextlib.suppress(OSError):
            return sum(int(row["wredis"] or 0) for name, row in self.balancer.table().items() if name in NAMES)
        return None

    def close(self, at_once: bool) -> None:
        """Wait for the last replica to come back, unless that is of no interest any more. Ctrl-C ends the wait, too."""
        if at_once:
            self.over.set()
        self.began.set()
        try:
            self.ended.wait()  # not join(): once interrupted, Python 3.11 takes the thread for ended
        except KeyboardInterrupt:
            self.over.set()
            self.ended.wait()


# ---- the load


def rate_of(config: ReplicaKillConfig, replica: Replica) -> float:
    """Requests/s. By default so few that one replica can take them all while the other one is away."""
    if config.rate:
        return config.rate
    decodes = json.loads(server.get(replica.url, "/capacity", {}) or b"{}").get("decode_tokens_per_s")
    if not decodes:
        raise UserError(f"{replica.name} does not say how fast it is: give --rate.")
    return config.share * decodes / config.max_new_tokens


def bodies_of(config: ReplicaKillConfig, model: str, count: int) -> list[Body]:
    """Every other one a stream: of the others no byte comes before they are done."""
    prompts = Prompts("chat", model, config.seed)
    bodies = [prompts.body(config.prompt_tokens, config.max_new_tokens) for _ in range(count)]
    for body in bodies[1::2]:
        del body["stream_options"]
        body["stream"] = False
    return bodies


def measure(
    config: ReplicaKillConfig, balancer: Balancer, replicas: dict[str, Replica], model: str, rate: float
) -> dict[str, Any]:
    """What a record holds of it. UserError: nothing was killed. KeyboardInterrupt: nothing was measured."""
    total_s = config.kills * config.period
    dues = list(takewhile(lambda due: due < total_s, arrivals.moments("poisson", rate, config.seed)))
    bodies = bodies_of(config, model, len(dues))
    client, chaos = Client(balancer.url + PATH, timeout_s=TIMEOUT_S), Chaos(config, balancer, replicas)
    if drive.closed(Client(balancer.url + PATH), bodies_of(config, model, 4), 4).interrupted:  # it warms up
        raise KeyboardInterrupt
    chaos.thread.start()
    ran = None
    try:
        ran = drive.opened(client, bodies, dues, rising=True, see=chaos.begin)
    finally:
        chaos.close(at_once=ran is None or ran.interrupted)
    if chaos.error and not chaos.kills:
        raise UserError(f"No replica was killed: {chaos.error}")
    kept = [trace for trace in ran.traces if trace.error != INTERRUPTED]  # those in flight when somebody ended it
    requests = [availability.told(trace, ran.start_s) for trace in sorted(kept, key=lambda one: one.due_s)]
    partial = chaos.over.is_set() or chaos.error is not None
    return {"requests": requests, "kills": chaos.kills, "rate": rate, "error": chaos.error, "partial": partial}


def main(argv: list[str] | None = None) -> int:
    config = ReplicaKillConfig.from_cli(__doc__, argv)
    records.check_writable(config, "replica_kill")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to end, it keeps what it has, as after Ctrl-C
    page, card = console.Page(silent=config.json == "-"), machine_card()
    page.show("# What do clients notice when one of two replicas is killed?\n\n" + card_table(card), keep=False)
    with tempfile.TemporaryDirectory() as folder, pair(config.replica_arguments(), Path(folder)) as (balancer, both):
        one = both[NAMES[0]]
        model, about = server.models(one.url, {})[0], server.about(one.url, {})["about"]["model"]
        rate = rate_of(config, one)
        page.show(f"{model} twice, {config.threads} threads each; {rate:.2f} requests/s by Poisson, prompts of about "
                  f"{config.prompt_tokens} tokens, answers of {config.max_new_tokens}, half of them streamed. "
                  f"{config.kills} rounds of {config.period:g} s.")  # fmt: skip
        found = measure(config, balancer, both, model, rate)
    record = records.new_record("replica_kill", "replica-kill", config, card) | found
    record |= {
        "model": {"name": model, "dtype": about["weights"], "device": about["device"], "origin": "serve.py",
                  "hash": about["hash"]},
        "prompt": "synthetic, each begun differently", "prompt_tokens": config.prompt_tokens,
        "batch_policy": "continuous, in each replica", "kv_cache": "on", "gpu_utilisation": "not sampled",
    }  # fmt: skip
    if not record["kills"] or not record["requests"]:
        raise KeyboardInterrupt
    record["verdicts"] = availability.sentences(record)
    figure = [availability_plots.draw(record)] if config.figure or config.note is not None else []
    return console.conclude(config, record, page, [*availability.sections(record), *figure])


if __name__ == "__main__":
    console.run(main)
