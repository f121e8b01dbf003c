"""Day 2. What does batching buy, and who pays for it?

A decode step reads every weight, whether it serves one request or eight. So eight together cost little more than one
alone, and the machine delivers more tokens per second; but a request now waits until its batch leaves, and until the
slowest member is done. Every cell of the table is one policy (batch size, waiting window). In every round each cell
gets the same requests, by the same schedule; latency is counted from the moment a request was due, so that waiting in
the queue is part of it. Before a cell runs, a simulation predicts it from step times measured a moment before.

    python3 batch_experiment.py                               # 1, 4, 8 x 0, 10 ms: about eleven minutes on two cores
    python3 batch_experiment.py --quick                       # a first look
    python3 batch_experiment.py --arrival poisson --rate 1    # users who come one by one
    python3 batch_experiment.py --check-window                # is there a rate at which waiting pays?
    python3 batch_experiment.py --json run.jsonl              # Ctrl-C, and later the same line again: it goes on
"""

from config import LONGEST_WINDOW_MS, Config, UserError, check_packages, knob, listed

if __name__ == "__main__":
    check_packages()

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from batcher import DynamicBatcher
from lab import batch_plots, batch_tables, batch_window, batch_words, ceilings, console, records
from lab.arrivals import KINDS, schedule
from lab.batch_figures import Cell, Trial
from lab.batch_trial import Served, run_trial, seconds
from lab.card import gpu_uuid, hardware_card, machine_key
from lab.prompts import exact, lengths
from lab.request_tables import card_table, ceilings_line, model_table
from lab.sampler import Sampler, Usage
from lab.simulation import Cost, simulate
from metrics import Stats, number
from model import Model, check_fits, generate_batch, load_pair, set_threads
from tokenizer import Tokenizer

CALIBRATION_STEPS = 6
KEPT = ("trials", "calibrations", "references", "cold")  # what a run that goes on takes over
SAME_RUN = ("batch_sizes", "windows_ms", "requests", "max_new_tokens", "prompt_tokens", "prompts", "arrival", "rate",
            "attention", "threads", "seed", "check_window")  # fmt: skip


@dataclass(frozen=True)
class BatchConfig(Config):
    batch_sizes: str = knob("1,4,8", "requests in a batch at most, one cell each", metavar="N,N,…")
    windows_ms: str = knob("0,10", "how long the first request waits for others, one cell each", metavar="MS,MS,…")
    requests: int = knob(16, "requests a cell gets in each round", least=1, quick=8)
    max_new_tokens: int = knob(
        32, "new tokens of each request; end tokens are ignored, so all get them", least=2, quick=8
    )
    prompt_tokens: int = knob(16, "length of the prompts, in tokens; of the longest one where they are mixed", least=1)
    prompts: str = knob("same", "lengths of the prompts: all the same, or a quarter to all", choices=("same", "mixed"))
    arrival: str = knob("burst", "all at once, at random moments, or evenly spaced", choices=KINDS)
    rate: float = knob(1.0, "requests per second, for poisson and constant arrivals", least=0.001, most=1e6)
    rounds: int = knob(6, "how often every cell runs; six are the fewest for a verdict", least=1, quick=2)
    percentiles: str = knob("95", "percentiles of the latency to print, such as 50,95,99", metavar="P,P,…")
    check_window: bool = knob(
        False, "also run with and without the window, at half and at twice the rate up to which it cannot pay"
    )
    figure: bool = knob(False, "draw throughput, latency and timelines into results/figures/")

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.sizes) > self.requests and self.windows:  # reading the windows checks them
            raise UserError(
                f"--requests {self.requests} can never fill a batch of {max(self.sizes)}: raise --requests or lower "
                "--batch-sizes."
            )
        if max(self.shown_percentiles) >= 100:
            raise UserError("--percentiles must lie between 1 and 100.")
        if self.check_window and (self.sizes[-1] == 1 or self.windows[-1] == 0):
            raise UserError("--check-window needs a batch of more than one and a window above 0: see --help.")
        if self.figure and importlib.util.find_spec("matplotlib") is None:
            raise UserError("--figure needs matplotlib: pip install -r requirements.txt, or leave it out.")

    @property
    def sizes(self) -> list[int]:
        return sorted(listed(self.batch_sizes, "--batch-sizes"))

    @property
    def windows(self) -> list[float]:
        return sorted(listed(self.windows_ms, "--windows-ms", float, least=0, most=LONGEST_WINDOW_MS))

    @property
    def shown_percentiles(self) -> list[float]:
        return sorted(listed(self.percentiles, "--percentiles", float))

    @property
    def cells(self) -> list[Cell]:
        return [(size, window) for size in self.sizes for window in self.windows]


