"""Day 1. Where does the time of one LLM request go: prefill or decode?

A request is tokenised, moved to the device, and read by the network in one pass (prefill), which yields the first new
token. Every further token is one more pass with that token alone (decode). Then the ids come back and become text.
Each stage is timed, every sample is kept, the parts must add up to the whole, and each phase is compared with the least
time that this machine's measured memory bandwidth and matrix rate allow.

    make run                              # or, in an environment with requirements.txt installed:
    python3 infer.py                      # the default prompt, about a minute
    python3 infer.py --quick              # a first look
    python3 infer.py --breakdown          # which part of the network takes the time
    python3 infer.py --note "what I saw"  # and append the record to notes.md
"""

import time

STARTED = time.perf_counter()  # the cold-start ledger counts the imports below

from config import PromptConfig, UserError, check_packages, knob

if __name__ == "__main__":
    check_packages()

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab import breakdown_report, ceilings, console, records, request_tables, request_words
from lab.card import gpu_uuid, hardware_card, machine_key
from lab.request_figures import Run, run_ceilings
from lab.sampler import Sampler, Usage, process_age_s
from metrics import Stats, number, timed, timer_cost_s
from model import (
    Model,
    check_fits,
    decode_step,
    ids_tensor,
    kv_cache_bytes,
    load_model,
    prefill,
    resolve,
    set_threads,
)
from tokenizer import Tokenizer, load_tokenizer
from weights.find import find

IMPORTED = time.perf_counter()


@dataclass(frozen=True)
class InferConfig(PromptConfig):
    runs: int = knob(6, "timed runs; six are the fewest that give an interval", least=1, quick=3)
    warmup: int = knob(1, "runs between the cold one and the timed ones", least=0)
    breakdown: bool = knob(False, "also time every part of the network")
    trace: str | None = knob(
        None, "write the operators' timeline to this file, for https://ui.perfetto.dev", metavar="FILE"
    )


@dataclass
class Answer:
    ids: list[int]
    text: str
    cache: Any


def one_request(model: Model, tokenizer: Tokenizer, text: str, config: InferConfig, stats: Stats) -> Answer:
    """One greedy request, every stage timed. This is the whole of inference; all else here is bookkeeping."""
    stops = model.stops(config.ignore_eos)
    with timed("total", stats):
        with timed("ttft", stats):
            with timed("tokenize", stats):
                prompt = ids_tensor([tokenizer.encode(text)])  # (1, T)
            with timed("to_device", stats):
                prompt = prompt.to(model.device)
            with timed("prefill", stats):
                token, cache = prefill(model, prompt)  # (1, 1), and keys and values of T tokens
        new = [token]
        while len(new) < config.max_new_tokens and not (stops and token.item() in stops):
            with timed("decode", stats):
                token, cache = decode_step(model, token, cache)
            new.append(token)
        with timed("to_host", stats):
            ids = torch.cat(new, dim=1)[0].tolist()
        with timed("detokenize", stats):
            answer = tokenizer.decode(ids)
    return Answer(ids, answer, cache)


def as_run(stats: Stats) -> Run:
    """One request's stats: a number per stage, and the list of decode steps."""
    return {name: values[0] for name, values in stats.items()} | {"decode": stats.get("decode", [])}


def measure(model: Model, tokenizer: Tokenizer, config: InferConfig, gemm_size: int) -> dict[str, Any]:
    """The cold request, the warm-ups, then the timed runs, each between two readings of the machine's ceilings.

    Ctrl-C ends it early: what was measured so far is returned and marked partial.
    """
    usage, uuid = Usage(), gpu_uuid(model.device)
    found: dict[str, Any] = {"runs": [], "run_ceilings": [], "partial": False, "same_tokens": True}

    def request() -> tuple[Run, Answer]:
        stats: Stats = {}
        answer = one_request(model, tokenizer, config.prompt, config, stats)
        return as_run(stats), answer

    found["cold"], answer = request()
    found["text"], found["ids"], found["kv_held_bytes"] = answer.text, answer.ids, kv_cache_bytes(answer.cache)
    # Read before the bandwidth probe takes its own memory.
    found["vram_peak_bytes"] = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    try:
        for _ in range(config.warmup):
            request()
        probe = ceilings.Probe(model.device)
        usage.probe_bytes = probe.data.nbytes if model.device.type == "cpu" else 0
        before = probe.anchor(model.place.dtype, gemm_size)
        for _ in console.progress(range(config.runs), config.runs, "timed runs"):
            with Sampler(usage, uuid):
                run, answer = request()
            after = probe.anchor(model.place.dtype, gemm_size)
            found["runs"].append(run)
            found["run_ceilings"].append(
                [max(before.bytes_per_s, after.bytes_per_s), max(before.flops_per_s, after.flops_per_s)]
            )
            found["same_tokens"] &= answer.ids == found["ids"]
            before = after
    except KeyboardInterrupt:
        found["partial"] = True
    found["usage"] = usage.summary()
    return found


def work_of(model: Model, prompt_tokens: int, new_tokens: int) -> dict[str, dict[str, int]]:
    """FLOPs and bytes of the prefill, and of the mean decode step: they grow linearly with the tokens in the cache."""
    mean_cached = prompt_tokens + max(new_tokens - 2, 0) // 2
    return {
        phase: {"tokens": new, "flops": model.flops(new, cached), "read_bytes": model.read_bytes(new, cached)}
        for phase, new, cached in (("prefill", prompt_tokens, 0), ("decode", 1, mean_cached))
    }


