"""The choices a run depends on, and the command line made from them.

Every number that can change a result is a field of a frozen dataclass, with its help text and its unit. The command
line is made from the fields, so that the two cannot disagree. Scripts extend Config in their own file.
This module holds wishes only ("auto"); model.resolve() decides which device and dtype really run.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing import Self  # not in Python 3.10, which check_packages() turns away in a sentence

MODEL_NAME = "distilgpt2"
DEVICE = "auto"  # cuda, else mps, else cpu
DTYPE = "auto"  # float32 on a CPU; bfloat16 or float16 on a GPU
PROMPT = "Explain why batching improves GPU utilization."
MAX_NEW_TOKENS = 50
LONGEST_WINDOW_MS = 3.6e6  # an hour

ROOT = Path(__file__).resolve().parent
SERVE_PACKAGES = ("fastapi", "uvicorn", "httptools", "orjson", "pydantic", "prometheus_client", "tokenizers", "jinja2",
                  "cachetools")  # fmt: skip
PACKAGES = ("torch", "transformers", "numpy", "scipy", "tabulate", "psutil", "pynvml", "gguf", "tqdm", "filelock")


class UserError(Exception):
    """Something the user can put right. Its text is one sentence: what was wrong, and what to do. Exit status 2."""


def knob(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a Config.

    Metadata: quick = its value under --quick; env = the environment variable that sets it; choices = the allowed
    words; least, most = the allowed numbers; flags = {flag: value} for words that are flags of their own;
    positional = it stands without a flag, and optional may be left out; flag = another flag than its name's;
    optional_text = the flag may stand without a value; secret = no record and no page may show it.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Settings:
    """Fields that check themselves and make a command line. Knows no field of its own.

    env_prefix: where given, every field can be set by the environment variable of that prefix and its name.
    """

    env_prefix: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata.get("least")
            if least is not None and not value >= least:
                raise UserError(f"--{dashed(f.name)} must be at least {least}, and is {value}.")
            if "most" in f.metadata and value > f.metadata["most"]:
                raise UserError(f"--{dashed(f.name)} must be at most {f.metadata['most']}, and is {value}.")
            if value is not None and value not in f.metadata.get("choices", (value,)):
                raise UserError(
                    f"{flag_or_env(f)} must be one of {', '.join(f.metadata['choices'])}, and is {value!r}."
                )

    @classmethod
    def from_cli(cls, doc: str, argv: list[str] | None = None) -> "Self":
        """The values given on the command line, else in the environment, else --quick's, else the defaults."""
        given = vars(parser_of(cls, doc).parse_args(argv))
        for f in fields(cls):
            env = f.metadata.get("env") or (cls.env_prefix and cls.env_prefix + f.name.upper())
            if env and f.name not in given and os.environ.get(env):
                given[f.name] = from_environment(f, env)
            if given.get("quick") and f.name not in given and "quick" in f.metadata:
                given[f.name] = f.metadata["quick"]
        return cls(**cls.completed(given))

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The given values, with those that follow from them."""
        return given


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Which model, and where it runs."""

    model: str | None = knob(
        None,
        f"hub id, local folder, .gguf file, smollm2 (embedded), or random:ID (default: {MODEL_NAME}, and smollm2 "
        "where the hub cannot be reached)",
        env="LLM_INFER_MODEL",
    )
    device: str = knob(
        DEVICE, "auto = cuda, else mps, else cpu", env="LLM_INFER_DEVICE", choices=("auto", "cuda", "mps", "cpu")
    )
    dtype: str = knob(
        DTYPE,
        "number format of weights and cache; auto = float32 on a CPU",
        env="LLM_INFER_DTYPE",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    attention: str = knob(
        "sdpa", "attention kernel: PyTorch's fused one, or plain matrix products", choices=("sdpa", "eager")
    )
    threads: int = knob(0, "CPU threads for the arithmetic; 0 = PyTorch's own choice", least=0)
    seed: int = knob(0, "seed of random weights and of every random choice", least=0, most=2**63 - 1)
    quick: bool = knob(False, "a first look: fewer runs and tokens, wider intervals")


@dataclass(frozen=True)
class Recorded(Settings):
    """Where the record of a run goes."""

    json: str | None = knob(None, "append the record to this file instead of results/; - prints it, and no tables")
    note: str | None = knob(None, "append a record to notes.md; TEXT goes under Observations", optional_text=True)
    notes_file: str = knob(str(ROOT / "notes.md"), "the file that --note appends to")


@dataclass(frozen=True)
class Config(Recorded, ModelConfig):
    """What every script asks that computes and measures."""

    recalibrate: bool = knob(False, "measure this machine's bandwidth and GEMM rate anew")


@dataclass(frozen=True)
class PromptConfig(Config):
    """What the scripts that send one prompt ask."""

    prompt: str = knob(PROMPT, "the text of the request")
    prompt_file: str | None = knob(None, "read the prompt from this UTF-8 file")
    template: str = knob(
        "auto",
        "how the prompt is sent; by default in the model's chat template if it has one",
        choices=("auto", "chat", "raw"),
        flags={"--chat": "chat", "--raw": "raw"},
    )
    max_new_tokens: int = knob(MAX_NEW_TOKENS, "new tokens at most; the first comes from prefill", least=1, quick=20)
    ignore_eos: bool = knob(False, "go on after the end-of-sequence token, for a fixed length")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt.strip():
            raise UserError("The prompt is empty: give --prompt TEXT or --prompt-file FILE with at least one word.")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise UserError("The prompt is no UTF-8 text: give it in UTF-8, or as a UTF-8 file with --prompt-file.")

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Reads --prompt-file, once: it may be a pipe."""
        if "prompt_file" not in given:
            return given
        if "prompt" in given:
            raise UserError("--prompt and --prompt-file exclude each other: give one of them.")
        try:
            return given | {"prompt": Path(given["prompt_file"]).read_text(encoding="utf-8-sig")}
        except OSError as error:
            raise UserError(
                f"--prompt-file {given['prompt_file']} cannot be read ({error.strerror}): check it."
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt-file {given['prompt_file']} is no UTF-8 text ({error.reason}).") from error


class OneSentenceParser(argparse.ArgumentParser):
    """argparse prints its usage, often a screenful, above the message. Here the message is the last and only line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists every option)\n")


