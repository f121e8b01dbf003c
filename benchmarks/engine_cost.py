"""What the engine costs around the model: a step's bookkeeping, the time to the first token, and memory."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from types import SimpleNamespace
from typing import Any

from benchmarks.claim import Claim
from config import ROOT, PromptConfig
from engine import load as engine_load
from engine.load import Loaded
from engine.native import NativeTransformer
from engine.request import Sampling
from engine.settings import EngineConfig
from lab.prompts import exact
from lab.verdict import interleaved, verdict
from tokenizer import Codec, load_tokenizer
from weights.find import find

ENGINE = """
import json, sys, time
from engine.load import load
from engine.settings import EngineConfig
from engine.request import Sampling
from lab.kv_probes import status_bytes
engine = load(EngineConfig(model=sys.argv[1])).engine
answer = engine.submit(list(range(10, 138)), Sampling(max_new_tokens=64, ignore_eos=True))
next(iter(answer))
first = time.time() - float(sys.argv[2])
answer.result()
print(json.dumps([first, status_bytes("VmHWM")]))
"""
TRANSFORMERS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from lab.kv_probes import status_bytes
net = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True).eval()
net.generate(torch.arange(10, 138)[None], max_new_tokens=1, do_sample=False)
first = time.time() - float(sys.argv[2])
net.generate(torch.arange(10, 138)[None], max_new_tokens=64, do_sample=False)
print(json.dumps([first, status_bytes("VmHWM")]))
"""


def claims(config: PromptConfig) -> list[Claim]:
    engine_load.prepare()
    loaded = engine_load.load(EngineConfig(model=config.model, kv_memory=1.0, threads=config.threads))
    codec = load_tokenizer(find(config.model).folder, None, "raw").codec
    return [*overhead_claims(loaded, codec), *start_claims(config)]


def outside_s(loaded: Loaded, codec: Codec, rows: int, queued: int = 0) -> float:
    """Median seconds of a decode step of so many rows that are not spent in the network's arithmetic."""
    engine, inside = loaded.new_engine(max_running=rows, max_tokens=max(rows, 512)), []
    engine.decode = codec.decode
    network = engine.runner.network
    with arithmetic_timed(network, inside):
        for i in range(rows + queued):
            engine.submit(exact(codec.encode, 16, i), Sampling(max_new_tokens=40, ignore_eos=True))
        whole = []
        while len(whole) < 36:
            start = time.perf_counter()
            engine.step()
            whole.append(time.perf_counter() - start)
    return median(step - part for step, part in zip(whole[4:], inside[4:], strict=True))


@contextlib.contextmanager
def arithmetic_timed(network: Any, seconds: list[float]) -> Iterator[None]:
    """Note what each forward pass takes: in C the call alone, not what Python prepares for it."""
    native = isinstance(network, NativeTransformer)
    real, home = (network.c.forward, network.c) if native else (network.forward, network)

    def watched(*arguments: Any) -> Any:
        start = time.perf_counter()
        found = real(*arguments)
        seconds.append(time.perf_counter() - start)
        return found

    if native:
        network.c = SimpleNamespace(scratch_floats=home.scratch_floats, forward=watched)
    else:
        network.forward = watched
    try:
        yield
    finally:
        if native:
            network.c = home
        else:
            del network.forward  # the method itself again


def overhead_claims(loaded: Loaded, codec: Codec) -> list[Claim]:
    outside_s(loaded, codec, 2)
    eight, sixteen, queue = (outside_s(loaded, codec, *sizes) for sizes in ((8, 0), (16, 0), (8, 1000)))
    return [
        Claim(
            "a step outside the model, 8 requests",
            "≤ 0.3 ms",
            f"{eight * 1e3:.3f} ms: planning, laying out, sampling, delivery",
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
    """Processes started in turn, ours and one that imports transformers; files warm."""
    folder, count = str(find(config.model).folder), 2 if config.quick else 6
    variants = [lambda: started(ENGINE, config.model), lambda: started(TRANSFORMERS, folder)]
    list(interleaved(variants, 1))
    ours, theirs = zip(*interleaved(variants, count), strict=True)
    said = verdict([run[0] for run in ours], [run[0] for run in theirs])
    first, peak = median(run[0] for run in ours), max(run[1] for run in ours)
    return [
        Claim(
            "process start to first token, prompt of 128",
            "≤ 0.78 × transformers (2.5 s of 3.2 s)",
            f"{first:.2f} s ({min(r[0] for r in ours):.2f} to {max(r[0] for r in ours):.2f}); transformers "
            f"{median(run[0] for run in theirs):.2f} s: {said}",
            None if said.high is None else True if said.high <= 0.78 else False if said.low > 0.78 else None,
        ),
        Claim(
            "peak memory of that process after 64 tokens",
            "≤ 0.9 GB",
            f"{peak / 1e9:.2f} GB; transformers float32 {max(run[1] for run in theirs) / 1e9:.2f} GB",
            peak <= 0.9e9,
        ),
    ]


def started(program: str, model: str) -> tuple[float, int]:
    """(seconds from the start of a process to its first token, its greatest memory in bytes)."""
    done = subprocess.run(
        [sys.executable, "-c", program, model, repr(time.time())], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return tuple(json.loads(done.stdout))
