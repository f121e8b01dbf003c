"""A model's name -> an engine that runs it, on the best arithmetic there is here, within a stated budget of memory."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from config import UserError
from engine import native
from engine.engine import Engine
from engine.kv_blocks import BLOCK, Blocks
from engine.linear import fastest
from engine.runner import TorchRunner, TransformersRunner
from engine.scheduler import Scheduler
from engine.settings import EngineConfig
from engine.shape import Shape, Unsupported, shape_of
from engine.transformer import Transformer
from weights import random_init
from weights.find import Checkpoint, content_hash, find
from weights.place import Place, free_memory, resolve, set_threads
from weights.tensors import Tensors, read

SHARE_OF_FREE = 0.25
UNLIMITED = 1 << 20  # the context to reckon with where an architecture names none: memory sets the limit


@dataclass(frozen=True)
class Loaded:
    """A model in its place. new_engine(**changes of the config) makes engines on it, with nothing in their caches; one
    of them at a time. about: for cards and records.
    """

    new_engine: Callable[..., Engine]
    about: dict[str, Any]

    @cached_property
    def engine(self) -> Engine:
        return self.new_engine()


def load(
    config: EngineConfig, decode: Callable[[Sequence[int]], str] | None = None, checkpoint: Checkpoint | None = None
) -> Loaded:
    """Find (unless it is found already), read and place the model. UserError: it cannot be had, or does not fit."""
    set_threads(config.threads)
    if config.max_tokens < config.max_running:
        raise UserError(
            f"--max-tokens {config.max_tokens} is less than --max-running {config.max_running}: each running request "
            "needs a token per step."
        )
    checkpoint, place = checkpoint or find(config.model), resolve(config)
    tensors = read(checkpoint, config.seed)
    try:
        shape = shape_of(tensors.config)
    except Unsupported as why:
        return through_transformers(config, checkpoint, place, str(why), decode)
    form, cache_dtype = formats(config, place)
    why = not_native(config, shape, place, form)
    if why and place.device.type == "cpu":
        form, cache_dtype = without_native(form, cache_dtype)
    per_token = shape.kv_numbers_per_token() * cache_dtype.itemsize
    blocks = block_count(config, per_token, shape.context, place.device)
    network, kernel, kept = build(shape, tensors, place, form, cache_dtype, blocks, why)
    about = describe(checkpoint, place, shape, config.seed) | {
        "kernel": kernel,
        "weights": form,
        "kept": kept,
        "weight_bytes": network.weight_bytes,
        "cache": str(cache_dtype).removeprefix("torch."),
        "kv_bytes_per_token": per_token,
        "kv_blocks": blocks,
        "context": shape.context,
    }
    eos_ids = eos_of(checkpoint, tensors)

    def new_engine(**changes: Any) -> Engine:
        engine = Engine(
            TorchRunner(network), scheduler_for(replace(config, **changes), blocks), eos_ids=eos_ids,
            context=shape.context, vocabulary=shape.vocabulary, decode=decode,
        )  # fmt: skip
        if isinstance(network, native.NativeTransformer):  # whose cache lies block by block
            engine.give_back = network.give_back
        return engine

    return Loaded(new_engine, about)


def formats(config: EngineConfig, place: Place) -> tuple[str, torch.dtype]:
    """(how weights are kept, the cache's numbers).

    On a CPU, by default nothing is rounded: weights in the smallest form that holds the checkpoint's own numbers, all
    arithmetic and the cache in float32. dtype float16 rounds both, which tips a close choice now and then:
    benchmarks/engine_identity.py counts how often.
    """
    if place.device.type != "cpu":
        return place.dtype_name, place.dtype
    if config.dtype == "auto":
        return native.EXACT, torch.float32
    return config.dtype, place.dtype


def not_native(config: EngineConfig, shape: Shape, place: Place, form: str) -> str | None:
    """Why native.c does not compute this, or None."""
    if config.native == "off":
        return "--native off"
    if place.device.type != "cpu":
        return f"native.c is for CPUs, this is {place.device.type}"
    if form == "bfloat16":
        return "native.c computes in float32, and keeps no bfloat16 cache"
    if shape.head_dim % native.PANEL:
        return f"native.c wants heads of a multiple of {native.PANEL} numbers, these have {shape.head_dim}"
    return native.compile_beside() if config.native == "auto" else prepare()


def without_native(form: str, cache: torch.dtype) -> tuple[str, torch.dtype]:
    """The formats that PyTorch's kernels have instead: its float16 products take and give float32, and so the cache."""
    if form == native.EXACT:
        return "float32", cache
    return form, torch.float32 if form == "float16" else cache


def build(
    shape: Shape, tensors: Tensors, place: Place, form: str, cache: torch.dtype, blocks: int, why: str | None
) -> tuple[Any, str, dict[str, int]]:
    """The network, the name of what computes it, and its weights' bytes by the form they are kept in.

    why: the reason not to take native.c.
    """
    if why is None:
        network = native.NativeTransformer(shape, tensors, form, cache, blocks=blocks, threads=torch.get_num_threads())
        return network, "native.c", network.bytes_by_form
    kernel, make = fastest(form, place.device, torch.randn(shape.inner, shape.hidden, device=place.device))
    network = Transformer(shape, tensors, make, device=place.device, dtype=cache, blocks=blocks, size=BLOCK)
    name = f"{kernel} ({why})" if place.device.type == "cpu" else kernel
    return network, name, {form: network.weight_bytes}


def block_count(config: EngineConfig, per_token: int, context: int, device: torch.device) -> int:
    """KV blocks that the budget buys. UserError when it is not enough for one sequence of any use."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else free_memory()
    budget = config.kv_memory * 1e9 or SHARE_OF_FREE * free
    if config.kv_memory and budget > free:
        raise UserError(f"--kv-memory {config.kv_memory:g} GB is more than the {free / 1e9:.1f} GB that are free.")
    useful = config.max_running * -(-context // BLOCK)
    blocks = min(int(budget // (BLOCK * per_token)), useful)
    if blocks < 1:
        raise UserError(f"{budget / 1e9:.3f} GB do not hold {BLOCK} tokens of keys and values: raise --kv-memory.")
    return blocks


def scheduler_for(config: EngineConfig, blocks: int, reuse: bool = True) -> Scheduler:
    empty = Blocks(blocks, reuse=reuse and not config.no_prefix_cache)
    chunked = not config.whole_prompts
    return Scheduler(empty, max_running=config.max_running, max_tokens=config.max_tokens, chunked=chunked)


def describe(checkpoint: Checkpoint, place: Place, shape: Shape, seed: int) -> dict[str, Any]:
    if checkpoint.timing_only:
        identity = random_init.identity(random_init.shape_of(checkpoint.random_shape), seed)
    else:
        identity = content_hash(checkpoint.folder)
    return {
        "name": checkpoint.name,
        "origin": checkpoint.origin,
        "hash": identity,
        "timing_only": checkpoint.timing_only,
        "device": place.device.type,
        "family": shape.family,
    }


def eos_of(checkpoint: Checkpoint, tensors: Tensors) -> frozenset[int]:
    """The tokens that end an answer. Random weights never mean to stop."""
    if checkpoint.timing_only or checkpoint.folder is None:
        return frozenset()
    wishes = checkpoint.folder / "generation_config.json"
    said = json.loads(wishes.read_text()).get("eos_token_id") if wishes.exists() else None
    said = tensors.config.get("eos_token_id") if said is None else said
    return frozenset(said if isinstance(said, list) else [] if said is None else [said])


def through_transformers(
    config: EngineConfig, checkpoint: Checkpoint, place: Place, why: str, decode: Any
) -> Loaded:  # fmt: skip
    """Any other architecture: transformers' own forward, a request at a time."""
    import model  # here: it loads transformers, which takes seconds

    loaded = model.load_model(checkpoint, config, place)
    per_token = loaded.kv_bytes_per_token()
    blocks = block_count(config, per_token, loaded.context or UNLIMITED, place.device)
    about = loaded.description() | {
        "kernel": f"transformers, one request at a time ({why})", "weights": place.dtype_name,
        "weight_bytes": loaded.weight_bytes(), "kept": {place.dtype_name: loaded.weight_bytes()},
        "cache": place.dtype_name, "kv_bytes_per_token": per_token, "kv_blocks": blocks,
    }  # fmt: skip

    def new_engine(**changes: Any) -> Engine:
        return Engine(
            TransformersRunner(loaded), scheduler_for(replace(config, **changes), blocks, reuse=False),
            eos_ids=loaded.stops(False), context=loaded.context, vocabulary=loaded.vocabulary, decode=decode,
        )  # fmt: skip

    return Loaded(new_engine, about)


def prepare() -> str | None:
    """Compile native.c if that has not been done: seconds, once. The reason when it cannot be done."""
    try:
        native.library()
    except native.NotAvailable as why:
        return str(why)
    return None
