"""How much does an OpenAI-compatible server serve, and how long does each request wait? Any server: this one, others.

A closed loop keeps so many clients busy; an open loop sends by a schedule, and so sees the queue that real users would
stand in. Every request's stamps are kept; figures come from a steady window; each run checks itself by Little's law, by
counting tokens twice, and by looking at its own CPU time. What this client can do at most is measured, not assumed.

    make bench-serve                              # starts the service, the standard matrix, the report: ten minutes
    python3 load_test.py --start --quick          # a first look at the service of this kit
    python3 load_test.py --url http://127.0.0.1:8000 --concurrency 1,4,16
    python3 load_test.py --rate 2,4 --arrival poisson --slo ttft_p95=1.0,tpot_p95=0.1
    python3 load_test.py --find-slo ttft_p95=1.0,tpot_p95=0.1      # the largest rate that keeps to it
    python3 load_test.py --selfcheck              # against servers whose delays are known
"""

from config import Recorded, UserError, check_packages, knob, listed

if __name__ == "__main__":
    check_packages("httptools", "orjson", "prometheus_client", target="serve", requirements="requirements-serve.txt")

import contextlib
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from lab import arrivals, console, records
from lab.card import machine_card
from lab.request_tables import card_table
from lab.verdict import t_half_width
from load import ceiling, measure, plan, selfcheck, server, tables, words
from load.plan import Cell
from load.prompts import Prompts, SharedPrefix
from load.start import started

CONCURRENCY, QUICK_CONCURRENCY = "1,4,16", "1,4"
MOST_STEPS = 6  # halvings of a search, and doublings before them
MOST_ROUNDS = 30  # of --until
MOST_REQUESTS = 1_000_000  # of one run: all their stamps are kept
WAVES = 4  # a sweep sends so many requests for every client, at the least


