"""One matrix product, in the formats that PyTorch has a fast kernel for on this machine.

A decode step reads every weight once and does little with it, so its time is that of reading: half the bytes is half
the time. A prefill does much with each weight, so its time is that of multiplying. Which kernel is best at either is
not a matter of principle but of the processor: it is measured when the model is loaded.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from config import UserError
from metrics import Stats, timed


class Linear:
    """x (rows, in) -> (rows, out), with weights (out, in) as they were given."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype).contiguous()
        self.bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

    @property
    def bytes(self) -> int:
        return self.weight.numel() * self.weight.itemsize


class PackedFloat16(Linear):
    """float16 weights in FBGEMM's order, float32 arithmetic: half the bytes to read, and no rounding of activations."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), bias)
        self.numbers = weight.numel()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)

    @property
    def bytes(self) -> int:
        return 2 * self.numbers


class PackedOneDNN(Linear):
    """Weights in oneDNN's order: the same numbers, laid out once as its kernel reads them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias, "none", [], "")
        return y.to(x.dtype)


Maker = Callable[[torch.Tensor, torch.Tensor | None], Linear]


def candidates(form: str, device: torch.device) -> list[tuple[str, Maker]]:
    """The kernels that keep weights in this form ("float32", "float16", "bfloat16"), the plainest first."""
    dtype = getattr(torch, form)
    plain = [("PyTorch", partial(Linear, dtype=dtype))]
    if device.type != "cpu":
        return plain
    onednn = [("oneDNN, packed", partial(PackedOneDNN, dtype=dtype))]
    return [("FBGEMM, packed", PackedFloat16), *plain] if form == "float16" else [*plain, *onednn]


def fastest(form: str, device: torch.device, sample: torch.Tensor) -> tuple[str, Maker]:
    """Of the kernels for this form, the one that is quickest on weights like the sample: (its name, how to make it).

    One pass over a matrix says little, so each is timed at 1, 16 and 256 rows, and the product of the times decides:
    twice as fast in one phase weighs as much as twice as fast in another. A kernel that this processor lacks is out.
    """
    usable = []
    for name, make in candidates(form, device):
        try:
            usable.append((cost(make(sample, None), sample), name, make))
        except RuntimeError:  # "needs the cpu support avx_ne_convert", "not built with FBGEMM", …
            continue
    if not usable:
        raise UserError(f"No kernel for {form} weights works on {device}: use another --format.")
    _, name, make = min(usable, key=lambda one: one[0])
    return name, make


def cost(linear: Linear, sample: torch.Tensor) -> float:
    """Product of the best times at 1, 16 and 256 rows."""
    product = 1.0
    for rows in (1, 16, 256):
        x, stats = torch.randn(rows, sample.shape[1], device=sample.device), Stats()
        linear(x)
        for _ in range(5):
            with timed("linear", stats):
                linear(x)
        product *= min(stats["linear"])
    return product
