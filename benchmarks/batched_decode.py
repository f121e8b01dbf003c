"""A batch of 8 decodes at least four times the tokens per second of one request, and our loop is not slower in it."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median

import torch

from benchmarks.claim import Claim, rounds
from config import PromptConfig
from lab.ceilings import Probe, gemm_rate
from lab.console import progress
from lab.prompts import exact, lengths
from lab.verdict import interleaved, verdict
from metrics import Stats
from model import Model, generate, ids_tensor, load, transformers_generate
from tokenizer import left_pad

ROWS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 16
SPEED_ROUNDS, LOOP_ROUNDS, TEAM_ROUNDS = 12, 36, 12

Padded = tuple[torch.Tensor, torch.Tensor]


def claims(config: PromptConfig) -> list[Claim]:
    model, tokenizer, _ = load(replace(config, max_new_tokens=NEW_TOKENS))
    mixed = [exact(tokenizer.codec.encode, n, i) for i, n in enumerate(lengths("mixed", PROMPT_TOKENS, ROWS))]
    padded = tuple(ids_tensor(rows).to(model.device) for rows in left_pad(mixed, tokenizer.pad_id))
    alone = ids_tensor([exact(tokenizer.codec.encode, PROMPT_TOKENS)]).to(model.device)
    return [
        speed_claim(config, model, padded, alone),
        loop_claim(config, model, padded, tokenizer.pad_id),
        *([team_claim(config, model, padded)] if model.device.type == "cpu" else []),
    ]


def step_s(model: Model, ids: torch.Tensor, mask: torch.Tensor | None) -> float:
    """The median decode step of one generation."""
    stats: Stats = {}
    generate(model, ids, mask, max_new_tokens=NEW_TOKENS, stats=stats)
    return median(stats["decode"])


def speed_claim(config: PromptConfig, model: Model, padded: Padded, alone: torch.Tensor) -> Claim:
    variants = [lambda: step_s(model, *padded), lambda: step_s(model, alone, None)]
    list(interleaved(variants, 1))  # warms both up
    count = rounds(config, SPEED_ROUNDS)
    pairs = list(progress(interleaved(variants, count), count, "batched decode"))
    said = verdict(*zip(*pairs, strict=True))  # a step of 8 rows / a step of one
    middle, low, high = (ROWS / value for value in (said.ratio, said.high, said.low))
    rates = [rows / median(column) for rows, column in zip((ROWS, 1), zip(*pairs, strict=True), strict=True)]
    holds = True if low >= 4 else False if high < 4 else None
    return Claim(
        f"decode of batch {ROWS}, {model.name} {model.place.dtype_name}", "≥ 4 × the tokens/s of batch 1",
        f"×{middle:.2f} [{low:.2f}, {high:.2f}] (n={count}): {rates[0]:.1f} against {rates[1]:.1f} "
        "tokens/s", holds,
    )  # fmt: skip


def loop_claim(config: PromptConfig, model: Model, padded: Padded, pad_id: int) -> Claim:
    """Our loop and transformers' generate(), on the same padded batch."""
    outputs: list[list[list[int]]] = []

    def clocked(loop: Callable[[], list[list[int]]]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            tokens = loop()
            seconds = time.perf_counter() - start
            outputs.append(tokens)
            return seconds

        return run

    variants = [
        clocked(lambda: generate(model, *padded, max_new_tokens=NEW_TOKENS)),
        clocked(lambda: transformers_generate(model, *padded, max_new_tokens=NEW_TOKENS, pad_id=pad_id).tolist()),
    ]
    list(interleaved(variants, 1))
    _, size = gemm_rate(model.device, model.place.dtype)
    probe, pairs, anchors, count = Probe(model.device), [], [], rounds(config, LOOP_ROUNDS)
    for pair in progress(interleaved(variants, count), count, "batched loop"):
        pairs.append(pair)
        anchors.append(probe.anchor(model.place.dtype, size).seconds)
    said = verdict(*zip(*pairs, strict=True), noise=0.03, anchors=anchors)
    same = all(tokens == outputs[0] for tokens in outputs)
    rates = [ROWS * NEW_TOKENS / median(column) for column in zip(*pairs, strict=True)]
    return Claim(
        f"our loop against generate(), padded batch of {ROWS}", "not SLOWER, same tokens",
        f"our time / theirs: {said}; {rates[0]:.1f} against {rates[1]:.1f} tokens/s, prefill included; tokens "
        f"{'equal' if same else 'DIFFER: speed-up void'}",
        same and said.not_slower,
    )  # fmt: skip


def team_claim(config: PromptConfig, model: Model, padded: Padded) -> Claim:
    """The same batch on the thread that computed before, and on a new one, as a batcher with its own thread would."""

    def on_a_new_thread() -> float:
        with ThreadPoolExecutor(1) as thread:  # it ends here, and its OpenMP team with it
            thread.submit(step_s, model, *padded).result()
            return thread.submit(step_s, model, *padded).result()

    variants = [lambda: step_s(model, *padded), on_a_new_thread]
    count = rounds(config, TEAM_ROUNDS)
    pairs = list(progress(interleaved(variants, count), count, "threads"))
    said = verdict(*zip(*pairs, strict=True), noise=0.03)
    return Claim(
        "batches on the thread that computed before", "not SLOWER than on a second one",
        f"its step / a second thread's: {said}", said.not_slower,
    )  # fmt: skip