@dataclass(frozen=True)
class LoadConfig(Recorded):
    url: str = knob("http://127.0.0.1:8000", "the server, without /v1")
    start: bool = knob(False, "start `serve.py` for this run, on a free port, and stop it afterwards")
    model: str | None = knob(None, "the model's name at the server, by default its first; with --start, what it serves")
    api_key: str | None = knob(None, "sent as Authorization: Bearer KEY", env="LLM_INFER_API_KEY", secret=True)
    endpoint: str = knob("completions", "which of OpenAI's endpoints is asked", choices=("completions", "chat"))
    concurrency: str = knob(CONCURRENCY, "closed loops: clients at once", metavar="N,N", quick=QUICK_CONCURRENCY)
    rate: str | None = knob(None, "open loops instead: requests per second", metavar="X,X")
    arrival: str = knob("poisson", "of an open loop: poisson, constant, burst, or gamma:CV")
    ramp: str | None = knob(None, "an open loop whose rate rises: from 1 to 8/s in 60 s is 1:8:60", metavar="X:X:S")
    replay_file: str | None = knob(None, "send at the times and lengths of this file (at, prompt_tokens, new_tokens)")
    prompt_tokens: str = knob("128", "prompt lengths", metavar="N,N")
    max_new_tokens: str = knob("32", "answer lengths", metavar="N,N")
    shared_prefix: float = knob(0.0, "the share of every prompt that is the same in all", least=0)
    turns: int = knob(1, "requests of a conversation, each with all that was said before", least=1)
    prompts_file: str | None = knob(None, "ask these instead, one a line: text, or JSON with prompt or messages")
    tokenizer: str | None = knob(None, "a folder with tokenizer.json: prompts of exactly that many of its tokens")
    eos: bool = knob(False, "let answers end where the model ends them: lengths will differ")
    requests: int = knob(48, "of each run", least=1, quick=16)
    seconds: float = knob(0.0, "end each run after that long instead", least=0)
    until: str | None = knob(None, "repeat until tokens/s is known that well, such as 5%", metavar="SHARE%")
    rounds: int = knob(1, "how often every load is run, in turning order; three or more allow verdicts", least=1)
    selfcheck: bool = knob(False, "measure servers whose delays are known, and what this client can do at most")
    slo: str | None = knob(None, "limits for goodput, such as ttft_p95=1.0,tpot_p95=0.1 (seconds)", metavar="LIMITS")
    find_slo: str | None = knob(None, "search the largest rate that keeps these limits", metavar="LIMITS")
    sweep: bool = knob(False, "1, 2, 4, … clients, until more of them bring no more tokens")
    formulas: str | None = knob(
        None, "the same stamps in the formulas of another tool too", choices=("vllm", "guidellm"), flag="--as"
    )
    timeout: float = knob(300.0, "seconds that an answer may take", least=0.1)
    retries: int = knob(0, "send refused and failed requests again, as OpenAI's clients do, that often", least=0)
    seed: int = knob(0, "of arrivals and prompts", least=0)
    quick: bool = knob(False, "a first look: fewer clients and requests")

    def __post_init__(self) -> None:
        super().__post_init__()
        for limits in (self.slo, self.find_slo):
            if limits:
                plan.limits(limits)
        if self.until:
            plan.precision_of(self.until)
        arrivals.parse_arrival(self.arrival)
        ways = {"--rate": self.rate, "--ramp": self.ramp, "--replay-file": self.replay_file, "--sweep": self.sweep,
                "--find-slo": self.find_slo}  # fmt: skip
        chosen = [name for name, value in ways.items() if value]
        if (
            chosen
            and chosen[0] in ("--rate", "--ramp", "--replay-file")
            and self.concurrency not in (CONCURRENCY, QUICK_CONCURRENCY)
        ):
            chosen.insert(0, "--concurrency")
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} are different loads: give one of them.")
        if self.turns > 1 and chosen and chosen != ["--sweep"]:
            raise UserError(f"A conversation waits for its answers, and {chosen[0]} does not: give one of them.")
        if self.sweep or self.find_slo:
            several = {"--prompt-tokens": self.prompt_tokens, "--max-new-tokens": self.max_new_tokens}
            many = [name for name, value in several.items() if "," in value]
            many += [name for name, value in (("--rounds", self.rounds > 1), ("--until", self.until)) if value]
            if many:
                raise UserError(f"{chosen[0]} looks at one kind of request, once: give {many[0]} one value.")
        if self.arrival == "burst" and self.seconds:
            raise UserError("A burst sends all at once, and never ends by the clock: give --requests, not --seconds.")
        if self.turns > 1 and self.shared_prefix:
            raise UserError("--turns and --shared-prefix are different ways to repeat a prefix: give one of them.")
        if self.prompts_file and self.tokenizer:
            raise UserError("--prompts-file and --tokenizer exclude each other: give one of them.")


def main(argv: list[str] | None = None) -> int:
    config = LoadConfig.from_cli(__doc__, argv)
    with contextlib.suppress(ValueError, OSError):  # every request in flight is an open file
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if config.selfcheck:
        return self_check()
    records.check_writable(config, "load_test")
    cells = cells_of(config)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to end, it keeps what it has, as after Ctrl-C
    with served(config) as url:
        return measured(config, url, cells)


def measured(config: LoadConfig, url: str, cells: list[Cell]) -> int:
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    model = model_of(config, server.models(url, headers))
    about = server.about(url, headers)
    prompts = Prompts(
        config.endpoint, model, config.seed, tokenizer=config.tokenizer, file=config.prompts_file, eos=config.eos
    )
    card, page = machine_card(), console.Page(silent=config.json == "-")
    page.show(f"# Load on {model} at {url}\n\n{card_table(card)}", keep=False)
    target = measure.Target(
        url, f"/v1/{'chat/completions' if config.endpoint == 'chat' else 'completions'}", headers,
        bodies_of(config, prompts),
        config.timeout, config.retries, config.seed, config.seconds or None, limits_of(config.slo),
        prompts.counted.count if prompts.counted else None,
    )  # fmt: skip
    record = records.new_record("load_test", f"load-on-{model}", config, card)
    record |= {"kind": "load", "server": {"url": url, "model": model} | about, "runs": [],
               "prompt_set_hash": prompts.hash} | described(config, model, about)  # fmt: skip
    with records.kept_so_far(config, record) as keep:
        try:
            for run in runs_of(config, target, cells):
                record["runs"].append(run)
                keep()
                if run["ended"] == "interrupted":
                    record["partial"] = True
                    break
        except KeyboardInterrupt:
            record["partial"] = True
        if not record["runs"]:
            raise KeyboardInterrupt
        record["client_ceiling"] = ceiling.known()
        record["verdicts"] = words.sentences(record)
        sections = [tables.throughput_table(record["runs"]), tables.latency_table(record["runs"]),
                    tables.laws_table(record["runs"])]  # fmt: skip
        if config.formulas:
            sections.append(tables.others_table(record["runs"], config.formulas))
        record["printed"] = "\n\n".join(sections)  # what may be quoted of it, as it was shown
        status = console.conclude(config, record, page, sections)
    if not any(one["ok"] for run in record["runs"] for one in run["requests"]):
        console.warn("no request was answered: look at the errors above, and at the server.")
        return status or 1
    return status


