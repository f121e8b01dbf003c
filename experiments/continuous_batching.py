"""What does continuous batching buy over a batch that must end before the next begins?

In a static batch the short answers wait for the long ones, and whoever comes a moment late waits for all of them.
Continuous batching (Orca, OSDI 2022) decides anew before every step: who is done leaves, who waits joins. The same
requests, of mixed lengths, are served by one-by-one transformers, by Day 2's batcher, by transformers' own continuous
batching, and by this kit's engine, which is also made to wait for its batches: that row differs from the last one in
nothing else. Every way must give the same tokens.

    python3 -m experiments.continuous_batching                     # about six minutes on two cores
    python3 -m experiments.continuous_batching --quick             # a first look
    python3 -m experiments.continuous_batching --arrival poisson --rate 2
    python3 -m experiments.continuous_batching --endpoint vllm=http://127.0.0.1:8000
"""

from config import Config, UserError, check_packages, knob

if __name__ == "__main__":
    check_packages()

from dataclasses import dataclass, replace
from typing import Any

from engine import load as engine_load
from engine.native import EXACT
from engine.settings import EngineConfig
from experiments.endpoint import Endpoint
from experiments.ways import Load, OneByOne, OurEngine, StaticBatches, TransformersContinuous, Way
from lab import console, records, serving_plots, serving_tables
from lab.arrivals import KINDS, schedule
from lab.card import hardware_card
from lab.prompts import exact, lengths
from lab.request_tables import card_table
from metrics import table
from model import check_fits, load_pair, set_threads


@dataclass(frozen=True)
class ContinuousConfig(Config, EngineConfig):
    requests: int = knob(16, "requests a way gets in each round", least=2, quick=6)
    prompt_tokens: int = knob(64, "the longest prompt; the shortest has a quarter", least=4)
    max_new_tokens: int = knob(32, "the longest answer; the shortest has a quarter", least=4, quick=12)
    arrival: str = knob("burst", "all at once, at random moments, or evenly spaced", choices=KINDS)
    rate: float = knob(1.0, "requests per second, for poisson and constant arrivals", least=0.001, most=1e6)
    batch_size: int = knob(8, "of Day 2's batcher", least=1)
    window_ms: float = knob(10.0, "of Day 2's batcher", least=0)
    rounds: int = knob(6, "how often every way runs; six are the fewest for a verdict", least=1, quick=2)
    endpoint: str | None = knob(None, "a further way: a running OpenAI-compatible server", metavar="NAME=URL")
    figure: bool = knob(False, "draw a bar per request into results/figures/")


def loads(config: ContinuousConfig, encode: Any) -> list[Load]:
    """One load per round: the same requests, and where moments are drawn, other ones."""
    sizes = lengths("mixed", config.prompt_tokens, config.requests)
    prompts = [exact(encode, size, i) for i, size in enumerate(sizes)]
    answers = lengths("mixed", config.max_new_tokens, config.requests)[::-1]  # not the longest with the longest
    return [
        Load(prompts, answers, schedule(config.arrival, config.requests, config.rate, config.seed + number))
        for number in range(config.rounds)
    ]


def measure(config: ContinuousConfig, record: dict[str, Any], ways: list[Way], rounds: list[Load]) -> None:
    """Every way once per round, in turning order; before that, once to warm up. Ctrl-C: partial."""
    todo = [(None, way) for way in ways]
    todo += [(i, way) for i in range(config.rounds) for way in (ways if i % 2 == 0 else reversed(ways))]
    few = rounds[0].prompts[:4]
    warm = Load(few, [4] * len(few), [0.0] * len(few))
    try:
        for number, way in console.progress(todo, len(todo), "ways"):
            trial = way.run(warm if number is None else rounds[number])
            if number is not None:
                record["trials"].append({"round": number, "way": way.name} | trial)
    except KeyboardInterrupt:
        record["partial"] = True
    if not record["trials"]:
        raise KeyboardInterrupt


