"""Does the service stay what it was, after hours of everything that strangers do to it?

A real serve.py is asked for hours at half of what it can do: chats and completions, streams and whole answers, several
keys, shared beginnings, two answers to one prompt, nonsense, visitors who leave in the middle, connections that never
ask, now and then a rush. From outside it is seen what its process holds; after every minute everybody goes home for a
moment, and then files, threads and tasks must be as they were, and the service's books must hold every request. At last
a second service is started, and the same visits are sent to both in turns: the old one must not be slower.

By default the model is next to nothing: what a soak looks for is left behind by requests and not by arithmetic, and so
some hundred times as many pass in the same hours. --model smollm2 soaks a real one.

    make soak                                     # two hours; Ctrl-C keeps what was measured
    python3 -m experiments.soak --quick           # five minutes: too short for a verdict on memory, long enough to see
    python3 -m experiments.soak --minutes 30 --model smollm2 --figure --note
"""

from config import Recorded, UserError, check_packages, knob

if __name__ == "__main__":
    check_packages("httptools", "orjson", "prometheus_client", target="serve", requirements="requirements-serve.txt")

import asyncio
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from lab import console, records, soak_judge, soak_plots, soak_tables
from lab.card import machine_card
from lab.client import Client
from lab.request_tables import card_table
from lab.wire import Wire
from load import server
from load.clock import new_loop
from load.looks import Ended, Outside, Watching, seen_at
from load.measures import spread
from load.mixed import CHAT, Lap, Visit, Visitors, became, busy
from load.start import SERVE, Started, started
from weights import tiny

TINY, CONTEXT, TINY_KV_GB, KV_GB = "tiny", 512, 0.02, 0.5
KEYS = ("sk-soak-one", "sk-soak-two", "sk-soak-three")
CLIENTS = 20  # more than there are slots: the most that it can do
TURNS_OF_POOL = 1.2  # so often all of the memory for keys and values is written before it counts
WORDS_KEPT = 12_000  # more than a tokenizer of this kind remembers (10,000, tokenizers' models/bpe)
RUSH, RUSH_S = 3.0, 5.0  # times what it can do, for so long
PAIR_S, AFTER_ALL = 30.0, 1_000_000  # a lap beside a new service, and the number of the first of them
REST_S, REST_LOOKS = 0.5, 24
PROBE = "Say what a cache is."


@dataclass(frozen=True)
class SoakConfig(Recorded):
    model: str = knob(TINY, "tiny = two random layers, made for this run; or any model that serve.py takes")
    minutes: float = knob(120.0, "how long, after what comes before it", least=0.05, quick=3.0)
    requests: int = knob(0, "end after so many requests, if that is sooner; 0 = by the clock", least=0)
    load: float = knob(0.5, "of the requests a second that were measured to be the most", least=0.01, most=0.95)
    lap: float = knob(60.0, "seconds between two moments without visitors", least=2.0, quick=15.0)
    look: float = knob(10.0, "seconds between two looks at the process", least=0.2, quick=2.0)
    rush: int = knob(10, "laps between two overloads of three times the most; 0 = none", least=0, quick=4)
    pairs: int = knob(12, "laps of half a minute each for the old and a new service, in turns", least=0, quick=2)
    probe_s: float = knob(10.0, "seconds in which it is measured what the service can do", least=1.0, quick=5.0)
    max_new_tokens: int = knob(48, "new tokens of an answer at most", least=2)
    kv_memory: float = knob(0.0, f"GB for keys and values; 0 = {TINY_KV_GB:g} for tiny, else {KV_GB:g}", least=0)
    growth: float = knob(1.0, "MiB an hour that the memory may grow by", least=0.01)
    seed: int = knob(0, "of arrivals, visitors and prompts", least=0)
    figure: bool = knob(False, "draw memory, files, tasks and latencies over time")
    quick: bool = knob(False, "a first look: five minutes")


