"""Tokens are called identical only on 32 prompts of 32 tokens, and not on one checkpoint alone.

The embedded model was 4-bit once: its weights lie on a coarse grid, and ties or lucky roundings could hide an error. So
the same is asked of a copy whose every weight was moved by noise of a hundredth of its layer's spread, and of random
weights in GPT-2's shape, made larger so that the answers vary.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.claim import Claim
from config import PromptConfig
from lab.console import progress
from lab.prompts import questions
from model import Model, generate, ids_tensor, load, transformers_generate
from tokenizer import Tokenizer

FEWEST, NEW_TOKENS = 32, 32


def perturb(model: Model, scale: float = 1e-2, seed: int = 0) -> None:
    """Move every weight by normal noise of scale times its tensor's standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.net.parameters():
            noise = torch.randn(weights.shape, generator=generator) * scale * weights.float().std().nan_to_num().cpu()
            weights.add_(noise.to(weights.device, weights.dtype))


def enlarge(model: Model, factor: float = 6.0) -> None:
    """Fresh random weights repeat one token for ever; larger ones make every step depend on its context."""
    with torch.no_grad():
        for weights in model.net.parameters():
            if weights.ndim >= 2:
                weights.mul_(factor)


def answers(model: Model, tokenizer: Tokenizer, prompts: list[str]) -> Iterator[tuple[list[int], bool]]:
    """For each prompt our tokens, and whether generate() gives the same."""
    for prompt in prompts:
        ids = ids_tensor([tokenizer.encode(prompt)]).to(model.device)
        ours = generate(model, ids, max_new_tokens=NEW_TOKENS)[0]
        yield ours, ours == transformers_generate(model, ids, max_new_tokens=NEW_TOKENS)[0].tolist()


def claim(model: Model, tokenizer: Tokenizer, prompts: list[str], what: str) -> Claim:
    found = list(progress(answers(model, tokenizer, prompts), len(prompts), f"identity, {what}"))
    same, kinds = sum(equal for _, equal in found), len({token for tokens, _ in found for token in tokens})
    text = f"{same} of {len(found)} prompts × {NEW_TOKENS} tokens equal ({kinds} different tokens)"
    holds = None if same == len(found) < FEWEST else same == len(found)
    return Claim(f"tokens of generate(), {what}", f"{FEWEST} of {FEWEST} prompts", text, holds)


def claims(config: PromptConfig) -> list[Claim]:
    config = replace(config, max_new_tokens=NEW_TOKENS)
    prompts = questions()[: 4 if config.quick else None]
    model, tokenizer, _ = load(config)
    found = [claim(model, tokenizer, prompts, f"{model.name} as it is")]
    perturb(model)
    found.append(claim(model, tokenizer, prompts, f"{model.name} perturbed"))
    model, tokenizer, _ = load(replace(config, model="random:distilgpt2", template="raw"))
    enlarge(model)
    return [*found, claim(model, tokenizer, prompts, "random:distilgpt2 enlarged")]