# ---- the sweep


class Sweep:
    """Everything that the trials of a run share."""

    def __init__(self, model: Model, tokenizer: Tokenizer, config: BatchConfig, gemm_size: int) -> None:
        self.model, self.config, self.gemm_size = model, config, gemm_size
        self.pad_id = tokenizer.pad_id
        self.served = Served(self.answer, model.net)
        self.lengths = lengths(config.prompts, config.prompt_tokens, config.requests)
        self.prompts = [exact(tokenizer.codec.encode, n, i) for i, n in enumerate(self.lengths)]
        self.longest = sorted(self.prompts, key=len, reverse=True)
        self.fit_sizes = fit_sizes(config.sizes)
        self.usage_uuid = gpu_uuid(model.device)
        self.last_look: ceilings.Anchor | None = None  # the look after a trial is also the one before the next

    def answer(self, prompts: Sequence[list[int]], stats: Stats, new_tokens: int | None = None) -> list:
        """No end tokens are given, so that all answers have the same length."""
        limit = new_tokens or self.config.max_new_tokens
        return generate_batch(self.model, prompts, max_new_tokens=limit, pad_id=self.pad_id, stats=stats)

    def dues(self, round_number: int) -> list[float]:
        """Every cell of a round gets the same schedule; every round another."""
        config = self.config
        return seconds(schedule(config.arrival, config.requests, config.rate, config.seed + round_number))

    def one_batch(self, rows: int, new_tokens: int) -> Stats:
        """The phases of one batch of the longest prompts, outside any batcher."""
        stats: Stats = {}
        self.answer(self.longest[:rows], stats, min(new_tokens, self.config.max_new_tokens))
        return stats

    def warm_up(self) -> dict[str, dict[str, float]]:
        """Every shape that will be timed runs once before. What the first time took is kept: it is a result too."""
        found = {}
        sizes = sorted({*self.config.sizes, *self.fit_sizes})
        for rows in console.progress(sizes, len(sizes), "warm-up"):
            stats = self.one_batch(rows, 3)
            found[str(rows)] = {"prefill_s": stats["prefill"][0], "step_s": stats["decode"][0]}
        return found

    def alone(self) -> list[str]:
        """The hash of every request's answer when it is computed by itself: what each cell must give too."""
        prompts = console.progress(self.prompts, len(self.prompts), "references")
        return [records.output_hash(self.served([prompt])[0]) for prompt in prompts]

    def calibrate(self) -> dict[str, Any]:
        """c(b) at this moment: one decode step and one prefill, at the sizes that are kept for fitting."""
        steps, prefills, self.last_look = {}, {}, None
        for rows in self.fit_sizes:
            stats = self.one_batch(rows, CALIBRATION_STEPS + 1)
            steps[str(rows)] = round(median(stats["decode"]), 6)
            prefills[str(rows * max(self.lengths))] = round(stats["prefill"][0], 6)
        return {"step_s": steps, "prefill_s": prefills}

    def cost(self, calibration: dict[str, Any]) -> Cost:
        points = [{int(k): s for k, s in calibration[name].items()} for name in ("step_s", "prefill_s")]
        return Cost(*points, self.config.max_new_tokens)

    def predict(self, cell: Cell, dues: Sequence[float], cost: Cost) -> dict[str, float]:
        formed = 0

        def service_s(batch: Sequence[int]) -> float:
            nonlocal formed
            formed += 1
            return cost.service_s(batch)

        done = simulate(make_batcher(cell), dues, self.lengths, service_s)
        span = max(done) - min(dues)
        mean_latency = sum(d - due for d, due in zip(done, dues, strict=True)) / len(dues)
        return {
            "tokens_per_s": len(dues) * self.config.max_new_tokens / span,
            "mean_latency_s": mean_latency,
            "batches": formed,
            "step_s": cost.step(cell[0]),
            "prefill_s": cost.prefill(cell[0] * max(self.lengths)),
        }

    def trial(self, cell: Cell, dues: list[float], probe: ceilings.Probe, cost: Cost) -> Trial:
        """One cell: predicted, then run between two looks at the machine."""
        predicted, usage = self.predict(cell, dues, cost), Usage()
        before = self.last_look or probe.anchor(self.model.place.dtype, self.gemm_size)
        with Sampler(usage, self.usage_uuid):
            trial = run_trial(DynamicBatcher, self.served, self.prompts, cell, dues)
        self.last_look = after = probe.anchor(self.model.place.dtype, self.gemm_size)
        return trial | {
            "predicted": predicted,
            "usage": usage.summary(),
            "anchor_s": (before.seconds + after.seconds) / 2,
            "bytes_per_s": max(before.bytes_per_s, after.bytes_per_s),
        }


