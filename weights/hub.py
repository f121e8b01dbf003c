"""A checkpoint from a model hub, through huggingface_hub: the local cache first, then one short knock, then a download.

huggingface_hub would retry for minutes where a network is down. So one small request must answer within five seconds,
or the hub counts as unreachable. A download that has begun is never cut while it delivers.
"""

import errno
import json
import sys
import threading
import time
from pathlib import Path

from config import UserError, cache_dir, keep

ANSWER_WITHIN_S = 5.0
SILENCE_S = 10.0  # between two bytes, once the hub has answered; huggingface_hub's own limit for files
REMEMBER_FAILURE_S = 3600.0
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]


class HubUnreachable(Exception):
    """No answer in time. Another model, or another hour, may still work."""


def cached(repo: str) -> Path | None:
    """The folder of an earlier download, or None when there is none or it is not whole."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, allow_patterns=FILES, local_files_only=True))
    except Exception:  # the library's kind of "not found", which differs between its versions
        return None
    return folder if has_weights(folder) else None


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a configuration and every file of its safetensors weights."""
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        return (folder / "config.json").is_file() and all((folder / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def download(repo: str) -> Path:
    """Fetch a checkpoint. HubUnreachable, or UserError when the hub answers that there is no such model."""
    from huggingface_hub import get_session, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    knock(repo)
    hooks = get_session().event_hooks["request"]
    if limit_silence not in hooks:
        hooks.append(limit_silence)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(repo, allow_patterns=FILES, max_workers=2))
    except Exception as error:  # a connection that broke: the finished files stay
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise UserError(f"{repo} could not be stored ({error.strerror}): make room, or set HF_HOME.") from error
        refuse(repo, error)  # the record of a gated model is public, so that only its files are refused
        raise HubUnreachable(f"the download broke off ({type(error).__name__}: {first_line(error)})") from error
    if not has_weights(folder):
        raise UserError(f"{repo} offers no safetensors weights, the only kind that this kit loads: name another model.")
    return folder


def limit_silence(request) -> None:
    """A time limit where huggingface_hub sets none: it would wait for ever for the list of a model's files."""
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {phase: limit or SILENCE_S for phase, limit in limits.items()}


def knock(repo: str) -> None:
    """Ask the hub whether this model exists; give up after ANSWER_WITHIN_S.

    In a thread of its own, because looking up a host name has no time limit that a program could set.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(repo, timeout=ANSWER_WITHIN_S)
            outcome.append(None)
        except Exception as error:  # carried over to the asking thread
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_WITHIN_S)
    if not outcome:
        raise HubUnreachable(f"no answer within {ANSWER_WITHIN_S:.0f} s")
    if (error := outcome[0]) is not None:
        refuse(repo, error)
        raise HubUnreachable(first_line(error))


def refuse(repo: str, error: Exception) -> None:
    """UserError where this error is the hub's answer about the model, and not a failure on the way to the hub."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        raise UserError(
            f"{repo} asks for your consent on the hub first: accept its terms there and set HF_TOKEN."
        ) from error
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        raise UserError(
            f"{repo} is no folder, .gguf file or known model of the hub: check the name, or use smollm2."
        ) from error


def failed_lately() -> str | None:
    """Why the hub could not be reached within the last hour, or None. Kept per hub address."""
    try:
        note = json.loads(failure_note().read_text())
        recent = 0 <= time.time() - note["at"] < REMEMBER_FAILURE_S
        return note["why"] if recent and note["hub"] == endpoint() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember_failure(why: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # a wish, which costs no wait and ends with the variable
        return
    note = {"hub": endpoint(), "at": time.time(), "why": why}
    keep(failure_note(), json.dumps(note))


def failure_note() -> Path:
    return cache_dir() / "hub-unreachable.json"


def endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
