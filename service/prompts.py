"""Messages to token ids, on threads of their own: the event loop goes on while a long text is tokenised.

What a client writes is text, never control: special tokens in it (<|im_end|> and the like) are encoded letter by
letter, so that nobody can end his own message and begin the system's.
"""

import asyncio
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from config import UserError
from service.errors import invalid
from service.schemas import ChatRequest, CompletionRequest

THREADS = 2
LEAST_SLOPE, MOST_SLOPE = 0.1, 1.1  # tokens of a byte: ten bytes each, or one and what is escaped
USUAL = ((0.0, 8.0), (400.0, 108.0))  # bytes and tokens of ordinary text: four bytes a token, and what is around it
LITTLE = 0.02  # that counts in the end
REMEMBERED = 0.98  # of what was counted, with each prompt: the last fifty say how many tokens a text has
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")  # for templates


class Guess:
    """Tokens of a text by its bytes, before anybody has counted them: a straight line through those that were counted
    lately, and through what is usual. (A template adds a constant; languages differ in the slope.)
    """

    def __init__(self) -> None:
        self.sums = [0.0] * 5  # of 1, bytes, tokens, bytes², bytes · tokens
        for size, tokens in USUAL:
            self.learn(size, tokens, 1.0)
        self.usual = [total * LITTLE for total in self.sums]  # for ever: two texts at least that differ in length

    def learn(self, size: float, tokens: float, remembered: float = REMEMBERED) -> None:
        terms = (1.0, size, tokens, size * size, size * tokens)
        self.sums = [total * remembered + term for total, term in zip(self.sums, terms, strict=True)]

    def tokens(self, size: int) -> int:
        count, x, y, xx, xy = (a + b for a, b in zip(self.sums, self.usual, strict=True))
        slope = min(max((count * xy - x * y) / (count * xx - x * x), LEAST_SLOPE), MOST_SLOPE)
        return max(round((y - slope * x) / count + slope * size), 1)


class Prompts:
    """The tokenizer and the chat template that lie in a checkpoint's folder, without loading transformers for them."""

    def __init__(self, folder: Path) -> None:
        try:
            self.core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(
                f"{folder} holds no tokenizer.json that can be read ({error}): the service needs it beside the weights."
            ) from error
        self.guesses = {ChatRequest: Guess(), CompletionRequest: Guess()}
        self.literal = tokenizers.Tokenizer.from_str(self.core.to_str())
        self.literal.encode_special_tokens = True
        self.added = self.core.get_added_tokens_decoder()
        special = [token.content for token in self.added.values() if token.special]
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None
        self.longest = max((len(name.encode()) for name in self.core.get_vocab()), default=1)  # bytes of a token
        self.byte_level = "ByteLevel" in str(self.core.decoder)
        settings = read_json(folder / "tokenizer_config.json")
        named = {name: text_of(settings.get(name)) for name in NAMED}
        self.names = {name: text for name, text in named.items() if text is not None}  # the others stay undefined
        self.template = compiled(template_text(folder, settings))
        self.pool = ThreadPoolExecutor(THREADS, "tokenize")

    def decode(self, ids: Sequence[int]) -> str:
        return self.core.decode(ids, skip_special_tokens=True)

    def estimate(self, asked: ChatRequest | CompletionRequest) -> int:
        """Tokens of the prompt, before anybody has counted them."""
        if isinstance(asked, CompletionRequest) and not isinstance(asked.prompt, str):
            return len(asked.prompt)
        return self.guesses[type(asked)].tokens(size_of(asked))

    def surely_longer_than(self, asked: ChatRequest | CompletionRequest, tokens: int) -> bool:
        """Whether no tokenizer need be asked: even its longest tokens would be more than that."""
        if isinstance(asked, CompletionRequest) and not isinstance(asked.prompt, str):
            return len(asked.prompt) > tokens
        return size_of(asked) > tokens * self.longest

    def token(self, token: int) -> tuple[str, bytes]:
        """What one token reads as, and its bytes: a character may be spread over several tokens."""
        if token in self.added:
            found = self.added[token].content.encode()  # as it stands
        else:
            found = bytes_of(self.core.id_to_token(token) or "", self.byte_level)
        return found.decode(errors="replace"), found

    async def ids(self, asked: ChatRequest | CompletionRequest) -> list[int]:
        """ApiError 400 when the template does not take these messages."""
        if isinstance(asked, CompletionRequest) and not isinstance(asked.prompt, str):
            return list(asked.prompt)
        ids = await asyncio.get_running_loop().run_in_executor(self.pool, self.encode, asked)
        self.guesses[type(asked)].learn(size_of(asked), len(ids))
        return ids

    def encode(self, asked: ChatRequest | CompletionRequest) -> list[int]:
        typed = Typed(self.special)
        if isinstance(asked, CompletionRequest):
            return self.joined(typed.taken_out(asked.prompt), typed, add_special=True)
        roles = {"developer": "system"}
        messages = [
            {"role": roles.get(message.role, message.role), "content": typed.taken_out(message.text)}
            for message in asked.messages
        ]
        return self.joined(self.rendered(messages), typed)

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        if self.template is None:
            raise invalid("This model has no chat template: use /v1/completions.", "messages", "unsupported_parameter")
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self.names
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise invalid(
                f"The model's chat template does not take these messages: {str(error)[:300]}.", "messages"
            ) from error

    def joined(self, text: str, typed: "Typed", add_special: bool = False) -> list[int]:
        """The ids of a text, with what was taken out encoded as the letters that it is."""
        pieces = typed.split(text)
        ids = self.encoded(self.core, pieces[0], add_special)
        for number, rest in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += self.encoded(self.literal, typed.found[int(number)])
            ids += self.encoded(self.core, rest)
        return ids

    def encoded(self, core: tokenizers.Tokenizer, text: str, add_special: bool = False) -> list[int]:
        # As a batch of one: that lets go of Python's lock while it works, and encode() does not.
        return core.encode_batch([text], add_special_tokens=add_special)[0].ids if text or add_special else []