def model_of(config: LoadConfig, names: list[str] | None) -> str:
    """The name to ask for. names: what the server offers; None where it does not say. UserError."""
    if names is None and not config.model:
        raise UserError(f"{config.url} does not list its models: name one with --model.")
    model = config.model if names is None or (config.model and not config.start) else names[0]
    if names is not None and model not in names:
        raise UserError(
            f"{config.url} has no model {model!r}, only {', '.join(map(repr, names))}: name one of them with --model."
        )
    return model


def self_check() -> int:
    """Both loops against golden servers, then the ceiling. Status 1 when a figure is off."""
    rows = []
    for name, measured_by in (("closed", selfcheck.closed), ("open", selfcheck.opened)):
        found = selfcheck.check(measured_by)
        print(f"### {name} loop, against servers whose delays are known\n\n{selfcheck.checks_table(found)}\n")
        rows += found
    most = ceiling.measure()
    print(f"{selfcheck.sentence(rows)}\n{words.ceiling_sentence(most)}")
    return 0 if all(row.holds for row in rows) else 1


# ---- what is run


def bodies_of(config: LoadConfig, prompts: Prompts) -> Callable[[Any, int], list]:
    """Where the requests of a shape come from."""
    if config.turns > 1:
        return lambda shape, count: prompts.conversations(count, config.turns, shape.prompt_tokens, shape.new_tokens)
    if config.shared_prefix:
        made: dict[int, SharedPrefix] = {}

        def shared(shape: Any, count: int) -> list:
            length = shape.prompt_tokens
            made[length] = made.get(length) or prompts.shared_prefix(length, config.shared_prefix)
            return made[length].of(shape, count)

        return shared
    return prompts.of


def cells_of(config: LoadConfig) -> list[Cell]:
    if config.replay_file:
        recorded = tuple(arrivals.replay(config.replay_file))
        few_enough(len(recorded))
        return [Cell(None, None, None, None, None, len(recorded), recorded=recorded)]
    prompts = listed(config.prompt_tokens, "--prompt-tokens", least=1)
    news = listed(config.max_new_tokens, "--max-new-tokens", least=1)
    if config.ramp:
        ramp = plan.ramp_of(config.ramp)
        few_enough((ramp[0] + ramp[1]) / 2 * ramp[2])
        count = len(arrivals.ramp(*ramp, config.seed, kind=config.arrival))
        return [Cell(None, None, config.arrival, *shape, count, ramp) for shape in product(prompts, news)]
    if config.rate:
        rates = listed(config.rate, "--rate", float, least=1e-3)
        few_enough(max(rates) * config.seconds)
        loads = [(None, rate, config.arrival) for rate in rates]
    else:
        loads = [(clients, None, None) for clients in listed(config.concurrency, "--concurrency")]
    few_enough(config.requests)
    cells = [Cell(*load, prompt, new, config.requests) for prompt, new, load in product(prompts, news, loads)]
    most = max((cell.clients or 0 for cell in cells), default=0)
    if most > config.requests and not config.seconds and not config.sweep:
        raise UserError(
            f"{config.requests} requests never keep {most} clients busy: give --requests of {WAVES * most} or more."
        )
    return cells


