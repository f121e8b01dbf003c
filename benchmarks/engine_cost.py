"""What the engine costs around the model: a step's bookkeeping, the time to the first token, and memory."""

import json
import subprocess
import sys
import time
from statistics import median

from benchmarks.claim import Claim
from config import ROOT, PromptConfig
from engine import load as engine_load
from engine.load import EngineConfig, Loaded
from engine.request import Sampling
from lab.prompts import exact
from tokenizer import Codec, load_tokenizer
from weights.find import find

START = """
import json, sys, time
from lab.kv_probes import status_bytes
start = float(sys.argv[2])
from engine.load import EngineConfig, load
from engine.request import Sampling
engine = load(EngineConfig(model=sys.argv[1], dtype=sys.argv[3])).engine
answer = engine.submit(list(range(10, 138)), Sampling(max_new_tokens=64, ignore_eos=True))
next(iter(answer))
first = time.time() - start
answer.result()
print(json.dumps([first, status_bytes("VmHWM")]))
"""


def claims(config: PromptConfig) -> list[Claim]:
    engine_load.prepare()
    loaded = engine_load.load(EngineConfig(model=config.model, kv_memory=1.0, threads=config.threads))
    codec = load_tokenizer(find(config.model).folder, None, "raw").codec
    return [*overhead_claims(loaded, codec), *start_claims(config)]


def outside_s(loaded: Loaded, codec: Codec, rows: int, queued: int = 0) -> float:
    """Median seconds of a decode step of so many rows that are not spent in the network's forward pass."""
    engine, inside = loaded.new_engine(max_running=rows, max_tokens=max(rows, 512)), []
    engine.decode = codec.decode
    network = engine.runner.network
    forward = network.forward

    def watched(step):
        start = time.perf_counter()
        logits = forward(step)
        inside.append(time.perf_counter() - start)
        return logits

    network.forward = watched
    try:
        for i in range(rows + queued):
            engine.submit(exact(codec.encode, 16, i), Sampling(max_new_tokens=40, ignore_eos=True))
        whole = []
        while len(whole) < 36:
            start = time.perf_counter()
            engine.step()
            whole.append(time.perf_counter() - start)
    finally:
        del network.forward  # the method itself again
    return median(step - part for step, part in zip(whole[4:], inside[4:], strict=True))


def overhead_claims(loaded: Loaded, codec: Codec) -> list[Claim]:
    outside_s(loaded, codec, 2)
    eight, sixteen, queue = (outside_s(loaded, codec, *sizes) for sizes in ((8, 0), (16, 0), (8, 1000)))
    return [
        Claim(
            "a step outside the model, 8 requests",
            "≤ 0.3 ms",
            f"{eight * 1e3:.3f} ms: planning, sampling, text, delivery",
            eight <= 0.3e-3,
        ),
        Claim(
            "the same with 16 requests",
            "≤ 2 × of 8",
            f"{sixteen * 1e3:.3f} ms: ×{sixteen / eight:.2f}",
            sixteen <= 2 * eight,
        ),
        Claim(
            "the same with 1,000 more in the queue",
            "≤ 0.3 ms",
            f"{queue * 1e3:.3f} ms",
            queue <= 0.3e-3,
        ),
    ]


def start_claims(config: PromptConfig) -> list[Claim]:
    found = []
    for form, dtype in (("identical text", "auto"), ("half precision", "float16")):
        runs = [started(config.model, dtype) for _ in range(2 if config.quick else 5)]
        first, peak = median(run[0] for run in runs), median(run[1] for run in runs)
        found.append(
            Claim(
                f"process start to first token, {form}",
                "≤ 2.5 s",
                f"{first:.2f} s ({min(r[0] for r in runs):.2f} to {max(r[0] for r in runs):.2f}), prompt of 128",
                first <= 2.5,
            )
        )
        if form == "half precision":
            found.append(Claim(f"peak memory, {form}", "≤ 0.9 GB", f"{peak / 1e9:.2f} GB", peak <= 0.9e9))
    return found


def started(model: str, dtype: str) -> tuple[float, int]:
    """(seconds from the start of a process to its first token, its greatest memory in bytes)."""
    done = subprocess.run(
        [sys.executable, "-c", START, model, repr(time.time()), dtype],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(json.loads(done.stdout))