def describe(model: Model, tokenizer: Tokenizer, config: InferConfig, prompt_tokens: int) -> dict[str, Any]:
    """What ran: the model, the prompt, and the work that each phase must do."""
    return {
        "model": model.description(),
        "tokenizer": tokenizer.name,
        "template": tokenizer.template,
        "prompt": config.prompt,
        "prompt_tokens": prompt_tokens,
        "batch_policy": "one request at a time",
        "kv_cache": "on (transformers DynamicCache)",
        "floors": work_of(model, prompt_tokens, config.max_new_tokens),
    }


def memory_of(model: Model, prompt_tokens: int, found: dict[str, Any]) -> dict[str, Any]:
    kv_tokens = prompt_tokens + len(found["ids"]) - 1  # the last new token is never read, so it has no entry
    return {
        "weight_bytes": model.weight_bytes(),
        "kv_bytes_per_token": model.kv_bytes_per_token(),
        "kv_tokens": kv_tokens,
        "kv_predicted_bytes": kv_tokens * model.kv_bytes_per_token(),
        "kv_held_bytes": found.pop("kv_held_bytes"),
        "vram_peak_bytes": found.pop("vram_peak_bytes"),
    }


def main(argv: list[str] | None = None) -> int:
    age_at_main, in_main = process_age_s(), time.perf_counter()
    config = InferConfig.from_cli(__doc__, argv)
    records.check_writable(config, "infer", *([(Path(config.trace), "another --trace FILE")] if config.trace else []))
    page = console.Page(silent=config.json == "-")
    ledger: Stats = {}
    with timed("find the weights", ledger):
        checkpoint = find(config.model)
    with timed("card and ceilings", ledger):
        place = resolve(config)
        set_threads(config.threads)
        card = hardware_card(place.device)
        ceiling = ceilings.kept(place.device, machine_key(card), config.recalibrate)
    card["Measured ceilings"] = request_tables.ceilings_line(vars(ceiling))
    page.show("# Day 1: where does the time of one request go?\n\n" + request_tables.card_table(card), keep=False)

    with timed("load_model", ledger):
        model = load_model(checkpoint, config, place)
    with timed("load_tokenizer", ledger):
        tokenizer = load_tokenizer(checkpoint.folder, model.vocabulary if model.timing_only else None, config.template)
    prompt_tokens = len(tokenizer.encode(config.prompt))
    check_fits(model, prompt_tokens, config.max_new_tokens)
    record = records.new_record("infer", "day1-one-request", config, card) | describe(
        model, tokenizer, config, prompt_tokens
    )
    record |= {
        "ceilings": vars(ceiling),
        "load": {name: ledger[name][0] for name in ("load_tokenizer", "load_model")},
    }
    page.show(request_tables.model_table(record))
    page.show(request_tables.theory_table(record))

    before_first = time.perf_counter() - in_main - sum(seconds for samples in ledger.values() for seconds in samples)
    record |= measure(model, tokenizer, config, ceiling.gemm_size.get(model.place.dtype_name, 256))
    record["floors"] = work_of(model, prompt_tokens, len(record["ids"]))  # an end token may have come early
    record["stopped"] = record["ids"][-1] in model.stops(config.ignore_eos)
    record["timer_cost_s"] = timer_cost_s()
    record["memory"] = memory_of(model, prompt_tokens, record)
    percent = record["usage"]["gpu_percent_mean"]
    record["gpu_utilisation"] = number(percent, 0, unit=" %") if percent is not None else "N/A (no GPU was used)"
    record["output_hash"] = records.output_hash(record["ids"])
    record["ledger"] = [
        ("Python starts", age_at_main - (in_main - STARTED)),
        ("imports (torch, transformers, …)", IMPORTED - STARTED),
        *[(name, samples[0]) for name, samples in ledger.items()],
        ("arguments, checks, printing", in_main - IMPORTED + before_first),
        ("first tokenize … first prefill (cold TTFT)", record["cold"]["ttft"]),
        *([("first decode step", record["cold"]["decode"][0])] if record["cold"]["decode"] else []),
    ]
    record["verdicts"] = request_words.sentences(record)
    if (config.breakdown or config.trace) and not record["partial"]:
        add_breakdown(model, tokenizer, config, record)
    return report(config, record, page)


def add_breakdown(model: Model, tokenizer: Tokenizer, config: InferConfig, record: dict[str, Any]) -> None:
    ids = ids_tensor([tokenizer.encode(config.prompt)]).to(model.device)
    try:
        record["breakdown"] = breakdown_report.measure(
            model.net, ids, partial(prefill, model), partial(decode_step, model), config.max_new_tokens, config.trace
        )
        said = breakdown_report.sentence(record["breakdown"], run_ceilings(record)[0])
        record["verdicts"] += [said] if said else []
    except KeyboardInterrupt:  # the runs are measured: they are kept
        record["partial"] = True
    except UserError as error:
        console.warn(str(error))


def report(config: InferConfig, record: dict[str, Any], page: console.Page) -> int:
    shown = request_tables.quoted(record["text"], 2000)
    noise = "(not shown: the weights are random, the text is noise)"
    sections = [
        f"### Answer\n\n{noise if record['model']['timing_only'] else shown}\n\n{len(record['ids'])} new tokens"
        f"{' (the model ended its answer here)' if record['stopped'] else ''}, greedy, output hash "
        f"{record['output_hash']}",
        request_tables.stats_table(record),
        request_tables.latency_lines(record),
        request_tables.ledger_table(record),
        request_tables.memory_table(record),
        *([breakdown_report.tables(record["breakdown"])] if "breakdown" in record else []),
    ]
    for warning in request_words.warnings(record):
        console.warn(warning)
    return console.conclude(config, record, page, sections)


if __name__ == "__main__":
    console.run(main)
