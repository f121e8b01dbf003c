"""From a plan to the next tokens, with tensors: the one seam between deciding who runs and computing it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from engine.request import Choice, Request, Status
from engine.sampler import Sampler
from engine.scheduler import Slice
from engine.step import Step, layout

if TYPE_CHECKING:
    from model import Model  # it loads transformers, which takes seconds


class Network(Protocol):
    """A network with a cache in blocks: engine/transformer.py, or its native twin."""

    def forward(self, step: Step) -> torch.Tensor: ...

    def likeliest(self, logits: torch.Tensor) -> tuple[list[float], list[int]]: ...


class TorchRunner:
    """Lays the slices out, computes them in one forward pass, and chooses each next token."""

    def __init__(self, network: Network) -> None:
        self.network, self.sampler = network, Sampler()

    def run(self, slices: Sequence[Slice]) -> list[Choice | Exception | None]:
        with out_of_memory_named():
            logits = self.network.forward(layout(slices))
            likeliest = self.network.likeliest(logits)
        caught_up = [part.request for part in slices if part.last]
        chosen = iter(self.sampler.choose(logits, caught_up, likeliest))
        return [next(chosen) if part.last else None for part in slices]

    def forget(self, request: Request) -> None:
        self.sampler.forget(request)


class TransformersRunner:
    """Any architecture, through transformers' own forward and a cache of its own for each request, one by one.

    Slower: nothing is batched, and the blocks only count. Prefixes cannot be shared (Blocks(reuse=False)).
    """

    def __init__(self, model: "Model") -> None:
        self.model, self.sampler = model, Sampler()
        self.caches: dict[Request, Any] = {}

    @torch.inference_mode()
    def run(self, slices: Sequence[Slice]) -> list[Choice | Exception | None]:
        """Each slice by itself, so that its failure is its request's alone: halving a plan would save no memory."""
        for request in [request for request in self.caches if request.status is Status.WAITING]:
            del self.caches[request]  # preempted: its memory was taken
        return [self.one(part) for part in slices]

    def one(self, part: Slice) -> Choice | Exception | None:
        try:
            logits = self.forward(part)
        except Exception as error:
            return error
        return self.sampler.choose(logits, [part.request])[0] if part.last else None

    def forward(self, part: Slice) -> torch.Tensor:
        """The last token's logits, (1, vocabulary)."""
        if part.start == 0:  # new, or preempted and starting over
            self.caches.pop(part.request, None)
        ids = torch.tensor([part.request.tokens[part.start : part.start + part.count]], device=self.model.device)
        with out_of_memory_named():
            out = self.model.net(input_ids=ids, past_key_values=self.caches.get(part.request), use_cache=True)
        self.caches[part.request] = out.past_key_values
        return out.logits[:, -1].float()

    def forget(self, request: Request) -> None:
        self.caches.pop(request, None)
        self.sampler.forget(request)


class out_of_memory_named:
    """PyTorch reports too little memory as RuntimeErrors of two kinds. Python's name for it is MemoryError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(str(error).splitlines()[0]) from error