class Soak:
    """One run against a service that has started. record: grows while it runs. keep: called after every lap."""

    def __init__(
        self, config: SoakConfig, record: dict[str, Any], service: Started, keep: Callable[[], object]
    ) -> None:
        self.config, self.record, self.url, self.keep = config, record, service.url, keep
        self.outside = Outside(service.pid, service.url)
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        self.model = (server.models(self.url, headers) or [""])[0]
        record["server"] = {"url": self.url, "model": self.model} | server.about(self.url, headers)
        self.visitors = Visitors(self.model, KEYS, config.max_new_tokens, config.seed)
        self.start_s, self.asked_before, self.doubtful = time.perf_counter(), Wire.asked, 0
        self.kinds: dict[str, Counter[str]] = {}
        self.others: Counter[str] = Counter()  # ends of visits that were sent to both services

    # ---- before it counts

    def prepare(self, runner: asyncio.Runner) -> None:
        """Fill what is meant to fill, measure what the service can do, ask the first probe.

        All memory for keys and values is written once. And tokenizers keep the words that they have split, up to a
        fixed number: 3 MiB that come one by one over tens of thousands of requests, and look like a leak until then.
        """
        self.record["looks"].append(seen_at(self.outside, self.start_s))
        pool = self.outside.kv_tokens()
        while self.outside.look().get("computed", 0) < TURNS_OF_POOL * pool:
            self.rate_of(runner, 1.0)
        talkers = self.visitors.talkers()
        while self.visitors.spoken < WORDS_KEPT:
            self.rate_of(runner, 1.0, talkers)
        most = self.rate_of(runner, self.config.probe_s)
        if not most:
            raise UserError("The service answered nobody: try `python3 serve.py` by itself, and look at its log.")
        self.visitors.usual_s = CLIENTS / most / 2
        self.record |= {"most_per_s": most, "rate_per_s": self.config.load * most, "kv_tokens": pool}
        self.record["probes"] = [runner.run(self.probe()), None]
        self.rest()

    def rate_of(self, runner: asyncio.Runner, seconds: float, visits: Iterator[Visit] | None = None) -> float:
        rate, doubtful = runner.run(busy(self.url, visits or self.visitors.stayers(), CLIENTS, seconds))
        self.doubtful += doubtful
        return rate

    async def probe(self) -> str | None:
        """What the service answers to a fixed prompt, greedily. None: it does not answer."""
        body = {"model": self.model, "messages": [{"role": "user", "content": PROBE}], "temperature": 0,
                "max_tokens": self.config.max_new_tokens, "ignore_eos": True}  # fmt: skip
        async with Client(self.url + CHAT, {"Authorization": f"Bearer {KEYS[0]}"}) as client:
            trace = await client.ask(body)
        return "".join(text for _, text in trace.content) if trace.complete else None

    # ---- what counts

    def age_s(self) -> float:
        return time.perf_counter() - self.start_s

    def run(self, runner: asyncio.Runner) -> None:
        """Lap after lap. Ctrl-C, or a signal to end, keeps all that was seen, and says that it is a part."""
        laps, end_s = self.record["laps"], time.perf_counter() + 60 * self.config.minutes
        count = max(round(60 * self.config.minutes / self.config.lap), 1)
        ready = soak_judge.warm(range(count))
        for number in console.progress(range(count), count, "laps"):
            self.lap(runner, number)
            if len(laps) == ready:
                self.record["ready_s"] = self.record["rests"][-1]["at"]
            self.keep()
            asked = sum(map(sum, (kind.values() for kind in self.kinds.values())))
            if time.perf_counter() >= end_s or 0 < self.config.requests <= asked:
                break
        self.record["probes"][1] = runner.run(self.probe()) or ""

    def lap(self, runner: asyncio.Runner, number: int) -> None:
        """One lap, and the moment of rest after it. What was interrupted is kept as far as it went."""
        lap, at = Lap(), self.age_s()
        try:
            runner.run(lap.run(self.url, self.visits(number)))
            self.doubtful += lap.doubtful
            self.rest()
        finally:
            self.digest(lap, number, at)

    def beside(self, runner: asyncio.Runner, new: "Soak") -> None:
        """The same laps for this service and for a new one, in turns: A B, B A."""
        count, seconds = self.config.pairs, min(PAIR_S, self.config.lap)
        for number in console.progress(range(count), count, "beside a new one"):
            visits = self.visitors.lap(AFTER_ALL + number, self.record["rate_per_s"], seconds)
            pair: dict[str, dict[str, Any]] = {}
            for name, url in (("old", self.url), ("new", new.url))[:: 1 if number % 2 == 0 else -1]:
                lap = Lap()
                runner.run(lap.run(url, visits))
                self.others.update(became(one, trace) for one, trace in lap.ended)
                pair[name] = latencies_of(lap)
            self.record["pairs"].append(pair)

    def visits(self, number: int) -> list[Visit]:
        every, rate = self.config.rush, self.record["rate_per_s"]
        rushes = every and number % every == 0  # the first lap too: an overload is part of the warm-up
        seconds = max(self.config.lap - REST_S - (RUSH_S if rushes else 0.0), 1.0)
        visits = self.visitors.lap(number, rate, seconds)
        if rushes:
            crowd = self.visitors.lap(number, RUSH * self.record["most_per_s"], RUSH_S, rush=True)
            visits += [replace(one, due_s=one.due_s + seconds) for one in crowd]
        return visits

    def rest(self) -> None:
        """A look while nobody is there, as soon as the service has noticed."""
        time.sleep(REST_S)
        written, rests = Wire.asked - self.asked_before, self.record["rests"]
        before = next((one for one in reversed(rests) if one["ok"]), None)
        for _ in range(REST_LOOKS):
            look = seen_at(self.outside, self.start_s) | {"written": written, "doubtful": self.doubtful}
            if look["ok"] and home(look, before):
                break
            time.sleep(REST_S / 2)
        rests.append(look)

    def digest(self, lap: Lap, number: int, at: float) -> None:
        """A lap as numbers."""
        for one, trace in lap.ended:
            kind = "rush" if one.rush else one.kind
            self.kinds.setdefault(kind, Counter())[became(one, trace)] += 1
        found = latencies_of(lap)
        if found["e2e_s"]:
            self.visitors.usual_s = found["e2e_s"]["p50"]
        anchors = [look["anchor_s"] for look in (*self.record["looks"], *self.record["rests"]) if look["at"] >= at]
        self.record["laps"].append(
            {"number": number, "at": at, **found, "anchor_s": mean(anchors) if anchors else None}
        )


