"""The model: which device and number format it runs in, its two phases, and what each must cost.

One request is one prefill and then one decode_step per further token. Both are a forward pass through the same
network; they differ in how many tokens go in. prefill() reads the whole prompt at once and keeps the keys and values of
every token (past_key_values). decode_step() reads one token and finds the rest in that cache.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from config import ModelConfig, PromptConfig, UserError
from metrics import Stats, timed
from tokenizer import Tokenizer, left_pad, load_tokenizer
from weights.find import Checkpoint, find
from weights.load import load_net
from weights.place import Place, resolve, set_threads


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded network with what is known of it. The methods say what a phase must compute and read at the least."""

    net: PreTrainedModel
    place: Place
    attention: str
    name: str
    origin: str
    weights_hash: str
    timing_only: bool
    eos_ids: frozenset[int] = field(default_factory=frozenset)

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def context(self) -> int | None:
        """The longest sequence, prompt and new tokens together; None when the architecture names no limit."""
        return getattr(self.net.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def forward_takes(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.net.forward).parameters)

    def description(self) -> dict[str, Any]:
        """What records say of the model."""
        return {
            "name": self.name,
            "origin": self.origin,
            "hash": self.weights_hash,
            "timing_only": self.timing_only,
            "device": self.device.type,
            "dtype": self.place.dtype_name,
            "dtype_reason": self.place.dtype_reason,
            "attention": self.attention,
            "parameters": self.parameters,
            "context": self.context,
        }

    def stops(self, ignore_eos: bool) -> frozenset[int]:
        """The token ids that end an answer. Random weights never mean to stop: their length is fixed."""
        return frozenset() if ignore_eos or self.timing_only else self.eos_ids

    @property
    def vocabulary(self) -> int:
        return self.net.config.get_text_config().vocab_size

    # ---- what it must cost

    @cached_property
    def heads(self) -> tuple[int, int, int, int]:
        """(layers, attention heads, KV heads, head dimension)."""
        config = self.net.config.get_text_config()
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return config.num_hidden_layers, heads, kv_heads, head_dim

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def weight_bytes(self) -> int:
        """Bytes of all weights; tied ones counted once."""
        return sum(p.numel() * p.element_size() for p in self.net.parameters())

    def read_bytes(self, new_tokens: int, cached_tokens: int) -> int:
        """Least bytes one forward pass reads: every weight once, and every cached key and value once.

        Of an embedding table a pass reads only a row per token, unless the table is also the output head.
        """
        head = self.net.get_output_embeddings()
        tables = [m.weight for m in self.net.modules() if isinstance(m, torch.nn.Embedding)]
        unread = [t for t in tables if head is None or t is not head.weight]
        rows = sum(new_tokens * t.shape[1] * t.element_size() for t in unread)
        skipped = sum(t.numel() * t.element_size() for t in unread)
        return self.weight_bytes() - skipped + rows + cached_tokens * self.kv_bytes_per_token()

    def kv_bytes_per_token(self) -> int:
        """2 (key and value) * layers * KV heads * head dimension * bytes per number."""
        layers, _, kv_heads, head_dim = self.heads
        return 2 * layers * kv_heads * head_dim * self.place.dtype.itemsize

    def flops(self, new_tokens: int, cached_tokens: int, logits: int = 1) -> int:
        """FLOPs of one forward pass: a multiply and an add per weight and token, and attention's two products.

        Matrix weights: 2 * weights * new_tokens; the output head only for the positions whose logits are needed.
        Attention: token i looks at cached_tokens + i others, and each look is a dot product (2 * head_dim) and a
        weighted sum (2 * head_dim), per head and layer. (PaLM, arXiv 2204.02311, appendix B.)
        Mixture-of-experts networks compute a part of their weights only: for them this is too high.
        """
        layers, heads, _, head_dim = self.heads
        head = self.net.get_output_embeddings()
        head_weights = 0 if head is None else head.weight.numel()
        embeddings = {id(m.weight) for m in self.net.modules() if isinstance(m, torch.nn.Embedding)}
        embeddings |= set() if head is None else {id(head.weight)}
        matrices = sum(p.numel() for p in self.net.parameters() if p.ndim >= 2 and id(p) not in embeddings)
        looks = new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2
        return 2 * matrices * new_tokens + 2 * head_weights * logits + 4 * layers * heads * head_dim * looks


