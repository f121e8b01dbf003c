"""Our loop gives the tokens of transformers' generate() and is not slower, interleaved in one run."""

import time
from collections.abc import Callable

import torch

from benchmarks.claim import Claim
from config import PromptConfig
from lab.ceilings import Probe
from lab.console import progress
from lab.verdict import interleaved, verdict
from model import Model, generate, ids_tensor, load

ROUNDS = 48
NEW_TOKENS = 16


def reference(model: Model, ids: torch.Tensor, new_tokens: int) -> list[int]:
    """The tokens of transformers' own greedy generate(), end tokens not heeded."""
    out = model.net.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


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

    ours = timed_loop(lambda: generate(model, ids, max_new_tokens=NEW_TOKENS)[0].tolist())
    theirs = timed_loop(lambda: reference(model, ids, NEW_TOKENS))
    return [ours, theirs], outputs


def claims(model_name: str) -> list[Claim]:
    model, _, prompt = load(PromptConfig(model=model_name, max_new_tokens=NEW_TOKENS))
    variants, outputs = loops(model, ids_tensor([prompt]).to(model.device))
    list(interleaved(variants, 1))  # warms both up
    probe, rounds, anchors = Probe(model.device), [], []
    for seconds in progress(interleaved(variants, ROUNDS), ROUNDS, "decode loop"):
        rounds.append(seconds)
        anchors.append(probe.anchor(model.place.dtype).seconds)
    said = verdict(*zip(*rounds, strict=True), noise=0.03, anchors=anchors)
    same = all(tokens == outputs[0] for tokens in outputs)
    undecided = same and said.word == "NO VERDICT"
    return [
        Claim(f"loop against generate(), {model.name}", "not SLOWER, same tokens",
              f"our time / theirs: {said}; tokens {'equal' if same else 'DIFFER: speed-up void'}",
              None if undecided else same and said.not_slower)
    ]  # fmt: skip