def latencies_of(lap: Lap) -> dict[str, Any]:
    """Of those who asked sensibly and stayed, outside a rush."""
    stayed = [(one, trace) for one, trace in lap.ended if one.kind in ("stream", "whole") and not one.rush]
    whole = [(one, trace) for one, trace in stayed if became(one, trace) == "answered"]
    first = [trace.ttft_s for one, trace in whole if one.kind == "stream" and trace.ttft_s is not None]
    return {
        "asked": len(lap.ended), "stayed": len(stayed), "answered": len(whole),
        "ttft_s": spread(first), "e2e_s": spread([trace.e2e_s for _, trace in whole]),
    }  # fmt: skip


def home(look: dict[str, Any], before: dict[str, Any] | None) -> bool:
    """Whether everybody has gone, as far as the service knows: else it is looked at again in a moment."""
    if look["running"] or look["waiting"] or soak_judge.counted(look) < look["written"] - look["doubtful"]:
        return False
    return before is None or all(
        look[name] <= before[name] + soak_judge.SLACK for name in ("files", "threads", "tasks")
    )


def options_of(config: SoakConfig, folder: Path) -> list[str]:
    """How serve.py is started: with keys, and little memory for keys and values, so that all of it is soon in use."""
    keys = folder / "keys"
    keys.write_text("\n".join(KEYS) + "\n")
    kv = config.kv_memory or (TINY_KV_GB if config.model == TINY else KV_GB)
    options = ["--kv-memory", f"{kv:g}", "--api-keys-file", str(keys), "--native", "wait", "--log-file", os.devnull]
    if config.model != TINY:
        return ["--model", config.model, *options]
    # One thread for so little arithmetic: the other core is the event loop's, and the visitors'.
    return ["--model", str(tiny.checkpoint(folder / TINY, CONTEXT)), "--threads", "1", *options]