# ---- the two phases


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """logits (B, T, vocabulary) -> the likeliest token after the last position, (B, 1)."""
    return logits[:, -1].argmax(dim=-1, keepdim=True)


@torch.inference_mode()
def prefill(
    model: Model, ids: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None
) -> tuple[torch.Tensor, Any]:
    """Read the whole prompt: ids (B, T) -> the first new token (B, 1), and the cache of T tokens.

    mask (B, T), 1 = real token, is needed only where rows are padded (on the left). cache: an empty one to fill
    (static_cache); by default transformers makes one that grows.
    """
    given = {} if cache is None else {"past_key_values": cache}
    extra = given | last_only(model) | positions(model, mask, ids.shape[1])
    out = model.net(input_ids=ids, use_cache=True, **extra)
    return greedy(out.logits), out.past_key_values


@torch.inference_mode()
def recompute(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Read everything once more, (B, T) -> the next token (B, 1): a step without a cache. Nothing is kept."""
    return greedy(model.net(input_ids=ids, use_cache=False, **last_only(model)).logits)


def last_only(model: Model) -> dict[str, int]:
    """Only the last position's logits are wanted: the others would cost a matrix product and their memory."""
    return {"logits_to_keep": 1} if "logits_to_keep" in model.forward_takes else {}


def static_cache(model: Model, tokens: int) -> StaticCache:
    """A cache whose memory is taken now and once, for so many tokens: nothing is copied when a token is added."""
    cache = StaticCache(config=model.net.config, max_cache_len=tokens)
    _, _, kv_heads, head_dim = model.heads
    cache.early_initialization(1, kv_heads, head_dim, model.place.dtype, model.device)
    return cache


@torch.inference_mode()
def decode_step(model: Model, token: torch.Tensor, cache: Any, mask: torch.Tensor | None = None):
    """Read one token per row, (B, 1) -> the next token (B, 1), and the cache, now one token longer.

    mask (B, cached tokens + 1): the prompt's mask with a 1 appended for every new token, this one included.
    """
    out = model.net(input_ids=token, past_key_values=cache, use_cache=True, **positions(model, mask, 1))
    return greedy(out.logits), out.past_key_values


def positions(model: Model, mask: torch.Tensor | None, new_tokens: int) -> dict[str, torch.Tensor]:
    """Attention mask and position ids of the last new_tokens columns.

    A row's first real token has position 0, wherever the padding ends. Without this, short rows of a batch drift
    (tests/test_model.py compares padded with unpadded logits). Padded columns get 0: a valid position that no one sees.
    """
    if mask is None:
        return {}
    extra = {"attention_mask": mask}
    if "position_ids" in model.forward_takes:
        extra["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -new_tokens:]
    return extra


def generate(
    model: Model,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int | Sequence[int],
    eos_ids: frozenset[int] = frozenset(),
    stats: Stats | None = None,
) -> list[list[int]]:
    """Greedy generation: ids (B, T) -> each row's new tokens, its end token included.

    max_new_tokens: one limit for all rows, or one per row. A row that has ended leaves the batch: the steps after it
    neither compute nor read anything for it. With stats, every phase is timed into stats["prefill"], stats["decode"]
    and, where rows left, stats["drop_rows"], the copying that this costs.
    """
    clock: Callable[[str], AbstractContextManager] = nullcontext if stats is None else partial(timed, stats=stats)
    limits = [max_new_tokens] * len(ids) if isinstance(max_new_tokens, int) else max_new_tokens
    answers: list[list[int]] = [[] for _ in ids]
    rows = list(range(len(ids)))  # whose answer each row of the batch goes to
    with clock("prefill"):
        token, cache = prefill(model, ids, mask)
    while True:
        for row, new in zip(rows, token[:, 0].tolist(), strict=True):
            answers[row].append(new)
        going = [i for i, row in enumerate(rows) if len(answers[row]) < limits[row] and answers[row][-1] not in eos_ids]
        if not going:
            return answers
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            with clock("drop_rows"):
                token, cache, mask = keep_rows(token, cache, mask, going)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        with clock("decode"):
            token, cache = decode_step(model, token, cache, mask)


def keep_rows(token: torch.Tensor, cache: Any, mask: torch.Tensor | None, rows: Sequence[int]):
    """The batch with these rows only. The cache is copied once, so that no later step reads the others' part of it."""
    kept = torch.tensor(rows, device=token.device)
    cache.batch_select_indices(kept)
    return token[kept], cache, None if mask is None else mask[kept]


def generate_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    pad_id: int = 0,
    stats: Stats | None = None,
) -> list[list[int] | UserError]:
    """The new tokens of prompts of any lengths, computed together; float32: the same as each gets alone.

    A prompt that does not fit the model's context is refused and takes no part: its place holds the UserError.
    """
    answers: list[Any] = [refusal(model, prompt, max_new_tokens) for prompt in prompts]
    fitting = [i for i, refused in enumerate(answers) if refused is None]
    if fitting:
        padded, mask = left_pad([prompts[i] for i in fitting], pad_id)
        ids = ids_tensor(padded).to(model.device)
        seen = None if all(map(all, mask)) else ids_tensor(mask).to(model.device)  # nothing padded, nothing to mask
        new = generate(model, ids, seen, max_new_tokens=max_new_tokens, eos_ids=eos_ids, stats=stats)
        for i, tokens in zip(fitting, new, strict=True):
            answers[i] = tokens
    return answers


def refusal(model: Model, prompt: Sequence[int], new_tokens: int) -> UserError | None:
    try:
        return check_fits(model, len(prompt), new_tokens)
    except UserError as error:
        return error


def transformers_generate(
    model: Model,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    pad_id: int = 0,
) -> torch.Tensor:
    """What generate() above must equal: the new tokens of transformers' own greedy generate().

    A checkpoint's generation_config may ask for penalties even where nothing is sampled; they are switched off.
    """
    out = model.net.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(eos_ids) or None,
        pad_token_id=pad_id,
    )
    return out[:, ids.shape[1] :]


