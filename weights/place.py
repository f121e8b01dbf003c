"""Where a model is put: the device and the number format, why these, and the memory there is."""

import os
from dataclasses import dataclass

import torch

from config import Config, UserError
from weights.room import rooms


@dataclass(frozen=True)
class Place:
    """Where the arithmetic happens, and why there."""

    device: torch.device
    dtype: torch.dtype
    dtype_reason: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def resolve(config: Config) -> Place:
    """The wishes "auto" and the like -> a device and a dtype that work here. UserError when they cannot."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d in has if has[d]) if config.device == "auto" else config.device
    if not has[name]:
        raise UserError(f"--device {name} was asked for and is not available here: use --device auto, or cpu.")
    if config.dtype != "auto":
        place = Place(torch.device(name), getattr(torch, config.dtype), "asked for")
    elif name == "cpu":
        place = Place(
            torch.device("cpu"), torch.float32, "auto: exact on a CPU, where short formats are often emulated"
        )
    elif name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        place = Place(torch.device(name), torch.bfloat16, "auto: half the bytes, float32's range; native on this GPU")
    else:
        place = Place(torch.device(name), torch.float16, "auto: half the bytes; bfloat16 is not native on this GPU")
    try:
        probe = torch.ones(2, 2, device=place.device, dtype=place.dtype)
        (probe @ probe).sum().item()
    except (RuntimeError, TypeError) as error:
        raise UserError(f"--dtype {place.dtype_name} does not work on {name} here ({error}): use float32.") from error
    return place


def free_memory() -> int:
    """Bytes that can still be taken: of the machine, or of the limit set for this process where that is less."""
    return min(room.free for room in rooms())


def set_threads(threads: int) -> None:
    """Let PyTorch use so many CPU threads; 0 leaves its own choice. UserError beyond the cores there are."""
    if threads > (os.cpu_count() or threads):
        raise UserError(f"--threads {threads} on {os.cpu_count()} cores would only make them wait: use fewer.")
    if threads:
        torch.set_num_threads(threads)
