"""Day 3. What does the KV cache save, what does it cost, and by which law?

To choose the next token, attention looks at the keys and values of every token before it. With a cache they are kept,
and a step reads one token. Without one they are computed again, all of them, at every step. Both ways must give the
same tokens; only time and memory may differ. Every cell of the table is one prompt length and one kind of cache.

    python3 kv_experiment.py                              # prompts of 10, 50, 200, 800: about nine minutes on two cores
    python3 kv_experiment.py --quick                      # 10, 50, 200, once
    python3 kv_experiment.py --cache dynamic,static       # a cache that grows by copying, and one of fixed size
    python3 kv_experiment.py --json run.jsonl             # Ctrl-C, and later the same line again: it goes on
"""

from config import Config, UserError, check_packages, knob, listed

if __name__ == "__main__":
    check_packages()

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from functools import partial
from statistics import median
from typing import Any

import torch

from lab import ceilings, console, kv_ledger, kv_plots, kv_probes, kv_tables, kv_words, records
from lab.card import gpu_uuid, hardware_card, machine_key
from lab.kv_figures import Cell, Trial
from lab.prompts import exact
from lab.request_tables import card_table, ceilings_line, model_table
from lab.sampler import Sampler, Usage
from metrics import Stats, number, timed
from model import (
    Model,
    check_fits,
    decode_step,
    ids_tensor,
    kv_cache_bytes,
    load_pair,
    prefill,
    recompute,
    set_threads,
    static_cache,
)
from tokenizer import Tokenizer
from weights.random_init import SHAPES

KINDS, ATTENTIONS = ("off", "dynamic", "static"), ("sdpa", "eager")
SAME_RUN = ("prompt_lens", "new_tokens", "cache", "attention", "threads", "seed")
KEPT = ("trials", "cold", "took")


@dataclass(frozen=True)
class KvConfig(Config):
    prompt_lens: str = knob(
        "10,50,200,800", "prompt lengths in tokens, one row each", metavar="N,N,…", quick="10,50,200"
    )
    new_tokens: int = knob(50, "new tokens of each run; end tokens are ignored, so all get them", least=3)
    cache: str = knob("off,dynamic", "kinds of cache: off, dynamic (grows), static (fixed size)", metavar="KIND,…")
    attention: str = knob("sdpa", "attention kernels: sdpa (fused), eager (plain matrix products)", metavar="KIND,…")
    rounds: int = knob(
        3, "how often every cell runs; with fewer than six only large differences count", least=1, quick=1
    )
    figure: bool = knob(False, "draw step time and memory by context into results/figures/")

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, given, known in (("--cache", self.kinds, KINDS), ("--attention", self.attentions, ATTENTIONS)):
            wrong = [word for word in given if word not in known]
            if wrong:
                raise UserError(f"{flag} takes {', '.join(known)} with commas between them, not {wrong[0]!r}.")
        if self.figure and importlib.util.find_spec("matplotlib") is None:
            raise UserError("--figure needs matplotlib: pip install -r requirements.txt, or leave it out.")

    @property
    def lengths(self) -> list[int]:
        return sorted(listed(self.prompt_lens, "--prompt-lens"))

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(word.strip() for word in self.cache.split(",")))

    @property
    def attentions(self) -> list[str]:
        return list(dict.fromkeys(word.strip() for word in self.attention.split(",")))

    @property
    def max_new_tokens(self) -> int:
        return self.new_tokens

    @property
    def cells(self) -> list[Cell]:
        return [Cell(n, kind, attention) for n in self.lengths for attention in self.attentions for kind in self.kinds]


# ---- one run


@once
def default_pair() -> tuple[Model, Tokenizer]:
    return load_pair(Config(), "raw")


