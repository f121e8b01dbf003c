"""What the KV cache costs in memory, by formula: per token, per request, against the weights, and for known shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

from lab.kv_figures import Cell

BLOCK = 16  # tokens a block, as paged caches take them (PagedAttention, arXiv 2309.06180)
LENGTHS = (128, 512, 2048, 8192)


def token_bytes(layers: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """2 (key and value) * layers * KV heads * head dimension * bytes per number."""
    return 2 * layers * kv_heads * head_dim * itemsize


def needed_bytes(model: Any, cell: Cell, tokens: int) -> int:
    """A generous estimate of what a run of this cell takes beyond the weights.

    The cache (twice while it is copied), the wide activations of a pass over the whole prompt (twice what is in use at
    once: an allocator holds more than is asked of it, by chance up to so much), and with plain matrix products the
    score of every pair of tokens: before the softmax, inside it, and after.
    """
    _, heads, _, head_dim = model.heads
    size = model.place.dtype.itemsize
    activations = tokens * heads * head_dim * 48 * size
    scores = 3 * heads * tokens * tokens * 4 if cell.attention == "eager" else 0
    return 2 * tokens * model.kv_bytes_per_token() + activations + scores


def floors(model: Any, cells: Sequence[Cell], new_tokens: int) -> dict[str, Any]:
    """For every cell (FLOPs, bytes) of the prefill and of each decode step."""
    found = {}
    for cell in cells:
        n = cell.prompt_len
        if cell.cache == "off":
            steps = [(model.flops(n + i, 0), model.read_bytes(n + i, 0)) for i in range(1, new_tokens)]
        else:
            steps = [(model.flops(1, n + i - 1), model.read_bytes(1, n + i - 1)) for i in range(1, new_tokens)]
        found[cell.name] = {"prefill": (model.flops(n, 0), model.read_bytes(n, 0)), "steps": steps}
    return found


def ledger(model: Any, free_bytes: int, shapes: Mapping[str, dict]) -> dict[str, Any]:
    """What a token holds, how many requests fit, and where the cache outgrows the weights.

    shapes: known architectures by name, each as in its config.json, to stand beside the model's own.
    """
    layers, heads, kv_heads, head_dim = model.heads
    each, size = model.kv_bytes_per_token(), model.place.dtype.itemsize
    return {
        "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "itemsize": size,
        "token_bytes": each,
        "weight_bytes": model.weight_bytes(),
        "free_bytes": free_bytes,
        "outgrows_at": model.weight_bytes() / each,
        "fit": {str(n): int(free_bytes // (n * each)) for n in LENGTHS},
        "shapes": [shape_row(name, shape, size) for name, shape in shapes.items()],
    }  # fmt: skip


def shape_row(name: str, shape: dict, itemsize: int) -> dict[str, Any]:
    """A known architecture's cache, and what it would be if every head had its own keys and values."""
    layers = shape.get("n_layer") or shape["num_hidden_layers"]
    heads = shape.get("n_head") or shape["num_attention_heads"]
    width = shape.get("n_embd") or shape["hidden_size"]
    kv_heads, head_dim = shape.get("num_key_value_heads", heads), width // heads
    return {"name": name, "layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
            "token_bytes": token_bytes(layers, kv_heads, head_dim, itemsize),
            "if_every_head_had_its_own": token_bytes(layers, heads, head_dim, itemsize)}  # fmt: skip


def in_blocks(tokens: int) -> int:
    """Tokens reserved for so many, block by block."""
    return -(-tokens // BLOCK) * BLOCK
