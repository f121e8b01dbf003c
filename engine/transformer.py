"""The transformer: GPT-2 and the Llama family in one loop, on rows of tokens from any number of requests.

What transformers computes, with three differences that serving needs. The rows of all requests lie one behind the
other: a matrix product does not care whose row it is, so nothing is padded. Keys and values lie in blocks that the
scheduler hands out. And the output head, a third of a small model's weights, is computed for wanted rows only.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from config import UserError
from engine.linear import Linear, Maker
from engine.sampler import likeliest
from engine.shape import Shape
from engine.step import Part, Step
from weights.tensors import Tensors

Norm = Callable[[torch.Tensor], torch.Tensor]


class Transformer:
    """Weights on a device, and a cache of `blocks` blocks of `size` tokens.

    dtype: of activations between the matrix products and of the cache. make: how a matrix is kept (engine/linear.py).
    """

    def __init__(
        self, shape: Shape, tensors: Tensors, make: Maker, *, device: torch.device, dtype: torch.dtype,
        blocks: int, size: int,
    ) -> None:  # fmt: skip
        self.shape, self.device, self.dtype, self.size = shape, device, dtype, size
        loader = Loader(shape, tensors, make, device, dtype)
        self.embedding = loader.table(loader.embedding)
        self.positions = loader.table("wpe") if shape.family == "gpt2" else None
        self.layers = [Layer(loader, i) for i in range(shape.layers)]
        self.norm = loader.norm("ln_f" if shape.family == "gpt2" else "norm")
        self.head = loader.head()
        self.angles = torch.tensor(shape.rope, device=device)
        kv = (shape.layers, 2, blocks * size, shape.kv_heads, shape.head_dim)
        self.cache = zeros(kv, dtype, device)

    @property
    def weight_bytes(self) -> int:
        """Of matrices and tables; the norms are next to nothing."""
        matrices = [self.head, *(m for one in self.layers for m in (one.qkv, one.out, one.up, one.down))]
        shared = isinstance(self.head.__dict__.get("weight"), torch.Tensor) and self.head.weight is self.embedding
        tables = [t for t in (None if shared else self.embedding, self.positions) if t is not None]
        return sum(matrix.bytes for matrix in matrices) + sum(table.nbytes for table in tables)

    @torch.inference_mode()
    def forward(self, step: Step) -> torch.Tensor:
        """Compute all rows of the step, keep their keys and values; logits (wanted rows, vocabulary) in float32."""
        shape, positions = self.shape, self.ids(step.positions)
        x = self.embedding[self.ids(step.tokens)]
        if self.positions is not None:
            x = x + self.positions[positions]
        turn = self.angles * positions[:, None]
        cos, sin = turn.cos().to(x.dtype)[:, None], turn.sin().to(x.dtype)[:, None]
        slots, attention = self.ids(step.slots(self.size)), Attention(step, shape, self)
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            qkv = layer.qkv(layer.norm1(x)).view(len(x), -1, shape.head_dim)
            q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
            if layer.q_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
            if shape.rope:
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            keys[slots], values[slots] = k, v
            x = x + layer.out(attention(q, keys, values))
            x = x + layer.down(activate(layer.up(layer.norm2(x)), shape.gated))
        return self.head(self.norm(x[self.ids(step.wanted)])).float()

    def likeliest(self, logits: torch.Tensor) -> tuple[list[float], list[int]]:
        """The greatest of each row, and its token."""
        return likeliest(logits)

    def ids(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU without touching them: memory is taken when it is first written, not gigabytes at the start."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (rows, heads, head_dim): the pairs (i, i + head_dim / 2) turned by their row's angles."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def activate(x: torch.Tensor, gated: bool) -> torch.Tensor:
    """(rows, 2 * inner) -> SiLU of one half times the other; without a gate, (rows, inner) -> GELU."""
    if not gated:
        return F.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class Attention:
    """Each row looks at the cached tokens of its own request, up to itself. Prepared once a step, used in each layer.

    Single rows (decode) go together in one product, their contexts filled up to the longest; longer parts (prefill)
    go one by one, since a mask over several would mostly hide.
    """

    def __init__(self, step: Step, shape: Shape, home: Transformer) -> None:
        self.shape = shape
        self.long = [self.prepared(part, home) for part in step.parts if part.count > 1]
        single = [part for part in step.parts if part.count == 1]
        longest = max((part.length for part in single), default=0)
        self.rows = home.ids([part.first for part in single])
        # Filled up with a slot of its own: what it sees is multiplied by zero, and another's NaN would not become zero.
        filled = [
            part.slots(part.length, home.size) + part.slots(1, home.size) * (longest - part.length) for part in single
        ]
        self.context = home.ids([slot for slots in filled for slot in slots]).view(len(single), longest)
        lengths, columns = home.ids([part.length for part in single]).view(-1, 1), home.ids(list(range(longest)))
        seen = columns < lengths
        if shape.window:
            seen &= columns >= lengths - shape.window
        self.mask = torch.zeros(seen.shape, device=home.device, dtype=home.dtype).masked_fill(~seen, -torch.inf)

    def prepared(self, part: Part, home: Transformer) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """(its rows, the slots of its context, what each row sees of it)."""
        rows, columns = home.ids(list(part.positions))[:, None], home.ids(list(range(part.length)))
        seen = columns <= rows
        if self.shape.window:
            seen &= columns > rows - self.shape.window
        return slice(part.first, part.first + part.count), home.ids(part.slots(part.length, home.size)), seen

    def __call__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """q (rows, heads, head_dim), keys and values (slots, KV heads, head_dim) -> (rows, heads * head_dim)."""
        out = torch.empty_like(q)
        for rows, slots, seen in self.long:
            k, v = (cached[slots].transpose(0, 1)[None] for cached in (keys, values))
            one = q[rows].transpose(0, 1)[None]
            out[rows] = F.scaled_dot_product_attention(one, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
        if len(self.rows):
            # The query heads that share a KV head stand where a prompt's positions would: one product, no copies of it.
            shared = q[self.rows].view(len(self.rows), self.shape.kv_heads, -1, self.shape.head_dim)
            k, v = (cached[self.context].transpose(1, 2) for cached in (keys, values))
            mask = self.mask[:, None, None].expand(-1, 1, shared.shape[2], -1)
            out[self.rows] = F.scaled_dot_product_attention(shared, k, v, attn_mask=mask).view(-1, *q.shape[1:])
        return out.view(len(q), -1)


class Layer:
    """One layer's weights, with the products that share their input joined into one."""

    def __init__(self, loader: "Loader", i: int) -> None:
        if loader.shape.family == "gpt2":
            place = f"h.{i}."
            self.norm1, self.norm2 = loader.norm(place + "ln_1"), loader.norm(place + "ln_2")
            self.qkv, self.out = loader.linear(place + "attn.c_attn"), loader.linear(place + "attn.c_proj")
            self.up, self.down = loader.linear(place + "mlp.c_fc"), loader.linear(place + "mlp.c_proj")
            self.q_norm = self.k_norm = None
            return
        place, attention = f"layers.{i}.", f"layers.{i}.self_attn."
        self.norm1, self.norm2 = loader.norm(place + "input_layernorm"), loader.norm(place + "post_attention_layernorm")
        self.qkv = loader.linear(*(attention + name for name in ("q_proj", "k_proj", "v_proj")))
        self.out = loader.linear(attention + "o_proj")
        self.up = loader.linear(place + "mlp.gate_proj", place + "mlp.up_proj")
        self.down = loader.linear(place + "mlp.down_proj")
        norms = loader.has(attention + "q_norm.weight")  # Qwen3
        self.q_norm = loader.norm(attention + "q_norm") if norms else None
        self.k_norm = loader.norm(attention + "k_norm") if norms else None