def run_experiment(
    prompt_len: int,
    use_kv_cache: bool,
    *,
    model: Model | None = None,
    prompt: Sequence[int] | None = None,
    new_tokens: int = 50,
    static_tokens: int | None = None,
) -> dict[str, Any]:
    """Generate new_tokens after a prompt of exactly prompt_len tokens, with or without a cache, every step timed.

    model, prompt: the default model and a standard text, or both given (prompt: token ids). static_tokens: a cache of
    fixed size, taken for so many tokens before the clock starts, instead of one that grows.
    Seconds and bytes: total_s, prefill_s, decode_s (a list), kv_bytes (held at the end), peak_bytes (the most memory
    held during the run, weights included; None where the system does not tell), tokens, prompt_len, use_kv_cache.
    UserError when it cannot run.
    """
    if prompt_len < 1 or new_tokens < 1:
        raise UserError(f"A prompt of {prompt_len} and {new_tokens} new tokens cannot be run: both must be at least 1.")
    if model is None:
        model, tokenizer = default_pair()
        prompt = prompt or exact(tokenizer.codec.encode, prompt_len)
    if prompt is None or len(prompt) != prompt_len:
        given = "none is given" if prompt is None else f"the given one has {len(prompt)}"
        raise UserError(f"A prompt of {prompt_len} tokens is asked for, and {given}: pass its ids as prompt.")
    check_fits(model, prompt_len, new_tokens)
    if static_tokens is not None and (not use_kv_cache or static_tokens < prompt_len + new_tokens):
        raise UserError("static_tokens needs use_kv_cache, and room for the prompt and all new tokens.")
    ids, stats = ids_tensor([list(prompt)]).to(model.device), {}
    run = with_cache if use_kv_cache else without_cache
    room = None if static_tokens is None else static_cache(model, static_tokens)
    with kv_probes.Peak(model.device) as peak, timed("total", stats):
        tokens, held = run(model, ids, new_tokens, stats, room)
    return {
        "prompt_len": prompt_len,
        "use_kv_cache": use_kv_cache,
        "total_s": stats["total"][0],
        "prefill_s": stats["prefill"][0],
        "decode_s": stats.get("decode", []),
        "kv_bytes": 0 if held is None else kv_cache_bytes(held),
        "peak_bytes": peak.whole,
        "tokens": torch.cat(tokens, dim=1)[0].tolist(),
    }


def with_cache(model: Model, ids: torch.Tensor, new_tokens: int, stats: Stats, room: Any) -> tuple[list, Any]:
    """One prefill, then one token a step: the rest lies in the cache."""
    with timed("prefill", stats):
        token, cache = prefill(model, ids, cache=room)
    tokens = [token]
    while len(tokens) < new_tokens:
        with timed("decode", stats):
            token, cache = decode_step(model, token, cache)
        tokens.append(token)
    return tokens, cache


def without_cache(model: Model, ids: torch.Tensor, new_tokens: int, stats: Stats, _room: Any) -> tuple[list, None]:
    """Every step reads the prompt and all new tokens again."""
    with timed("prefill", stats):
        token = recompute(model, ids)
    tokens = [token]
    while len(tokens) < new_tokens:
        with timed("decode", stats):
            token = recompute(model, torch.cat([ids, *tokens], dim=1))
        tokens.append(token)
    return tokens, None


# ---- the matrix


