"""Text to token ids and back. Everything here is lists of ints; tensors begin in model.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from config import UserError


class Codec(Protocol):
    """What this kit needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class BytesCodec:
    """One token per byte, for random weights when no tokenizer is installed: lengths are real, the words are not."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i % 256 for i in ids).decode(errors="replace")


class TransformersCodec:
    """A Hugging Face tokenizer behind the Codec face. decode() keeps the text exact: no spaces are tidied up."""

    def __init__(self, hf) -> None:
        self.hf = hf
        self.core = getattr(hf, "backend_tokenizer", None)  # none in tokenizers that are written in Python

    def encode(self, text: str) -> list[int]:
        return self.hf(text).input_ids

    def encode_chat(self, text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        return self.hf.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        if self.core is not None:  # the same result without the wrapper's checks: an engine decodes with every token
            return self.core.decode(ids, skip_special_tokens=True)
        return self.hf.decode(ids, clean_up_tokenization_spaces=False, skip_special_tokens=True)


@dataclass(frozen=True)
class Tokenizer:
    """codec does the work; pad_id fills short rows; template is "chat" or "raw"."""

    codec: Codec
    pad_id: int
    name: str
    template: str = "raw"

    def encode(self, text: str) -> list[int]:
        """Token ids of one prompt, inside the model's chat template where that was asked for."""
        return self.codec.encode_chat(text) if self.template == "chat" else self.codec.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.codec.decode(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds, in order. Joined, they are decode(ids).

        A token may end inside a UTF-8 character, so tokens are not decoded one by one: a piece that would end in
        U+FFFD waits for the token that completes it.
        """
        pieces, shown = [], ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[:end])
            complete = not text.endswith("\N{REPLACEMENT CHARACTER}") or end == len(ids)
            pieces.append(text[len(shown) :] if complete else "")
            shown = text if complete else shown
        return pieces


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of unequal length -> (ids, mask), both B x longest; mask is 1 on real tokens.

    The padding stands on the left: every row then ends in the same column, so that logits[:, -1] is each row's next
    token, and new tokens are appended to all rows at once.
    """
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return ids, mask


def load_tokenizer(folder: Path | None, vocabulary: int | None = None, template: str = "auto") -> Tokenizer:
    """The tokenizer that lies in a checkpoint's folder; bytes where folder is None or too large for the vocabulary.

    vocabulary: the model's number of token ids, given for random weights, whose tokenizer is borrowed.
    UserError when the folder holds none, or when a chat template is asked for and the tokenizer has none.
    """
    hf = None if folder is None else read_tokenizer(folder)
    if hf is None or (vocabulary is not None and len(hf) > vocabulary):
        return with_template(Tokenizer(BytesCodec(), pad_id=0, name="bytes"), template, has_chat=False)
    # GPT-2 has no padding token. Any id will do in its place: padded positions are masked and never read.
    pad_id = next(i for i in (hf.pad_token_id, hf.eos_token_id, hf.unk_token_id, 0) if i is not None)
    tokenizer = Tokenizer(TransformersCodec(hf), pad_id, name=type(hf).__name__)
    return with_template(tokenizer, template, has_chat=bool(getattr(hf, "chat_template", None)))


def with_template(tokenizer: Tokenizer, template: str, has_chat: bool) -> Tokenizer:
    if template == "chat" and not has_chat:
        raise UserError("This model has no chat template: leave --chat out, or use --raw.")
    word = "chat" if has_chat and template in ("auto", "chat") else "raw"
    return Tokenizer(tokenizer.codec, tokenizer.pad_id, tokenizer.name, word)


def read_tokenizer(folder: Path):
    from transformers import (
        AutoTokenizer,
    )  # here: it loads torch, which takes seconds, and tests of padding need none

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its parsers' own kinds here
        raise UserError(
            f"{folder} holds no usable tokenizer ({first_line(error)}): put tokenizer.json beside the weights, or "
            "name another model."
        ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