class Typed:
    """The special tokens that clients typed, each replaced by a mark that nobody can guess."""

    def __init__(self, special: re.Pattern[str] | None) -> None:
        self.special, self.mark, self.found = special, secrets.token_hex(8), []

    def taken_out(self, text: str) -> str:
        return self.special.sub(self.marked, text) if self.special else text

    def marked(self, match: re.Match[str]) -> str:
        self.found.append(match[0])
        return f"{self.mark}-{len(self.found) - 1};"

    def split(self, text: str) -> list[str]:
        """Text, number, text, number, …, text."""
        return re.split(rf"{self.mark}-(\d+);", text) if self.found else [text]


def size_of(asked: ChatRequest | CompletionRequest) -> int:
    """Bytes of all its texts."""
    return sum(len(text.encode()) for text in asked.texts)


def bytes_of(name: str, byte_level: bool) -> bytes:
    """The bytes behind a token's name in a vocabulary: byte-level as GPT-2 writes it, else as SentencePiece does."""
    if byte_level and all(letter in BYTE_OF for letter in name):
        return bytes(BYTE_OF[letter] for letter in name)
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("\u2581", " ").encode()


def byte_letters() -> dict[str, int]:
    """GPT-2's letter for every byte: printable ones stand for themselves, the others for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = byte_letters()


def template_text(folder: Path, settings: Mapping[str, Any]) -> str | None:
    own = folder / "chat_template.jinja"
    if own.exists():
        return own.read_text(encoding="utf-8")
    said = settings.get("chat_template")
    if isinstance(said, list):  # several, by name
        said = next((one["template"] for one in said if one["name"] == "default"), None)
    return said


class Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant said, for those who train on it: here only its text counts."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compiled(text: str | None) -> jinja2.Template | None:
    """As transformers does it: a sandbox, since the template comes with the checkpoint. UserError."""
    if text is None:
        return None

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    extensions = [jinja2.ext.loopcontrols, Generation]
    house = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    house.filters["tojson"] = tojson
    house.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return house.from_string(text)
    except jinja2.TemplateError as error:
        raise UserError(
            f"The model's chat template cannot be read ({error}): mend it, or name another model."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def text_of(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
