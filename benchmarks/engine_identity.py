"""The engine's tokens are those of transformers' generate(), on the embedded model and on two harder checkpoints.

With the checkpoint's own numbers, the default on a CPU, they must be: rounding differs in the last bits of sums only.
With weights rounded to float16 they may differ where two tokens are nearly as likely: how often is counted here, on
weights that were never 4-bit too.
"""

from dataclasses import replace

import torch

from benchmarks.claim import Claim
from benchmarks.identity import NEW_TOKENS, enlarge, perturb
from config import PromptConfig
from engine import native
from engine.engine import Engine
from engine.kv_blocks import Blocks
from engine.linear import fastest
from engine.request import Sampling
from engine.runner import TorchRunner
from engine.scheduler import Scheduler
from engine.shape import shape_of
from engine.transformer import Transformer
from lab.console import progress
from lab.prompts import questions
from model import Model, ids_tensor, load, transformers_generate
from weights.tensors import from_net

BLOCKS = 600


def engine_of(model: Model, form: str) -> tuple[str, Engine]:
    """(the kernel's name, an engine on the network's own weights)."""
    tensors = from_net(model.net)
    shape = shape_of(tensors.config)
    try:
        network = native.NativeTransformer(
            shape, tensors, form, torch.float32, blocks=BLOCKS, threads=torch.get_num_threads()
        )
        kernel = "native.c"
    except native.NotAvailable:
        form = "float32" if form == native.EXACT else form
        kernel, make = fastest(form, model.device, torch.randn(shape.inner, shape.hidden))
        network = Transformer(
            shape, tensors, make, device=model.device, dtype=torch.float32, blocks=BLOCKS, size=native.PANEL
        )
    return kernel, Engine(TorchRunner(network), Scheduler(Blocks(BLOCKS), max_running=16, max_tokens=512))


def equal_tokens(ours: list[int], theirs: list[int]) -> int:
    """How many of the first tokens are equal; what comes after the first difference is another text."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def claim_of(model: Model, prompts: list[list[int]], what: str) -> Claim:
    wanted = [
        transformers_generate(model, ids_tensor([prompt]), max_new_tokens=NEW_TOKENS)[0].tolist()
        for prompt in progress(prompts, len(prompts), f"references, {what}")
    ]
    counted = {}
    for form in (native.EXACT, "float16"):
        kernel, engine = engine_of(model, form)
        answers = engine.generate(prompts, Sampling(max_new_tokens=NEW_TOKENS))
        equal = [equal_tokens(answer.tokens, theirs) for answer, theirs in zip(answers, wanted, strict=True)]
        counted[form] = sum(count == NEW_TOKENS for count in equal), sum(equal)
    texts = [
        f"{form} weights: {whole} of {len(prompts)} answers, {tokens} of {NEW_TOKENS * len(prompts)} tokens before the "
        "first difference"
        for form, (whole, tokens) in counted.items()
    ]
    return Claim(
        f"the engine's tokens, {what} ({kernel})",
        "with exact weights all equal to generate()",
        "; ".join(texts),
        counted[native.EXACT][0] == len(prompts),
    )


def claims(config: PromptConfig) -> list[Claim]:
    texts = questions()[: 8 if config.quick else None]
    model, tokenizer, _ = load(replace(config, max_new_tokens=NEW_TOKENS, device="cpu", dtype="float32"))
    prompts = [tokenizer.encode(text) for text in texts]
    found = [claim_of(model, prompts, model.name)]
    perturb(model)
    found.append(claim_of(model, prompts, f"{model.name} perturbed"))
    model, tokenizer, _ = load(replace(config, model="random:distilgpt2", template="raw", device="cpu"))
    enlarge(model)
    return [*found, claim_of(model, [tokenizer.encode(text) for text in texts], "random:distilgpt2 enlarged")]
