"""Where does the time of one of the engine's steps go, and what would theory allow?

A step of few tokens reads every weight and does little with it: memory is its wall. A step of many tokens multiplies
each weight many times: arithmetic is. native.c reads its clock after each phase, when all threads have met; bytes and
FLOPs of each phase are counted from the shapes, and set against what this machine was measured to read and multiply.

    python3 -m experiments.step_anatomy                        # a minute
    python3 -m experiments.step_anatomy --rows 1,8 --context 1000
"""

from config import Config, UserError, check_packages, knob, listed

if __name__ == "__main__":
    check_packages()

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from engine import load as engine_load
from engine.kv_blocks import BLOCK
from engine.load import Loaded
from engine.native import PHASES, NativeTransformer
from engine.settings import EngineConfig
from engine.shape import Shape
from engine.step import Part, Step
from experiments.continuous_batching import engine_table
from lab import ceilings, console, records
from lab.card import hardware_card
from lab.request_tables import card_table
from metrics import ms, number, table
from model import set_threads


@dataclass(frozen=True)
class AnatomyConfig(Config, EngineConfig):
    rows: str = knob("1,8,16,32", "sequences that decode together, one table each", metavar="N,N,…")
    prompts: str = knob("128,1024", "prompts that are computed whole, one table each", metavar="N,N,…")
    context: int = knob(256, "tokens that each decoding sequence has before", least=1)
    runs: int = knob(15, "steps of each kind; the median counts", least=3, quick=5)


