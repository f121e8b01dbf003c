"""A checkpoint's tensors by name, one at a time, without building transformers' network around them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from config import UserError
from weights.find import Checkpoint


@dataclass(frozen=True)
class Tensors:
    """config: what config.json says. names: all tensors. take(name): one of them, as the checkpoint stores it."""

    config: dict[str, Any]
    names: frozenset[str]
    take: Callable[[str], torch.Tensor]


def read(checkpoint: Checkpoint, seed: int = 0) -> Tensors:
    """The tensors of a checkpoint. UserError when it is broken.

    Safetensors are read from disk when they are taken; other files, and random weights, pass through transformers.
    """
    if checkpoint.random_shape is None and any(checkpoint.folder.glob("*.safetensors")):
        return from_safetensors(checkpoint.folder)
    from weights.load import load_net  # here: it loads transformers, which takes seconds

    net, _ = load_net(checkpoint, torch.device("cpu"), torch.float32, "sdpa", seed)
    return from_net(net)


def from_net(net: Any) -> Tensors:
    """The tensors of a network in memory. They stay the network's own."""
    state = net.state_dict()
    return Tensors(net.config.to_dict(), frozenset(state), state.__getitem__)


def from_safetensors(folder: Path) -> Tensors:
    try:
        config = json.loads((folder / "config.json").read_text())
        files = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                files |= dict.fromkeys(tensors.keys(), file)
    except Exception as error:  # OSError, ValueError, SafetensorError: whatever a broken folder provokes
        raise UserError(f"{folder} is no model that can be loaded ({error}): name another.") from error

    def take(name: str) -> torch.Tensor:
        # Opened anew each time: what is mapped stays in memory until it is closed, and a model would lie there twice.
        with safe_open(files[name], "pt") as tensors:
            return tensors.get_tensor(name)

    return Tensors(config, frozenset(files), take)
