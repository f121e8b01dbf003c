"""Texts of a wanted length in tokens: exact with the model's tokenizer, about right without one."""

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from config import UserError
from lab.prompts import questions

# Ordinary words of one or two syllables, so that most tokenizers have a token for most of them.
WORDS = sorted({word for line in questions() for word in re.findall(r"\b[a-z]{2,7}\b", line)})
TOKENS_PER_WORD = 1.1  # of such words in vocabularies of 30,000 tokens and more
FILLERS = ("", " a", " a a", ".", " a.", "!", "..", "a", "\n", " ")
MOST_DROPPED = 8


def words(seed: str) -> Iterator[str]:
    """Words in an order that the seed gives, without an end."""
    chance = random.Random(seed)
    while True:
        yield chance.choice(WORDS)


class Counted:
    """The tokenizer of a model's folder. special: whether the server adds its special tokens to a text like this one.

    It does so for completions, and there they count; what a chat template adds is known to the server only.
    """

    def __init__(self, folder: str | Path, special: bool) -> None:
        file = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
        try:
            data = file.read_bytes()
            self.core = tokenizers.Tokenizer.from_buffer(data)
        except OSError as error:
            raise UserError(
                f"The tokenizer {file} cannot be read ({error.strerror}): name a folder that holds tokenizer.json."
            ) from error
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{file} is no tokenizer ({error}): name a folder that holds tokenizer.json.") from error
        self.core.no_padding()  # some files bring their own, which would change every length
        self.core.no_truncation()
        self.special, self.digest = special, hashlib.sha256(data).hexdigest()[:12]

    def ids(self, text: str) -> list[int]:
        return self.core.encode(text, add_special_tokens=self.special).ids

    def count(self, text: str) -> int:
        """Tokens of a piece of an answer: without those that begin a text."""
        return len(self.core.encode(text, add_special_tokens=False).ids)

    def pool(self) -> list[int]:
        """Ids that plain text is made of: none of them ends an answer or begins a message."""
        return sorted({i for word in WORDS for i in self.core.encode(f" {word}", add_special_tokens=False).ids})

    def text(self, start: str, seed: str, tokens: int) -> str:
        """start, then words, tokens long together. A start that is too long is cut. UserError where there is none."""
        least = len(self.ids(""))
        if tokens <= least:
            raise UserError(f"A prompt of {tokens} tokens cannot be: this tokenizer adds {least} to every text.")
        cut = self.cut(start, words(seed), tokens)
        for shorter in range(MOST_DROPPED):
            for filler in FILLERS:
                text = cut[: len(cut) - shorter] + filler
                if len(self.ids(text)) == tokens:
                    return text
        raise UserError(f"No text of exactly {tokens} tokens was found for this tokenizer: try another length.")

    def cut(self, start: str, stream: Iterator[str], tokens: int) -> str:
        """A text that reaches the wanted length, cut behind its last token. Encoded again it may be one off."""
        text = start
        while len((found := self.core.encode(text, add_special_tokens=self.special)).ids) < tokens:
            text += "".join(f" {next(stream)}" for _ in range(tokens))
        ends = [end for _, end in found.offsets]
        return text[: max(ends[:tokens])]


def about(start: str, seed: str, tokens: int) -> str:
    """start, then as many words as make about so many tokens."""
    stream = words(seed)
    rest = round((tokens - len(start) / 2) / TOKENS_PER_WORD)  # a start of hex digits: about two to a token
    return " ".join([start, *(next(stream) for _ in range(rest))])