class Loader:
    """Takes weights by their names in the checkpoint, from which "model." and "transformer." are left out here."""

    def __init__(self, shape: Shape, tensors: Tensors, make: Maker, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.tensors, self.make, self.device, self.dtype = shape, tensors, make, device, dtype

    def full(self, name: str) -> str:
        return next((p + name for p in ("", "model.", "transformer.") if p + name in self.tensors.names), name)

    def has(self, name: str) -> bool:
        return self.full(name) in self.tensors.names

    def take(self, name: str) -> torch.Tensor:
        """UserError when its size is not what config.json says: the arithmetic would read beyond it."""
        if not self.has(name):
            raise UserError(f"{name} is missing in this checkpoint: fetch it again, or name another model.")
        found = self.tensors.take(self.full(name)).detach()
        size = self.shape.size_of(name)
        if tuple(found.shape) != size:
            raise UserError(
                f"{name} is {tuple(found.shape)} in this checkpoint, and {size} by its config.json: fetch it again, or "
                "name another model."
            )
        return found.to(self.device)

    def table(self, name: str) -> torch.Tensor:
        return self.take(name + ".weight").to(self.dtype)

    def linear(self, *names: str) -> Linear:
        """The matrices of these names as one, row below row. GPT-2 keeps its own the other way round: (in, out)."""
        weights = [self.take(name + ".weight") for name in names]
        if self.shape.family == "gpt2":
            weights = [weight.T for weight in weights]
        bias = torch.cat([self.take(name + ".bias") for name in names]) if self.has(names[0] + ".bias") else None
        return self.make(torch.cat(weights), bias)

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding table."""
        return self.shape.tied or not self.has("lm_head.weight")

    @property
    def embedding(self) -> str:
        """The table's name. Where it is also the head, a checkpoint holds it under either name."""
        return next(name for name in ("wte", "embed_tokens", "lm_head") if self.has(name + ".weight"))

    def head(self) -> Linear:
        """The output head: (vocabulary, hidden), in both families."""
        return self.make(self.take((self.embedding if self.tied else "lm_head") + ".weight"), None)

    def norm_weights(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = self.take(name + ".bias").to(self.dtype) if self.has(name + ".bias") else None
        return self.take(name + ".weight").to(self.dtype), bias

    def norm(self, name: str) -> Norm:
        (weight, bias), eps = self.norm_weights(name), self.shape.norm_eps
        if bias is not None:
            return lambda x: F.layer_norm(x, weight.shape, weight, bias, eps)
        return lambda x: rms_norm(x, weight, eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang and Sennrich 2019, arXiv 1910.07467. The mean in float32, whatever x is: short formats lose it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
