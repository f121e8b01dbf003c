"""Tokens are called identical only on 32 prompts of 32 tokens, and on weights that were not rounded to 4 bits before.

The embedded model was 4-bit once: its weights lie on a coarse grid, and ties or lucky roundings could hide an error. So
the same is asked of a copy whose every weight was moved by noise of a thousandth of its layer's spread.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.claim import Claim
from benchmarks.decode_loop import reference
from config import PromptConfig
from lab.console import progress
from model import Model, generate, ids_tensor, load
from tokenizer import Tokenizer

PROMPTS = Path(__file__).with_name("prompts.txt")
NEW_TOKENS = 32


def perturb(model: Model, scale: float = 1e-3, seed: int = 0) -> None:
    """Move every weight by normal noise of scale times its tensor's standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.net.parameters():
            noise = torch.randn(weights.shape, generator=generator) * scale * weights.float().std().nan_to_num().cpu()
            weights.add_(noise.to(weights.device, weights.dtype))


def agreement(model: Model, tokenizer: Tokenizer, prompts: list[str]) -> Iterator[bool]:
    """For each prompt, whether our loop and generate() give the same NEW_TOKENS tokens."""
    for prompt in prompts:
        ids = ids_tensor([tokenizer.encode(prompt)]).to(model.device)
        ours = generate(model, ids, max_new_tokens=NEW_TOKENS)
        yield ours[0].tolist() == reference(model, ids, NEW_TOKENS)


def claims(model_name: str) -> list[Claim]:
    model, tokenizer, _ = load(PromptConfig(model=model_name, max_new_tokens=NEW_TOKENS, ignore_eos=True))
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    found = []
    for copy in ("as it is", "perturbed"):
        if copy == "perturbed":
            perturb(model)
        same = list(progress(agreement(model, tokenizer, prompts), len(prompts), f"identity, {copy}"))
        text = f"{sum(same)} of {len(same)} prompts × {NEW_TOKENS} tokens equal"
        found.append(Claim(f"tokens of generate(), {model.name} {copy}", "32 of 32 prompts", text, all(same)))
    return found
