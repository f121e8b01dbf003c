"""A GGUF file, dequantised once into a safetensors folder in the user's cache.

transformers reads GGUF, but takes 20 s for a 135M model. The folder it is turned into loads in a tenth of a second.
The conversion happens in a folder of its own, under a lock, and is moved into place when it is whole: a killed
conversion leaves nothing that looks finished, and two processes that start together convert once.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from filelock import FileLock

from config import UserError, cache_dir

FORMAT = 1  # raise it when a conversion of this file would come out differently
MANIFEST = "converted.json"


def converted(gguf: Path) -> Path:
    """The folder with the float32 weights and the tokenizer of this .gguf file; made when missing or damaged."""
    check_magic(gguf)
    folder = cache_dir() / "gguf" / f"{gguf.stem}-{fingerprint(gguf)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                convert(gguf, folder)
    except OSError as error:
        raise UserError(
            f"{gguf.name} could not be converted into {folder.parent} ({error.strerror}): make room there, or set "
            "LLM_INFER_CACHE to another folder."
        ) from error
    return folder


def check_magic(gguf: Path) -> None:
    try:
        with gguf.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{gguf} cannot be read ({error.strerror}): check the path.") from error
    if magic != b"GGUF":
        raise UserError(f"{gguf} is not a GGUF file (it begins with {magic!r}): check the path or download it again.")


def fingerprint(gguf: Path) -> str:
    """Twelve hex digits of the file's size, its first MiB (names, shapes) and its last (weights)."""
    size = gguf.stat().st_size
    with gguf.open("rb") as file:
        head = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        tail = file.read()
    return hashlib.sha256(f"{FORMAT} {size} ".encode() + head + tail).hexdigest()[:12]


def is_whole(folder: Path) -> bool:
    """Whether every file that the conversion wrote is there in its full size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def convert(gguf: Path, folder: Path) -> None:
    print(f"converting {gguf.name} to float32, once (about 20 s for 135M parameters) ...", file=sys.stderr)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        dequantise(gguf, unfinished)
        sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
        (unfinished / MANIFEST).write_text(json.dumps(sizes, indent=1))
        os.replace(unfinished, folder)
    except OSError:
        raise
    except Exception as error:  # the GGUF reader raises whatever its parsing meets in a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{gguf} is damaged or of a kind that transformers cannot read ({reason}).") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def dequantise(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and float32 weights as a checkpoint folder that from_pretrained() reads."""
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors  # this bar does not ask the line above
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    net = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    folder.mkdir(parents=True)
    # transformers calls the model "quantised with gguf" and will not save it, though its weights are plain by now.
    if hasattr(net.config, "quantization_config"):
        del net.config.quantization_config
    net.config.dtype = torch.float32
    net.config.save_pretrained(folder)
    net.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_model(net, str(folder / "model.safetensors"), metadata={"format": "pt"})  # a tied head is stored once