def decode_step(rows: int, context: int) -> Step:
    per = -(-(context + 1) // BLOCK)
    parts = [Part(i, 1, context + 1, list(range(i * per, (i + 1) * per))) for i in range(rows)]
    return Step([10 + i for i in range(rows)], parts, list(range(rows)))


def prompt_step(tokens: int) -> Step:
    return Step([10 + i % 1000 for i in range(tokens)], [Part(0, tokens, tokens, list(range(-(-tokens // BLOCK))))],
                [tokens - 1])  # fmt: skip


def work(shape: Shape, step: Step, weight_bytes: Mapping[str, int], kv_bytes: int) -> dict[str, tuple[float, float]]:
    """Phase -> (FLOPs, bytes read at the least): weights once, and each part's keys and values once.

    weight_bytes: by phase, all layers together. kv_bytes: of one number in the cache.
    """
    rows, wanted, hidden, inner = len(step.tokens), len(step.wanted), shape.hidden, shape.inner
    width = shape.heads * shape.head_dim
    matrices = {
        "q, k, v": hidden * (width + 2 * shape.kv_heads * shape.head_dim),
        "out": width * hidden,
        "up": hidden * inner * (2 if shape.gated else 1),
        "down": inner * hidden,
    }
    last = {"out", "up", "down"}  # the last layer computes these for wanted rows only
    found = {}
    for name, numbers in matrices.items():
        times = rows * (shape.layers - 1) + (wanted if name in last else rows)
        found[name] = (2 * numbers * times, weight_bytes[name])
    looks = sum(position + 1 for part in step.parts for position in part.positions)
    cached = sum(part.length for part in step.parts)
    found["attention"] = (4 * shape.layers * width * looks, cached * shape.kv_numbers_per_token() * kv_bytes)
    found["head"] = (2 * hidden * shape.vocabulary * wanted, weight_bytes["head"])
    return found


def measure(network: NativeTransformer, step: Step, runs: int) -> dict[str, list[float]]:
    network.anatomy(step)  # warms up: memory of this size is taken once
    taken = [network.anatomy(step) for _ in range(runs)]
    return {phase: [one[phase] for one in taken] for phase in PHASES}


def step_table(title: str, found: dict[str, Any]) -> str:
    whole = median(map(sum, zip(*found["seconds"].values(), strict=True)))
    rows = []
    for phase, samples in found["seconds"].items():
        seconds = median(samples)
        flops, read = found["work"].get(phase, (None, None))
        least = None if flops is None else max(flops / found["flops_per_s"], read / found["bytes_per_s"])
        rows.append(
            (
                phase, ms(seconds, 2), f"{seconds / whole:.0%}".replace("%", " %"),
                number(flops and flops / seconds, 0, 1e-9), number(read and read / seconds, 1, 1e-9), ms(least, 2),
                number(least and seconds / least, 1, unit=" ×"),
            )
        )  # fmt: skip
    flops, read = (sum(one[i] for one in found["work"].values()) for i in (0, 1))
    least = max(flops / found["flops_per_s"], read / found["bytes_per_s"])
    rows.append(
        ("step", ms(whole, 2), "100 %", number(flops / whole, 0, 1e-9), number(read / whole, 1, 1e-9), ms(least, 2),
         number(whole / least, 1, unit=" ×"))
    )  # fmt: skip
    columns = [("phase", "left"), *((name, "right") for name in ("ms", "share", "GFLOP/s", "GB/s", "at least ms",
                                                                  "taken"))]  # fmt: skip
    return f"### {title}\n\n" + table(columns, rows)


def steps(config: AnatomyConfig, loaded: Loaded) -> dict[str, Step]:
    decoding, prompts = listed(config.rows, "--rows"), listed(config.prompts, "--prompts")
    made = {f"{n} sequences decode at {config.context} tokens": decode_step(n, config.context) for n in decoding}
    made |= {f"A prompt of {n} tokens": prompt_step(n) for n in prompts}
    blocks = max(max(part.blocks) + 1 for step in made.values() for part in step.parts)
    if blocks > loaded.about["kv_blocks"]:
        raise UserError(f"{blocks} blocks are more than the {loaded.about['kv_blocks']} there are: raise --kv-memory.")
    longest = max(part.length for step in made.values() for part in step.parts)
    if longest > loaded.about["context"]:
        raise UserError(f"{longest} tokens exceed the model's context of {loaded.about['context']}: ask for fewer.")
    return made


def measured(config: AnatomyConfig, network: NativeTransformer, step: Step, probe: ceilings.Probe) -> dict[str, Any]:
    """One step's seconds by phase, its work, and the machine's rates beside it."""
    rate, _ = ceilings.gemm_rate(torch.device("cpu"), torch.float32)
    return {
        "seconds": measure(network, step, config.runs),
        "work": work(network.shape, step, network.bytes_by_phase(), network.keys.itemsize),
        "flops_per_s": rate, "bytes_per_s": probe.bytes_per_s(9),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    config = AnatomyConfig.from_cli(__doc__, argv)
    records.check_writable(config, "step_anatomy")
    page = console.Page(silent=config.json == "-")
    set_threads(config.threads)
    why = engine_load.prepare() if config.native != "off" else "--native off"
    loaded = engine_load.load(config)
    network, planned = loaded.engine.runner.network, steps(config, loaded)
    if not isinstance(network, NativeTransformer):
        raise UserError(f"Only the C forward pass tells its phases, and it does not run here ({why}).")
    card = hardware_card(torch.device("cpu"))
    page.show("# Where does a step's time go?\n\n" + card_table(card), keep=False)
    page.show(engine_table(loaded.about))
    record = records.new_record("step_anatomy", "step-anatomy", config, card)
    probe, sections, said = ceilings.Probe(torch.device("cpu")), [], []
    record |= {
        "model": loaded.about | {"dtype": loaded.about["weights"]}, "steps": {}, "prompt": "made of token numbers",
        "prompt_tokens": config.context, "max_new_tokens": 0, "batch_policy": "one step each", "kv_cache": "on",
        "gpu_utilisation": "N/A",
    }  # fmt: skip
    record["config"]["max_new_tokens"] = 1
    for title, step in console.progress(planned.items(), len(planned), "steps"):
        try:
            record["steps"][title] = found = measured(config, network, step, probe)
        except KeyboardInterrupt:
            record["partial"] = True
            break
        sections.append(step_table(title, found))
        said.append(sentence(title, found))
    if not said:
        raise KeyboardInterrupt
    record["verdicts"] = said
    return console.conclude(config, record, page, sections)


def sentence(title: str, found: dict[str, Any]) -> str:
    whole = median(map(sum, zip(*found["seconds"].values(), strict=True)))
    flops, read = (sum(one[i] for one in found["work"].values()) for i in (0, 1))
    compute, memory = flops / found["flops_per_s"], read / found["bytes_per_s"]
    wall, least = ("arithmetic", compute) if compute > memory else ("memory", memory)
    worst = max(found["seconds"], key=lambda phase: median(found["seconds"][phase]))
    return (
        f"{title}: {ms(whole)} ms, {whole / least:.1f} times what its wall ({wall}) allows; the largest part is "
        f"{worst} ({median(found['seconds'][worst]) / whole:.0%})."
    )


if __name__ == "__main__":
    console.run(main)
