"""What a checkpoint's config.json asks of the transformer, in one vocabulary for both families. No tensors.

GPT-2 and the Llama family (Llama, SmolLM, Mistral, Qwen2, Qwen3) are the same loop with other parts: LayerNorm or
RMSNorm, learned positions or rotary ones, one matrix with GELU or two with SiLU, as many KV heads as heads or fewer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")


class Unsupported(Exception):
    """Not one of the architectures above, and why: it can still run, through transformers' own forward."""


@dataclass(frozen=True)
class Shape:
    """The sizes and choices that the arithmetic depends on. rope: angles per position, or () for learned positions."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP
    vocabulary: int
    context: int
    norm_eps: float
    tied: bool  # the output head is the embedding table
    rope: tuple[float, ...] = ()
    window: int | None = None  # a token sees only so many tokens, itself included

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies by a gate (SwiGLU, Shazeer 2020, arXiv 2002.05202)."""
        return self.family != "gpt2"

    def size_of(self, name: str) -> tuple[int, ...]:
        """What a tensor of this name must be, as checkpoints keep it. GPT-2 keeps its matrices as (inputs, outputs)."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = {
            "attn.c_attn": (queries + 2 * keys, self.hidden), "attn.c_proj": (self.hidden, queries),
            "mlp.c_fc": (self.inner, self.hidden), "mlp.c_proj": (self.hidden, self.inner),
            "q_proj": (queries, self.hidden), "k_proj": (keys, self.hidden), "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries), "gate_proj": (self.inner, self.hidden),
            "up_proj": (self.inner, self.hidden), "down_proj": (self.hidden, self.inner),
        }  # fmt: skip
        tables = {"wpe": (self.context, self.hidden)} | dict.fromkeys(
            ("wte", "embed_tokens", "lm_head"), (self.vocabulary, self.hidden)
        )
        norms = dict.fromkeys(("q_norm", "k_norm"), (self.head_dim,))
        stem, _, kind = name.rpartition(".")
        size = next((size for end, size in (matrices | tables | norms).items() if stem.endswith(end)), (self.hidden,))
        if kind == "bias":
            return size[:1]
        turned = self.family == "gpt2" and any(stem.endswith(end) for end in matrices)
        return size[::-1] if turned else size

    def kv_numbers_per_token(self) -> int:
        """2 (key and value) * layers * KV heads * head dimension."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes. Unsupported where this house has no such part."""
    family = config.get("model_type")
    try:
        if family == "gpt2":
            return gpt2(config)
        if family in LLAMA_FAMILY:
            return llama(config, family)
    except KeyError as missing:
        raise Unsupported(f"its config.json does not say {missing}") from missing
    raise Unsupported(f"model_type {family!r} is neither gpt2 nor one of {', '.join(LLAMA_FAMILY)}")


def gpt2(config: Mapping[str, Any]) -> Shape:
    demand(config.get("activation_function", "gelu_new") == "gelu_new", "its activation is not gelu_new")
    demand(config.get("scale_attn_weights", True), "it does not scale attention")
    demand(not config.get("scale_attn_by_inverse_layer_idx"), "it scales attention by layer")
    hidden, heads = config["n_embd"], config["n_head"]
    return Shape(
        family="gpt2",
        layers=config["n_layer"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        inner=config.get("n_inner") or 4 * hidden,
        vocabulary=config["vocab_size"],
        context=config["n_positions"],
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tied=config.get("tie_word_embeddings", True),
    )


def llama(config: Mapping[str, Any], family: str) -> Shape:
    demand(config.get("hidden_act", "silu") == "silu", "its activation is not silu")
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {})}
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    demand(rope.get("partial_rotary_factor", 1) == 1, "it rotates a part of each head only")
    slides = family == "mistral" or config.get("use_sliding_window", False)
    demand(not (slides and config.get("max_window_layers")), "its window slides in some layers only")
    return Shape(
        family=family,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        inner=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        tied=config.get("tie_word_embeddings", False),
        rope=rope_angles(rope, head_dim),
        window=config.get("sliding_window") if slides else None,
    )


def demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Unsupported(otherwise)


def rope_angles(rope: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """By how much each pair of dimensions turns from one position to the next (RoFormer, arXiv 2104.09864, eq. 15).

    Scaled rotations stretch a context beyond the trained one: "linear" all pairs alike, "llama3" the slow ones only.
    In float32, as transformers has it: at position 5,000 a more exact angle is another one by 5,000 times the rounding.
    """
    shares = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    angles = np.float32(1) / np.float32(rope["rope_theta"]) ** shares
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        angles = angles / np.float32(rope["factor"])
    elif kind != "default":
        demand(kind == "llama3", f"its positions are scaled by {kind!r}")
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * angles / np.float32(2 * math.pi)  # in the trained context
        keep = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)  # 1: fast, as it is; 0: slow, slowed
        angles = keep * angles + (1 - keep) * angles / np.float32(rope["factor"])
    return tuple(angles.tolist())