class Matrix:
    """Everything that the trials of a run share."""

    def __init__(self, model: Model, tokenizer: Tokenizer, config: KvConfig, gemm_size: int) -> None:
        self.model, self.config, self.gemm_size = model, config, gemm_size
        self.probe = ceilings.Probe(model.device)  # before the refusals: it holds memory too
        self.uuid = gpu_uuid(model.device)
        self.skipped = {cell: why for cell in config.cells if (why := self.refusal(cell))}
        self.cells = [cell for cell in config.cells if cell not in self.skipped]
        self.lengths = sorted({cell.prompt_len for cell in self.cells})
        self.prompts = {n: exact(tokenizer.codec.encode, n) for n in self.lengths}

    def refusal(self, cell: Cell) -> str:
        """Why a cell cannot run here, in a few words; empty when it can."""
        tokens, context = cell.prompt_len + self.config.new_tokens, self.model.context
        if context is not None and tokens > context:
            return f"skipped: {tokens} tokens exceed the context of {context}"
        needed, free = kv_ledger.needed_bytes(self.model, cell, tokens), kv_probes.free_bytes(self.model.device)
        if needed > 0.8 * free:
            return f"skipped: needs about {needed / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free"
        return ""

    def run(self, cell: Cell, new_tokens: int | None = None) -> dict[str, Any]:
        if self.config.attentions != [self.model.attention]:
            self.model.net.set_attn_implementation(cell.attention)
        return run_experiment(
            cell.prompt_len,
            cell.cache != "off",
            model=self.model,
            prompt=self.prompts[cell.prompt_len],
            new_tokens=new_tokens or self.config.new_tokens,
            static_tokens=cell.prompt_len + self.config.new_tokens if cell.cache == "static" else None,
        )

    def warm_up(self) -> tuple[dict[str, float], dict[str, int | None]]:
        """Every shape once, outside the timer: (its first prefill in seconds, the memory it took) for each cell.

        Without a cache every step is a new shape: of those the first and the last context are warmed.
        """
        first = self.cells[0]  # twice, because the process itself takes memory at its first pass
        cold, took = {first.name: self.run(first, new_tokens=3)["prefill_s"]}, {}
        for cell in console.progress(self.cells, len(self.cells), "warm-up"):
            kv_probes.trim()
            with kv_probes.Peak(self.model.device) as peak:  # around run_experiment()'s own, which sets the mark back
                cold.setdefault(cell.name, self.run(cell, new_tokens=3)["prefill_s"])
                if cell.cache == "off":
                    last = torch.tensor([self.prompts[cell.prompt_len] + [0] * (self.config.new_tokens - 1)])
                    recompute(self.model, last.to(self.model.device))
            took[cell.name] = peak.above
        return cold, took

    def trial(self, cell: Cell) -> Trial:
        """One run between two looks at the machine."""
        usage = Usage()
        before = self.probe.anchor(self.model.place.dtype, self.gemm_size)
        with Sampler(usage, self.uuid):
            found = self.run(cell)
        after = self.probe.anchor(self.model.place.dtype, self.gemm_size)
        return found | {
            "cache": cell.cache,
            "attention": cell.attention,
            "decode_s": [round(seconds, 6) for seconds in found["decode_s"]],
            "tokens": records.output_hash(found["tokens"]),
            "gpu_percent_mean": usage.summary()["gpu_percent_mean"],
            "anchor_s": (before.seconds + after.seconds) / 2,
            "bytes_per_s": max(before.bytes_per_s, after.bytes_per_s),
            "flops_per_s": max(before.flops_per_s, after.flops_per_s),
        }


def measure(matrix: Matrix, record: dict[str, Any]) -> None:
    """Rounds of all cells, in turning order. What is in the record already is not run again."""
    config = matrix.config
    done = {(t["round"], Cell.of(t)) for t in record["trials"]}
    todo = [
        (turn, cell)
        for turn in range(config.rounds)
        for cell in (matrix.cells if turn % 2 == 0 else reversed(matrix.cells))
        if (turn, cell) not in done
    ]
    with console.bar(sum(weight(config, cell) for _, cell in todo), "cells") as advance:
        for turn, cell in todo:
            record["trials"].append({"round": turn, "run": record["id"]} | matrix.trial(cell))
            advance(weight(config, cell))


def weight(config: KvConfig, cell: Cell) -> float:
    """Roughly how long a cell takes, for the bar's time left: without a cache a step reads the whole context."""
    return config.new_tokens * (30 + (cell.prompt_len if cell.cache == "off" else 0))


def probes(matrix: Matrix, record: dict[str, Any]) -> None:
    """The small tables of the ledger: memory as it really grows, reserving against blocks, attention's share."""
    model, config = matrix.model, matrix.config
    model.net.set_attn_implementation(config.attentions[0])
    read, step = partial(prefill, model), partial(decode_step, model)
    rows = {n: ids_tensor([matrix.prompts[n]]).to(model.device) for n in matrix.lengths}
    record["growth"] = kv_probes.growth(read, rows[matrix.lengths[-1]], kv_cache_bytes, model.device)
    record["reserved"] = kv_probes.reserved(model, matrix.lengths, config.new_tokens)
    record["shares"] = [
        kv_probes.attention_share(model.device, read, step, ids, room=(model.context or n + config.new_tokens) - n)
        for n, ids in console.progress(list(rows.items()), len(rows), "attention")
    ]