def soaked(
    config: SoakConfig, record: dict[str, Any], keep: Callable[[], object] = lambda: None,
    command: tuple[str, ...] = SERVE,
) -> None:  # fmt: skip
    """Start the service, and fill the record. command: what starts it, where it is not serve.py itself."""
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        options = options_of(config, Path(scratch))
        with started(options, command) as service, asyncio.Runner(loop_factory=new_loop) as runner:
            soak = Soak(config, record, service, keep)
            try:
                soak.prepare(runner)
                with Watching(soak.outside, config.look, soak.start_s, record["looks"]):
                    soak.run(runner)
                if config.pairs:
                    compare(soak, runner, options, command)
            except KeyboardInterrupt:
                record["partial"] = True
            except (Ended, OSError) as error:  # of a connection: there is nobody to connect to
                record |= {"partial": True, "ended": f"it ended after {soak.age_s():.0f} s: {error or 'no process'}"}
            record["kinds"] = {kind: dict(ends) for kind, ends in soak.kinds.items()}
            record["ends"] = dict(sum(soak.kinds.values(), soak.others))


def compare(soak: Soak, runner: asyncio.Runner, options: Sequence[str], command: Sequence[str]) -> None:
    """With a service that has just started. Where none starts there is no verdict on age, and all others stay."""
    try:
        with started(options, command) as service:
            new = Soak(soak.config, new_record(soak.config), service, lambda: None)
            new.prepare(runner)
            soak.beside(runner, new)
    except UserError as why:
        console.warn(f"there is no new service to compare with: {why}")


def new_record(config: SoakConfig) -> dict[str, Any]:
    record = records.new_record("soak", "soak", config, machine_card())
    empty = {"laps": [], "looks": [], "rests": [], "pairs": [], "probes": [None, None], "ready_s": None}
    return record | empty | {"kinds": {}, "ends": {}, "limit_bytes_per_hour": config.growth * soak_judge.MIB}


def described(record: dict[str, Any]) -> dict[str, Any]:
    """What notes.md has a line for."""
    known = record["server"]["about"].get("model") or {}
    mix = "chats and completions, streams and whole answers, 20 % who leave, 5 % nonsense"
    return {
        "model": {"name": record["server"]["model"], "dtype": known.get("weights", "?"),
                  "device": known.get("device", "?"), "origin": "serve.py", "hash": known.get("hash", "?")},
        "prompt": mix, "prompt_tokens": "16 to 340 characters", "batch_policy": "the service's",
        "kv_cache": "the service's", "gpu_utilisation": "not sampled",
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    config = SoakConfig.from_cli(__doc__, argv)
    records.check_writable(config, "soak")
    page, record = console.Page(silent=config.json == "-"), new_record(config)
    page.show(f"# Soak: {config.minutes:g} minutes on {config.model}\n\n{card_table(record['card'])}", keep=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to end, it keeps what it has, as after Ctrl-C
    with records.kept_so_far(config, record) as keep:
        soaked(config, record, keep)
        if not record["laps"]:
            raise UserError(f"Nothing was measured: {record['ended']}") if "ended" in record else KeyboardInterrupt
        found = soak_judge.judged(record)
        record |= described(record) | {"judged": [vars(one) for one in found]}
        record["verdicts"] = [f"{one.what}: {one.word} ({one.limit}): {one.measured}." for one in found]
        sections = [*soak_tables.sections(record), soak_tables.judged_table(found)]
        if config.figure:
            sections.append(soak_plots.draw(record))
        record["printed"] = "\n\n".join(sections)  # what may be quoted of it, as it was shown
        status = console.conclude(config, record, page, sections)
    failed = any(one.holds is False for one in found)
    return 1 if "ended" in record else status or int(failed)


if __name__ == "__main__":
    console.run(main)