def weights_as_kept(about: dict[str, Any]) -> str:
    kept = " and ".join(f"{form} {size / 1e6:,.0f} MB" for form, size in about["kept"].items())
    return f"exactly the checkpoint's numbers, kept as {kept}" if about["weights"] == EXACT else kept


def engine_table(about: dict[str, Any]) -> str:
    """What the engine runs on, beside the card."""
    rows = [
        ("Forward pass", about["kernel"]),
        ("Weights", weights_as_kept(about)),
        (
            "Keys and values",
            f"{about['cache']}, {about['kv_bytes_per_token']:,} bytes a token, {about['kv_blocks']:,} blocks of 16 "
            f"({about['kv_blocks'] * 16 * about['kv_bytes_per_token'] / 1e9:.2f} GB at most)",
        ),
    ]
    return "### The engine\n\n" + table([("item", "left"), ("value", "left")], rows)


def main(argv: list[str] | None = None) -> int:
    config = ContinuousConfig.from_cli(__doc__, argv)
    records.check_writable(config, "continuous_batching")
    page = console.Page(silent=config.json == "-")
    set_threads(config.threads)
    model, tokenizer = load_pair(replace(config, dtype="float32" if config.dtype == "auto" else config.dtype), "raw")
    check_fits(model, config.prompt_tokens, config.max_new_tokens)
    if config.native != "off":
        console.warn(not_native(engine_load.prepare()))
    loaded = engine_load.load(config)
    size = min(config.batch_size, config.requests)
    ways: list[Way] = [
        OneByOne(model),
        StaticBatches(model, tokenizer.pad_id, size, config.window_ms),
        TransformersContinuous(model, config.max_tokens),
        OurEngine(loaded.new_engine, f"this engine, {size} at a time", static=size),
        OurEngine(loaded.new_engine),
        *endpoints(config, tokenizer.decode),
    ]
    card = hardware_card(model.device)
    page.show("# What does continuous batching buy?\n\n" + card_table(card), keep=False)
    page.show(engine_table(loaded.about))
    record = records.new_record("continuous_batching", "continuous-batching", config, card)
    arrival = config.arrival + ("" if config.arrival == "burst" else f", {config.rate:g} requests/s")
    record |= {
        "model": model.description(), "engine": loaded.about, "trials": [], "ways": [way.name for way in ways],
        "ours": "this engine", "prompt": f"{config.requests} texts of mixed lengths",
        "prompt_tokens": config.prompt_tokens, "batch_policy": f"several ways; {arrival}",
        "kv_cache": "on", "gpu_utilisation": "not sampled",
    }  # fmt: skip
    measure(config, record, ways, loads(config, tokenizer.codec.encode))
    record["ways"] = [name for name in record["ways"] if any(t["way"] == name for t in record["trials"])]
    if record["ours"] not in record["ways"]:
        record["verdicts"] = ["Interrupted before the engine had its turn: there is nothing to compare."]
        return console.conclude(config, record, page, [])
    record["verdicts"] = serving_tables.sentences(record)
    sections = serving_tables.sections(record)
    if config.figure:
        sections.append(serving_plots.draw(record))
    return console.conclude(config, record, page, sections)


def not_native(why: str | None) -> str | None:
    return why and f"the C forward pass is not available ({why}): the engine runs on PyTorch, slower."


def endpoints(config: ContinuousConfig, decode: Any) -> list[Way]:
    if config.endpoint is None:
        return []
    name, equals, url = config.endpoint.partition("=")
    if not equals or not url.startswith(("http://", "https://")):
        raise UserError(f"--endpoint takes NAME=URL, such as vllm=http://127.0.0.1:8000, not {config.endpoint!r}.")
    try:
        return [Endpoint(name, url, decode)]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"--endpoint {url} does not answer /v1/models ({error}): start it, or leave it out.") from error


if __name__ == "__main__":
    console.run(main)