def few_enough(requests: float) -> None:
    if not requests <= MOST_REQUESTS:
        raise UserError(
            f"That would be {requests:,.0f} requests in one run, and all their stamps are kept: ask for less than "
            f"{MOST_REQUESTS:,}."
        )


def runs_of(config: LoadConfig, target: measure.Target, cells: list[Cell]) -> Iterator[dict[str, Any]]:
    if config.find_slo:
        yield from search(target, cells[0], plan.limits(config.find_slo), config.arrival)
    elif config.sweep:
        yield from sweep(target, cells[0])
    else:
        for cell in cells:
            measure.warm_up(target, cell)
        yield from rounds(config, target, cells)


def rounds(config: LoadConfig, target: measure.Target, cells: list[Cell]) -> Iterator[dict[str, Any]]:
    """So many rounds as were asked, or as it takes until tokens/s is known well enough in every cell."""
    share = plan.precision_of(config.until) if config.until else None
    logs: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for number in range(MOST_ROUNDS if share else config.rounds):
        for cell in cells if number % 2 == 0 else reversed(cells):  # A B C, C B A: what drifts hits all alike
            yield (run := measure.run(target, cell))
            logs[cell].append(math.log(run["figures"]["output_tokens_per_s"] or math.nan))
        if share and number >= 2 and all(t_half_width(some) <= share for some in logs.values()):
            return


def sweep(target: measure.Target, first: Cell) -> Iterator[dict[str, Any]]:
    """Twice as many clients each time, until that brings less than a twentieth more tokens."""
    clients, best = 1, 0.0
    while True:
        cell = replace(first.closed(clients), requests=max(first.requests, WAVES * clients))
        measure.warm_up(target, cell)
        yield (run := measure.run(target, cell))
        rate = run["figures"]["output_tokens_per_s"] or 0.0
        if rate < 1.05 * best or run["ended"]:
            return
        clients, best = 2 * clients, max(best, rate)


def search(
    target: measure.Target, first: Cell, limits: list[tuple[str, int, float]], arrival: str
) -> Iterator[dict[str, Any]]:
    """Doubles a rate until it misses the limits, then halves the space between the two.

    The first is what 16 clients reach, who wait for their answers. Where more and more are in flight nothing is kept: a
    longer run would miss the limits.
    """
    most = replace(first.closed(16), requests=max(first.requests, WAVES * 16))
    measure.warm_up(target, most)
    yield (run := measure.run(target, most))
    rate, kept, missed = run["figures"]["requests_per_s"] or 1.0, 0.0, math.inf
    for _ in range(2 * MOST_STEPS):
        run = measure.run(target, first.open(rate, arrival))
        grows = run["window"]["class"] == "growing"
        run["keeps"] = plan.keeps(run["figures"], limits) and not grows and not run["ended"]
        yield run
        if run["ended"] == "interrupted":
            return
        kept, missed = (rate, missed) if run["keeps"] else (kept, rate)
        rate = 2 * kept if missed == math.inf else (kept + missed) / 2
        if missed - kept < missed / 2**MOST_STEPS:
            return


def limits_of(text: str | None) -> dict[str, float] | None:
    return {what: most for what, _, most in plan.limits(text)} if text else None


def described(config: LoadConfig, model: str, about: dict[str, Any]) -> dict[str, Any]:
    """What notes.md has a line for."""
    known = about["about"].get("model") or {}
    return {
        "model": {"name": model, "dtype": known.get("weights", "?"), "device": known.get("device", "?"),
                  "origin": about["kind"], "hash": known.get("hash", "?")},
        "prompt": config.prompts_file or "synthetic, each begun differently", "prompt_tokens": config.prompt_tokens,
        "batch_policy": "the server's", "kv_cache": "the server's",
        "gpu_utilisation": "N/A (asked of the server only)",
    }  # fmt: skip


# ---- a server of our own


@contextlib.contextmanager
def served(config: LoadConfig) -> Iterator[str]:
    """The address to ask: the one given, or that of a serve.py which ends with this run."""
    if not config.start:
        yield config.url.rstrip("/")
        return
    options = ["--log-file", os.devnull, *(["--model", config.model] if config.model else [])]
    with started(options) as service:
        yield service.url


if __name__ == "__main__":
    console.run(main)
