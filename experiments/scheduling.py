"""How many requests at once, and how many tokens in one step?

Two knobs decide who waits for whom. max_running (vLLM: max_num_seqs): with more requests in a step, the machine
delivers more and each request's tokens come slower. max_tokens (max_num_batched_tokens): a long prompt that is computed
whole stops everybody else's answer for as long as that takes; in pieces of a budget (chunked prefill, Sarathi-Serve,
OSDI 2024) it stops them for less, and its own first token comes later.

    python3 -m experiments.scheduling              # about five minutes on two cores
    python3 -m experiments.scheduling --quick      # a first look
    python3 -m experiments.scheduling --long-prompt 2000 --budgets 32,128,512
"""

from config import Config, UserError, check_packages, knob, listed

if __name__ == "__main__":
    check_packages()

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from engine import load as engine_load
from engine.load import Loaded
from engine.settings import EngineConfig
from experiments.continuous_batching import engine_table, not_native
from experiments.ways import Load, OurEngine
from lab import console, records, scheduling_tables
from lab.card import hardware_card
from lab.prompts import exact, lengths
from lab.request_tables import card_table
from model import set_threads
from tokenizer import load_tokenizer
from weights.find import find
from weights.place import resolve


@dataclass(frozen=True)
class SchedulingConfig(Config, EngineConfig):
    budgets: str = knob("64,128,256,512", "tokens in one step at most, one cell each", metavar="N,N,…", quick="64,512")
    running: str = knob("1,2,4,8,16,32", "requests at once, one cell each", metavar="N,N,…", quick="1,8")
    chats: int = knob(8, "requests that are answered while the long prompt comes", least=1, quick=4)
    long_prompt: int = knob(768, "length of the prompt that comes in between, in tokens", least=16, quick=384)
    requests: int = knob(32, "requests of the burst in which max_running is tried", least=2, quick=8)
    max_new_tokens: int = knob(32, "new tokens of each request at most", least=4, quick=16)
    rounds: int = knob(6, "how often every cell runs; six are the fewest for a verdict", least=1, quick=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.budget_list) <= self.chats:
            raise UserError(f"--budgets must be above --chats {self.chats}: each of those needs a token per step.")

    @property
    def budget_list(self) -> list[int]:
        return sorted(listed(self.budgets, "--budgets"))

    @property
    def running_list(self) -> list[int]:
        return sorted(listed(self.running, "--running"))


def long_prompt_load(config: SchedulingConfig, loaded: Loaded, encode: Any) -> Load:
    """Chats that are being answered; in the middle of that, however long it lasts here, a long prompt: the last one."""
    chats = [exact(encode, 24, i) for i in range(config.chats)]
    answers = [config.max_new_tokens] * config.chats
    alone = OurEngine(partial(loaded.new_engine, max_running=config.chats), "chats alone")
    load = Load(chats, answers, [0.0] * config.chats)
    alone.run(load)  # warms up
    middle_s = median(min(moments) / 2 + max(moments) / 2 for moments in alone.run(load)["token_s"])
    return Load([*chats, exact(encode, config.long_prompt, 99)], [*answers, 4], [*load.dues_s, middle_s])


def burst_load(config: SchedulingConfig, encode: Any) -> Load:
    prompts = [exact(encode, size, i) for i, size in enumerate(lengths("mixed", 48, config.requests))]
    return Load(prompts, lengths("mixed", config.max_new_tokens, config.requests)[::-1], [0.0] * config.requests)


def cells(config: SchedulingConfig, loaded: Loaded, encode: Any) -> dict[str, tuple[OurEngine, Load]]:
    """Name -> the engine's settings and the load."""
    long, burst = long_prompt_load(config, loaded, encode), burst_load(config, encode)
    found = {
        f"budget {budget}": (partial(loaded.new_engine, max_tokens=budget, max_running=config.chats + 1), long)
        for budget in config.budget_list
    }
    widest = max(config.budget_list)
    room = config.long_prompt + config.chats  # for the whole prompt beside everybody's next token
    found["whole prompts"] = (
        partial(loaded.new_engine, max_tokens=max(room, widest), max_running=config.chats + 1, whole_prompts=True),
        long,
    )
    for running in config.running_list:
        make = partial(loaded.new_engine, max_running=running, max_tokens=max(widest, running))
        found[f"running {running}"] = (make, burst)
    return {name: (OurEngine(make, name), load) for name, (make, load) in found.items()}


def turns(rounds: int, names: list[str]) -> Iterator[tuple[int | None, str]]:
    """Once each to warm up, then rounds in turning order."""
    yield from ((None, name) for name in names)
    for number in range(rounds):
        yield from ((number, name) for name in (names if number % 2 == 0 else reversed(names)))


def measure(config: SchedulingConfig, record: dict[str, Any], found: dict[str, tuple[OurEngine, Load]]) -> None:
    """Ctrl-C: partial."""
    todo = list(turns(config.rounds, list(found)))
    try:
        for number, name in console.progress(todo, len(todo), "cells"):
            engine, load = found[name]
            trial = engine.run(load)
            if number is not None:
                record["trials"].append({"round": number, "way": name} | trial)
    except KeyboardInterrupt:
        record["partial"] = True
    if not record["trials"]:
        raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    config = SchedulingConfig.from_cli(__doc__, argv)
    records.check_writable(config, "scheduling")
    page = console.Page(silent=config.json == "-")
    set_threads(config.threads)
    if config.native != "off":
        console.warn(not_native(engine_load.prepare()))
    loaded, checkpoint = engine_load.load(config), find(config.model)
    tokenizer = load_tokenizer(checkpoint.folder, None, "raw")
    if loaded.about["context"] < config.long_prompt + 4:
        raise UserError(
            f"--long-prompt {config.long_prompt} does not fit {loaded.about['name']}'s context of "
            f"{loaded.about['context']}: lower it."
        )
    card = hardware_card(resolve(config).device)
    page.show("# How many requests at once, and how many tokens in one step?\n\n" + card_table(card), keep=False)
    page.show(engine_table(loaded.about))
    record = records.new_record("scheduling", "scheduling", config, card)
    found = cells(config, loaded, tokenizer.codec.encode)
    record |= {
        "model": loaded.about | {"dtype": loaded.about["weights"]}, "trials": [], "ways": list(found),
        "prompt": f"{config.chats} chats and a prompt of {config.long_prompt} tokens; a burst of {config.requests}",
        "prompt_tokens": config.long_prompt, "batch_policy": "continuous, one cell per setting", "kv_cache": "on",
        "gpu_utilisation": "not sampled",
    }  # fmt: skip
    measure(config, record, found)
    if not {trial["way"] for trial in record["trials"]} >= set(found):
        record["verdicts"] = ["Interrupted before every cell had run once: there is nothing to compare."]
        return console.conclude(config, record, page, [])
    record["verdicts"] = scheduling_tables.sentences(record)
    return console.conclude(config, record, page, scheduling_tables.sections(record))


if __name__ == "__main__":
    console.run(main)
