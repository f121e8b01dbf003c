"""Measure every claim of the README on this machine, one after the other, and print what was found.

make bench                                     # all of them, about six minutes on two cores
python3 -m benchmarks --only decode_loop       # one of them
python3 -m benchmarks --model random:distilgpt2
"""

from config import Settings, check_packages, knob

if __name__ == "__main__":
    check_packages()

import importlib
from dataclasses import dataclass

import torch

from benchmarks.claim import Claim, claims_table
from lab import console
from lab.card import hardware_card
from lab.request_tables import card_table

ALL = ("timer", "bandwidth", "decode_loop", "identity", "start")


@dataclass(frozen=True)
class BenchConfig(Settings):
    model: str = knob("smollm2", "the model that is measured", env="LLM_INFER_MODEL")
    only: str = knob("all", "one benchmark instead of all", choices=("all", *ALL))


def main(argv: list[str] | None = None) -> int:
    config = BenchConfig.from_cli(__doc__, argv)
    names = ALL if config.only == "all" else (config.only,)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        "# Benchmarks: what this kit claims, measured here\n\n" + card_table(hardware_card(device)) + "\n", flush=True
    )
    found: list[Claim] = []
    try:
        for name in names:
            found += importlib.import_module(f"benchmarks.{name}").claims(config.model)
    finally:
        print(claims_table(found))
    if any(claim.holds is False for claim in found):
        return 1
    return 3 if any(claim.holds is None for claim in found) else 0


if __name__ == "__main__":
    console.run(main)