def parser_of(cls: type[Settings], doc: str) -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=program(), description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in fields(cls):
        flag = f.metadata.get("flag", "--" + dashed(f.name))
        options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": help_of(f)}
        if "positional" in f.metadata:
            optional = {"nargs": "?", "default": f.default} if f.metadata.get("optional") else {}
            parser.add_argument(f.name, choices=f.metadata.get("choices"), help=f.metadata["help"], **optional)
        elif "flags" in f.metadata:
            group = parser.add_mutually_exclusive_group()
            for word_flag, value in f.metadata["flags"].items():
                text = f"{f.metadata['help']}: here as {value}"
                group.add_argument(word_flag, action="store_const", const=value, **{**options, "help": text})
        elif f.type is bool:
            parser.add_argument(flag, action="store_true", **options)
        elif f.metadata.get("optional_text"):
            parser.add_argument(flag, nargs="?", const="", metavar="TEXT", **options)
        else:
            number = f.type if f.type in (int, float) else str
            parser.add_argument(flag, type=number, metavar=metavar_of(f), **options)
    return parser


def program() -> str:
    """What the user typed, as usage and errors name it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name if spec is None else f"python3 -m {spec.name.removesuffix('.__main__')}"


def from_environment(f, env: str) -> Any:
    """The variable's text as the field's type. UserError."""
    text = os.environ[env]
    kind = f.type if f.type in (int, float, bool) else str
    try:
        return TRUTH[text.strip().lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        what = {bool: "1 or 0", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"The environment variable {env} must be {what}, and is {text!r}.") from error


TRUTH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


def help_of(f) -> str:
    extra = [f"default: {f.default}"] if f.default not in (None, False) and f.name != "notes_file" else []
    extra += [f"with --quick: {f.metadata['quick']}"] if "quick" in f.metadata else []
    extra += [f"environment: {f.metadata['env']}"] if "env" in f.metadata else []
    return (f.metadata["help"] + (f" ({'; '.join(extra)})" if extra else "")).replace("%", "%%")


def metavar_of(f) -> str:
    if "metavar" in f.metadata:
        return f.metadata["metavar"]
    if "choices" in f.metadata:
        return "{" + ",".join(f.metadata["choices"]) + "}"
    return {int: "N", float: "X"}.get(f.type, "FILE" if "file" in f.name or f.name == "json" else "TEXT")


def dashed(name: str) -> str:
    return name.replace("_", "-")


def flag_or_env(f) -> str:
    env = f.metadata.get("env")
    return f"--{dashed(f.name)}" + (f" (or {env})" if env else "")


def listed(text: str, flag: str, kind: type = int, least: float = 1, most: float = 1e9) -> list:
    """The numbers of a comma-separated value, each once, in the order given. UserError."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"{flag} takes numbers with commas between them, such as {flag} 1,4,8, not {text!r}."
        ) from error
    low = next((value for value in values if not value >= least), None)
    if low is not None:
        raise UserError(f"{flag} takes numbers of at least {least}, and {low} is among them.")
    if max(values) > most:
        raise UserError(f"{flag} takes numbers up to {most:g}, and {max(values)} is among them.")
    return list(dict.fromkeys(values))


def check_packages(*more: str, target: str = "run", requirements: str = "requirements.txt") -> None:
    """Leave with one sentence when this Python lacks the packages, or more of them that a script needs.

    Scripts call it before their own imports. target, requirements: how make and pip install them.

    Those take seconds: until lab.console.run() begins, Ctrl-C leaves at once and without a traceback.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if sys.version_info < (3, 11):  # noqa: UP036  (this line is for those below it)
        print(
            f"This is Python {sys.version.split()[0]}: 3.11 or newer is needed (make PYTHON=python3.12).",
            file=sys.stderr,
        )
        raise SystemExit(2)
    missing = [name for name in (*PACKAGES, *more) if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"This Python ({sys.executable}) lacks {', '.join(missing)}: type `make {target}`, or activate the "
            f"environment with `source .venv/bin/activate`, or `pip install -r {requirements}`.",
            file=sys.stderr,
        )
        raise SystemExit(2)


def cache_dir() -> Path:
    """Where converted models and this machine's ceilings are kept between runs. LLM_INFER_CACHE moves it."""
    base = os.environ.get("LLM_INFER_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(base) if base else home / "llm-infer-baseline"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache folder {path} cannot be made ({error}): set LLM_INFER_CACHE to another.") from error
    return path


def keep(path: Path, text: str) -> None:
    """Write a small file of the cache in one step. A cache that cannot be written costs time at the next start only."""
    scratch = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        scratch.write_text(text)
        os.replace(scratch, path)