def kv_cache_layers(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The cache as (keys, values) per layer, each (B, KV heads, tokens, head dimension)."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def kv_cache_bytes(cache: Any) -> int:
    """Bytes that the cache's tensors hold."""
    return sum(t.numel() * t.element_size() for pair in kv_cache_layers(cache) for t in pair)


# ---- loading


def load_model(checkpoint: Checkpoint, config: ModelConfig, place: Place) -> Model:
    """The checkpoint's network on this device, in eval mode. UserError when it is broken or does not fit."""
    set_threads(config.threads)
    net, weights_hash = load_net(checkpoint, place.device, place.dtype, config.attention, config.seed)
    if not hasattr(net.config.get_text_config(), "num_attention_heads"):
        raise UserError(f"{checkpoint.name} has no attention and so no KV cache to look at: name a transformer.")
    if "past_key_values" not in inspect.signature(net.forward).parameters:
        raise UserError(f"{checkpoint.name} cannot keep a KV cache in transformers: name another model.")
    eos = net.generation_config.eos_token_id
    return Model(
        net=net.eval(),
        place=place,
        attention=config.attention,
        name=checkpoint.name,
        origin=checkpoint.origin,
        weights_hash=weights_hash,
        timing_only=checkpoint.timing_only,
        eos_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )


def load_pair(config: ModelConfig, template: str = "auto") -> tuple[Model, Tokenizer]:
    """The model and its tokenizer."""
    checkpoint, place = find(config.model), resolve(config)
    model = load_model(checkpoint, config, place)
    return model, load_tokenizer(checkpoint.folder, model.vocabulary if model.timing_only else None, template)


def load(config: PromptConfig) -> tuple[Model, Tokenizer, list[int]]:
    """Everything that a request needs: the model, its tokenizer, and the prompt's ids, which fit the context."""
    model, tokenizer = load_pair(config, config.template)
    ids = tokenizer.encode(config.prompt)
    check_fits(model, len(ids), config.max_new_tokens)
    return model, tokenizer, ids


def check_fits(model: Model, prompt_tokens: int, new_tokens: int) -> None:
    """UserError when the prompt and the new tokens together exceed the model's context."""
    if model.context is not None and prompt_tokens + new_tokens > model.context:
        raise UserError(
            f"The prompt has {prompt_tokens} tokens and {new_tokens} new ones are asked for, but {model.name} has a "
            f"context of {model.context}: shorten the prompt"
            + (" or lower --max-new-tokens." if prompt_tokens < model.context else ".")
        )


def ids_tensor(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Token ids as the tensor that the network takes, (B, T), on the host."""
    return torch.tensor(rows, dtype=torch.long)
