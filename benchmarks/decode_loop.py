"""Our loop gives the tokens of transformers' generate() and is not slower, interleaved in one run."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.claim import Claim, rounds
from config import PromptConfig
from lab.ceilings import Probe, gemm_rate
from lab.console import progress
from lab.verdict import interleaved, verdict
from model import Model, generate, ids_tensor, load, transformers_generate

ROUNDS = 72
NEW_TOKENS = 16


def loops(model: Model, ids: torch.Tensor) -> tuple[list[Callable[[], float]], list[list[int]]]:
    """Both loops as timed callables, and the list that their tokens are appended to."""
    outputs: list[list[int]] = []

    def timed_loop(loop: Callable[[], list[int]]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            tokens = loop()
            seconds = time.perf_counter() - start
            outputs.append(tokens)
            return seconds

        return run

    ours = timed_loop(lambda: generate(model, ids, max_new_tokens=NEW_TOKENS)[0])
    theirs = timed_loop(lambda: transformers_generate(model, ids, max_new_tokens=NEW_TOKENS)[0].tolist())
    return [ours, theirs], outputs


def claims(config: PromptConfig) -> list[Claim]:
    model, _, prompt = load(replace(config, max_new_tokens=NEW_TOKENS))
    dtype = model.place.dtype
    variants, outputs = loops(model, ids_tensor([prompt]).to(model.device))
    list(interleaved(variants, 1))  # warms both up
    _, size = gemm_rate(model.device, dtype)
    probe, seconds, anchors, count = Probe(model.device), [], [], rounds(config, ROUNDS)
    for pair in progress(interleaved(variants, count), count, "decode loop"):
        seconds.append(pair)
        anchors.append(probe.anchor(dtype, size).seconds)
    said = verdict(*zip(*seconds, strict=True), noise=0.03, anchors=anchors)
    same = all(tokens == outputs[0] for tokens in outputs)
    return [
        Claim(f"loop against generate(), {model.name}", "not SLOWER, same tokens",
              f"our time / theirs: {said}; tokens {'equal' if same else 'DIFFER: speed-up void'}",
              same and said.not_slower)
    ]  # fmt: skip