def describe(matrix: Matrix, template: str) -> dict[str, Any]:
    config, model = matrix.config, matrix.model
    return {
        "model": model.description(),
        "template": template,
        "prompt": f"the longest of {', '.join(map(str, matrix.lengths))} tokens",
        "prompt_tokens": matrix.lengths[-1],
        "batch_policy": "one request at a time",
        "kv_cache": config.cache,
        "cells": [cell.as_list() for cell in config.cells],
        "skipped": {cell.name: why for cell, why in matrix.skipped.items()},
        "floors": kv_ledger.floors(model, matrix.cells, config.new_tokens),
        "ledger": kv_ledger.ledger(model, kv_probes.free_bytes(model.device), SHAPES),
    }


def main(argv: list[str] | None = None) -> int:
    config = KvConfig.from_cli(__doc__, argv)
    records.check_writable(config, "kv_experiment")
    page = console.Page(silent=config.json == "-")
    set_threads(config.threads)
    model, tokenizer = load_pair(replace(config, attention=config.attentions[0]), "raw")
    card = hardware_card(model.device)
    ceiling = ceilings.kept(model.device, machine_key(card), config.recalibrate)
    card["Measured ceilings"] = ceilings_line(vars(ceiling))
    page.show("# Day 3: what does the KV cache save, and what does it cost?\n\n" + card_table(card), keep=False)

    matrix = Matrix(model, tokenizer, config, ceiling.gemm_size.get(model.place.dtype_name, 256))
    if not matrix.cells:
        raise UserError(f"No prompt length fits: {next(iter(matrix.skipped.values()))}. Lower --prompt-lens.")
    record = records.new_record("kv_experiment", "day3-kv-cache", config, card)
    record |= describe(matrix, tokenizer.template) | {"ceilings": vars(ceiling), "trials": []}
    record["config"]["max_new_tokens"] = config.new_tokens
    page.show(model_table(record))
    old = records.unfinished(config, record, SAME_RUN, config.rounds * len(matrix.cells))
    record["cold"], record["took"] = matrix.warm_up()  # a run that goes on is a new process: it begins cold too
    if old:
        record |= {name: old[name] for name in KEPT} | {"resumed_from": old["id"]}
        page.show(f"Going on with [{old['id']}]: {len(old['trials'])} trials of it are not run again.", keep=False)
    failure = run(matrix, record)
    status = report(config, record, page)
    if failure:
        raise failure  # what was measured before it is printed and saved
    return status


def run(matrix: Matrix, record: dict[str, Any]) -> Exception | None:
    """All that is measured. Whatever ends it early, what was measured until then is kept."""
    failure: Exception | None = None
    try:
        measure(matrix, record)
        probes(matrix, record)  # last: if one of them fails, the trials are kept
    except KeyboardInterrupt:
        record["partial"] = True
    except Exception as error:
        record["partial"], failure = True, error
    if not record["trials"]:
        raise failure or KeyboardInterrupt  # nothing was measured
    return failure


def report(config: KvConfig, record: dict[str, Any], page: console.Page) -> int:
    used = [trial["gpu_percent_mean"] for trial in record["trials"] if trial["gpu_percent_mean"] is not None]
    record["gpu_utilisation"] = number(median(used), 0, unit=" %") if used else "N/A (no GPU was used)"
    record["verdicts"] = kv_words.sentences(record)
    sections = kv_tables.sections(record)
    if config.figure:
        try:
            sections.append(kv_plots.draw(record))
        except OSError as error:
            console.warn(f"the figures could not be written ({error}): make room and run again with --figure.")
    for warning in kv_words.warnings(record):
        console.warn(warning)
    return console.conclude(config, record, page, sections)


if __name__ == "__main__":
    console.run(main)
