"""A checkpoint -> a network on a device."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from config import UserError
from weights import random_init
from weights.find import Checkpoint, content_hash
from weights.place import free_memory


def load_net(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: str, seed: int
) -> tuple[PreTrainedModel, str]:
    """The network and the hash of its weights. UserError when it is broken or does not fit."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if checkpoint.random_shape is None:
        return trained_net(checkpoint, device, dtype, attention), content_hash(checkpoint.folder)
    try:
        layout = random_init.shape_of(checkpoint.random_shape)
        check_memory(checkpoint.name, layout, device, dtype)
        net = random_init.build(layout, seed, device.type, dtype, attention)
    except UserError:
        raise
    except Exception as error:  # whatever a broken config.json provokes
        raise UserError(
            f"{checkpoint.name} is no shape that can be built ({first_line(error)}): name another."
        ) from error
    return net, random_init.identity(layout, seed)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def trained_net(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    try:
        net = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=dtype, attn_implementation=attention, local_files_only=True
        )
        return net.to(device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{checkpoint.name} does not fit in the memory of {device}: use --device cpu.") from error
    except Exception as error:  # OSError, ValueError, SafetensorError, KeyError …: whatever a broken folder provokes
        raise UserError(
            f"{checkpoint.folder} is no model that can be loaded ({first_line(error)}): name another."
        ) from error


def check_memory(name: str, layout: Any, device: torch.device, dtype: torch.dtype) -> None:
    need = random_init.parameter_count(layout) * dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else free_memory()
    if need > free:
        raise UserError(
            f"{name} needs {need / 1e9:.1f} GB for its weights and {free / 1e9:.1f} GB are free: use a smaller shape "
            "or a shorter --dtype."
        )
