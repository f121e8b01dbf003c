"""Measure every claim of the README on this machine, one after the other, and print what was found.

make bench                                     # all of them, about an hour on two cores
python3 -m benchmarks --only decode_loop       # one of them
python3 -m benchmarks --model random:distilgpt2
"""

from config import PromptConfig, check_packages, knob

if __name__ == "__main__":
    check_packages()

import importlib
from dataclasses import asdict, dataclass

from benchmarks.claim import Claim, claims_table
from lab import console, records
from lab.card import hardware_card
from lab.request_tables import card_table
from model import load

ALL = (
    "timer",
    "bandwidth",
    "decode_loop",
    "identity",
    "start",
    "batcher_cost",
    "batched_decode",
    "prediction",
    "kv_growth",
    "same_step",
    "engine_identity",
    "engine_speed",
    "engine_cost",
    "engine_peers",
    "serve_cost",
    "serve_overload",
    "serve_interpreter",
    "serve_faults",
    "serve_prediction",
    "serve_speed",
    "load_client",
    "load_agreement",
)


@dataclass(frozen=True)
class BenchConfig(PromptConfig):
    model: str | None = knob("smollm2", "the model that is measured", env="LLM_INFER_MODEL")
    only: str = knob("all", "one benchmark instead of all", choices=("all", *ALL))


def main(argv: list[str] | None = None) -> int:
    config = BenchConfig.from_cli(__doc__, argv)
    records.check_writable(config, "benchmarks")
    model, _, prompt = load(config)
    card, page = hardware_card(model.device), console.Page(silent=config.json == "-")
    record = records.new_record("benchmarks", "claims", config, card)
    record |= {"model": model.description(), "prompt": config.prompt, "prompt_tokens": len(prompt),
               "batch_policy": "as each claim says", "kv_cache": "on", "gpu_utilisation": "not sampled"}  # fmt: skip
    del model
    page.show("# Benchmarks: what this kit claims, measured here\n\n" + card_table(card), keep=False)
    found: list[Claim] = []
    try:
        for name in ALL if config.only == "all" else (config.only,):
            found += importlib.import_module(f"benchmarks.{name}").claims(config)
    except KeyboardInterrupt:
        record["partial"] = True
    return finish(config, record, found, page)


def finish(config: BenchConfig, record: dict, found: list[Claim], page: console.Page) -> int:
    """Save, print, and tell by the exit status whether the claims hold."""
    record |= {
        "claims": [asdict(claim) for claim in found],
        "verdicts": [f"{claim.what}: {claim.word}" for claim in found],
    }
    status = console.conclude(config, record, page, [claims_table(found)])
    answers = {claim.holds for claim in found if not claim.skipped}
    return status or (1 if False in answers else 3 if None in answers else 0)


if __name__ == "__main__":
    console.run(main)
