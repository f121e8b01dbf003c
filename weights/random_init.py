"""Seeded random weights in a known shape, for timing where no checkpoint can be had. Their text is noise.

A transformer does the same work whatever its weights hold, so times, bytes and FLOPs are those of the real model.
"""

import hashlib
import json
from pathlib import Path

from config import UserError

# Shapes known without the network. Sources: the models' own config.json.
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "bos_token_id": 50256, "eos_token_id": 50256}
SHAPES: dict[str, dict] = {
    "distilgpt2": GPT2 | {"n_embd": 768, "n_layer": 6, "n_head": 12},
    "gpt2": GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "SmolLM2-135M": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def shape_of(name: str):
    """The transformers configuration of random:name: a known shape, or the config.json of a local folder."""
    from transformers import AutoConfig

    if name in SHAPES:
        values = dict(SHAPES[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    if (Path(name) / "config.json").is_file():
        return AutoConfig.from_pretrained(name, local_files_only=True)
    raise UserError(
        f"random:{name} is not a known shape: use one of {', '.join(SHAPES)}, or a folder with config.json."
    )


def parameter_count(config) -> int:
    """Parameters of this shape, counted without allocating them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def build(config, seed: int, device: str, dtype, attention: str):
    """A model of this shape; the same seed gives the same weights on the same kind of device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def identity(config, seed: int) -> str:
    """Stands where a file's hash stands for real weights."""
    shape = json.dumps(config.to_diff_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"{shape} {seed}".encode()).hexdigest()[:12]