def make_batcher(cell: Cell) -> Callable[..., DynamicBatcher]:
    """The batcher of a cell for the simulation: no thread, no log, a clock that jumps."""
    return lambda generate, clock: DynamicBatcher(
        generate, cell[0], cell[1] / 1e3, max_queue=10**9, on_batch=lambda _: None, clock=clock, start=False
    )


def fit_sizes(sizes: Sequence[int]) -> list[int]:
    """The batch sizes at which c(b) is calibrated: the ends, and the middles between neighbours.

    The sizes between the ends are kept out, so that their cells can show whether the prediction holds.
    """
    middles = {(a + b) // 2 for a, b in pairwise(sizes)}
    return sorted({1, sizes[0], sizes[-1]} | {m for m in middles if m not in sizes[1:-1]})


def measure(sweep: Sweep, record: dict[str, Any], probe: ceilings.Probe) -> None:
    """Rounds of all cells, in turning order. What is in the record already is not run again. Ctrl-C: partial."""
    config = sweep.config
    done = {(t["round"], t["batch_size"], t["window_ms"]) for t in record["trials"]}
    todo = [
        (number, cell)
        for number in range(config.rounds)
        for cell in (config.cells if number % 2 == 0 else reversed(config.cells))
        if (number, *cell) not in done
    ]
    calibrated_for = None
    with console.bar(sum(weight(config, cell) for _, cell in todo), "cells") as advance:
        for number, cell in todo:
            if calibrated_for != number:
                calibration = sweep.calibrate()
                record["calibrations"].append({"round": number} | calibration)
                calibrated_for = number
            trial = sweep.trial(cell, sweep.dues(number), probe, sweep.cost(calibration))
            record["trials"].append({"round": number, "run": record["id"]} | trial)
            advance(weight(config, cell))


def weight(config: BatchConfig, cell: Cell) -> float:
    """Roughly how long a cell takes, in units that do not matter: for the bar's time left."""
    return 1 + 2 * config.requests / cell[0]


# ---- one run


def describe(sweep: Sweep, template: str) -> dict[str, Any]:
    config, model = sweep.config, sweep.model
    mean_cached = config.prompt_tokens + config.max_new_tokens // 2
    rows = sorted({*config.sizes, *sweep.fit_sizes})
    arrival = config.arrival + ("" if config.arrival == "burst" else f", {config.rate:g} requests/s")
    return {
        "model": model.description(),
        "template": template,
        "prompt": f"{config.requests} texts of {min(sweep.lengths)} to {max(sweep.lengths)} tokens",
        "prompt_tokens": max(sweep.lengths),
        "prompt_lengths": sweep.lengths,
        "batch_policy": f"{config.batch_sizes} x {config.windows_ms} ms (size x window), {config.requests} x {arrival}",
        "kv_cache": "on (transformers DynamicCache)",
        "cells": config.cells,
        "fit_sizes": sweep.fit_sizes,
        "floors": {
            str(b): {"flops": b * model.flops(1, mean_cached), "read_bytes": model.read_bytes(b, b * mean_cached)}
            for b in rows
        },
    }


def main(argv: list[str] | None = None) -> int:
    config = BatchConfig.from_cli(__doc__, argv)
    records.check_writable(config, "batch_experiment")
    page = console.Page(silent=config.json == "-")
    set_threads(config.threads)
    model, tokenizer = load_pair(config, "raw")
    check_fits(model, config.prompt_tokens, config.max_new_tokens)
    card = hardware_card(model.device)
    ceiling = ceilings.kept(model.device, machine_key(card), config.recalibrate)
    card["Measured ceilings"] = ceilings_line(vars(ceiling))
    page.show("# Day 2: what does batching buy, and who pays?\n\n" + card_table(card), keep=False)

    sweep = Sweep(model, tokenizer, config, ceiling.gemm_size.get(model.place.dtype_name, 256))
    record = records.new_record("batch_experiment", "day2-batching", config, card)
    record |= describe(sweep, tokenizer.template) | {"ceilings": vars(ceiling), "trials": [], "calibrations": []}
    page.show(model_table(record))
    old = records.unfinished(config, record, SAME_RUN, config.rounds * len(config.cells))
    cold = sweep.warm_up()  # a run that goes on is a new process: it begins cold too
    if old:
        record |= {name: old[name] for name in (*KEPT, *(["window"] if "window" in old else []))}
        record["resumed_from"] = old["id"]
        page.show(f"Going on with [{old['id']}]: {len(old['trials'])} trials of it are not run again.", keep=False)
    else:
        record["cold"] = cold
        # A batch of one is a request alone: where the sweep has it, its first trial gives the references.
        record["references"] = None if config.sizes[0] == 1 else sweep.alone()
    failure = run(sweep, record, page)
    status = report(config, record, page)
    if failure:
        raise failure  # what was measured before it is printed and saved
    return status


def run(sweep: Sweep, record: dict[str, Any], page: console.Page) -> Exception | None:
    """All that is measured. Whatever ends it early, what was measured until then is kept."""
    probe, config = ceilings.Probe(sweep.model.device), sweep.config
    failure: Exception | None = None
    try:
        measure(sweep, record, probe)
        if config.sizes[-1] > 1 and config.windows[-1] > 0:
            if "window" not in record:
                record["window"] = batch_window.break_even(
                    make_batcher, usual_cost(sweep, record), *config.cells[-1], sweep.lengths
                )
            if config.check_window:
                check_window(sweep, record, probe, page)
    except KeyboardInterrupt:
        record["partial"] = True
    except Exception as error:
        record["partial"], failure = True, error
    if not record["trials"]:
        raise failure or KeyboardInterrupt  # nothing was measured
    return failure


def usual_cost(sweep: Sweep, record: dict[str, Any]) -> Cost:
    """The median of the rounds' calibrations."""
    kinds = {
        name: {
            point: median(c[name][point] for c in record["calibrations"]) for point in record["calibrations"][0][name]
        }
        for name in ("step_s", "prefill_s")
    }
    return sweep.cost(kinds)


def check_window(sweep: Sweep, record: dict[str, Any], probe: ceilings.Probe, page: console.Page) -> None:
    """Run the largest batch with and without the window, at half and at twice the rate below which it cannot pay."""
    config, found = sweep.config, record["window"]
    if found["cannot_pay_below"] is None:
        page.show("No rate was found up to which the window cannot pay, so there is none to check.")
        return
    rates, windows = (found["cannot_pay_below"] / 2, found["cannot_pay_below"] * 2), (0.0, config.windows[-1])
    check = found.setdefault("check", [])
    done = {(trial["round"], trial["rate"], trial["window_ms"]) for trial in check}
    todo = [
        (turn, rate, window)
        for turn in range(config.rounds)
        for rate in rates
        for window in (windows if turn % 2 == 0 else reversed(windows))
        if (turn, rate, window) not in done
    ]
    minutes = sum(config.requests / rate for _, rate, _ in todo) / 60
    page.show(
        f"Checking the window at {rates[0]:.2f} and {rates[1]:.2f} requests/s: about {minutes:.0f} minutes.", False
    )
    calibration = {"round": None}
    for turn, rate, window in console.progress(todo, len(todo), "window check"):
        if calibration["round"] != turn:
            calibration = {"round": turn} | sweep.calibrate()
        dues = seconds(schedule("poisson", config.requests, rate, config.seed + turn))
        trial = sweep.trial((config.sizes[-1], window), dues, probe, sweep.cost(calibration))
        check.append({"round": turn, "rate": rate, "run": record["id"]} | trial)


def report(config: BatchConfig, record: dict[str, Any], page: console.Page) -> int:
    percents = [trial["usage"]["gpu_percent_mean"] for trial in record["trials"]]
    used = [percent for percent in percents if percent is not None]
    record["gpu_utilisation"] = number(sum(used) / len(used), 0, unit=" %") if used else "N/A (no GPU was used)"
    record["verdicts"] = batch_words.sentences(record)
    sections = batch_tables.sections(record, config.shown_percentiles)
    if config.figure:
        try:
            sections.append(batch_plots.draw(record))
        except OSError as error:
            console.warn(f"the figures could not be written ({error}): make room and run again with --figure.")
    for warning in batch_words.warnings(record):
        console.warn(warning)
    return console.conclude(config, record, page, sections)


if __name__ == "__main__":
    console.run(main)
