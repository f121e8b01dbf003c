"""Servers that are started here to be looked at: this kit's, transformers serve, llama-server. Each with one model.

All of them hold SmolLM2-135M-Instruct, the model that is installed with this kit, with four answers at once where they
can be told so. Others live in environments of their own: see benchmarks/peers/install.sh.
"""

import atexit
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ROOT, UserError
from conformance.target import Target
from conformance.wire import Hung, Reply
from weights import tiny
from weights.find import EMBEDDED, embedded, embedded_gguf

PEERS = ROOT / ".peers"
START_S = 300.0
SLOTS = 4
QUICK_CONTEXT = 8192
KEYS = ("sk-the-first-key-of-two", "sk-the-second-key-of-two")
IGNORE_EOS = {"ignore_eos": True}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(
    undo: ExitStack, name: str, command: Sequence[str | Path], port: int, **environment: str
) -> subprocess.Popen:
    """Its process, once it answers 200 at /health. undo ends it, also where it never does. UserError."""
    try:
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | environment,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{name} cannot be started: {command[0]} by hand tells why ({error.strerror}).") from error
    undo.callback(ended, process)
    begin = time.monotonic()
    while time.monotonic() - begin < START_S:
        if process.poll() is not None:
            raise UserError(
                f"{name} ended with status {process.returncode} before it served: {command[0]} by hand tells why."
            )
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                connection.close()
                return process
        connection.close()
        time.sleep(0.1)
    raise UserError(f"{name} did not serve within {START_S:.0f} s.")


def ended(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def asked(port: int, path: str, key: str | None = None) -> Any:
    """The JSON at this path."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        return json.load(connection.getresponse())
    finally:
        connection.close()


def first_model(name: str, port: int, key: str) -> str:
    """What it calls its model. UserError."""
    try:
        return asked(port, "/v1/models", key)["data"][0]["id"]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{name} serves, but names no model at /v1/models: ask it by hand.") from error


@dataclass(frozen=True)
class Weights:
    """The model that all of them serve. name: as serve.py is told it. gguf: the same as one file, if there is one."""

    name: str
    folder: Path
    gguf: Path | None

    @property
    def context(self) -> int:
        return json.loads((self.folder / "config.json").read_text())["max_position_embeddings"]


def weights(quick: bool) -> Weights:
    """SmolLM2-135M-Instruct; to be quick, a random one of next to nothing, made anew. UserError."""
    if quick:
        home = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, home, ignore_errors=True)  # until then any server may be started with it
        folder = tiny.checkpoint(home / "tiny", QUICK_CONTEXT)
        return Weights(str(folder), folder, None)
    folder = embedded().folder
    assert folder is not None  # the embedded model is real weights, never random ones
    return Weights(EMBEDDED, folder, embedded_gguf()[0])


def ours(model: Weights, requests_a_minute: int = 0, tokens_a_minute: int = 0) -> Target:
    """This kit's service, as a user starts it, with its default limits."""
    with ExitStack() as undo:
        port, keys = free_port(), Path(undo.enter_context(tempfile.TemporaryDirectory())) / "keys"
        keys.write_text("\n".join(KEYS))
        command = [sys.executable, "serve.py", "--model", model.name, "--port", port, "--api-keys-file", keys,
                   "--max-running", SLOTS, "--max-queued", SLOTS, "--log-file", os.devnull,
                   "--requests-per-minute", requests_a_minute, "--tokens-per-minute", tokens_a_minute]  # fmt: skip
        process = started(undo, "serve.py", command, port)
        name = first_model("serve.py", port, KEYS[0])
        return Target(
            "this service", ("127.0.0.1", port), name, KEYS, IGNORE_EOS, model.context, 2 * SLOTS, process,
            limited=lambda requests, tokens: ours(model, requests, tokens), close=undo.pop_all().close,
        )  # fmt: skip


def transformers(model: Weights, *options: str) -> Target:
    """transformers serve, pinned to the same weights as a folder. It knows neither keys nor limits nor ignore_eos."""
    name = "transformers serve" + ", continuous batching" * ("--continuous-batching" in options)
    program, port = PEERS / "transformers_serve/bin/transformers", free_port()
    with ExitStack() as undo:
        home = undo.enter_context(named_folder(model.folder))
        (hub := Path(home) / "home").joinpath("hub").mkdir(parents=True)  # a cache of models, without which it fails
        command = [program, "serve", home, "--device", "cpu", "--host", "127.0.0.1", "--port", port, *options]
        process = started(undo, name, command, port, HF_HUB_OFFLINE="1", HF_HOME=str(hub))
        return Target(
            name, ("127.0.0.1", port), home, (), {}, model.context, None, process, close=undo.pop_all().close
        )  # fmt: skip


def named_folder(folder: Path) -> tempfile.TemporaryDirectory:
    """The model with the name of its architecture in its config, which transformers serve asks for."""
    home = tempfile.TemporaryDirectory()
    for file in folder.iterdir():
        (Path(home.name) / file.name).symlink_to(file)
    config = Path(home.name) / "config.json"
    told = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps(told | {"architectures": ["LlamaForCausalLM"]}))
    return home


def llama_server(model: Weights) -> Target:
    """llama.cpp's server, with the embedded GGUF file as it is."""
    place = PEERS / "llama_cpp"
    found = (path for path in place.rglob("llama-server") if path.is_file() and os.access(path, os.X_OK))
    program, port = next(found, place / "llama-server"), free_port()
    # --no-repack: slower, but it starts where AMX is announced and cannot be used
    command = [program, "-m", model.gguf, "-np", SLOTS, "-c", SLOTS * model.context, "--host", "127.0.0.1",
               "--port", port, "--metrics", "--jinja", "--api-key", ",".join(KEYS),
               "--no-repack"]  # fmt: skip
    with ExitStack() as undo:
        process = started(undo, "llama-server", command, port, LD_LIBRARY_PATH=str(program.parent))
        name = first_model("llama-server", port, KEYS[0])
        return Target(
            "llama-server", ("127.0.0.1", port), name, KEYS, IGNORE_EOS, model.context, None, process,
            close=undo.pop_all().close,
        )  # fmt: skip


STARTS: dict[str, Callable[[Weights], Target]] = {
    "ours": ours,
    "transformers": transformers,
    "transformers-cb": lambda model: transformers(model, "--continuous-batching"),
    "llama-server": llama_server,
}
HOMES = {"transformers": "transformers_serve", "transformers-cb": "transformers_serve", "llama-server": "llama_cpp"}


def lacking(name: str, model: Weights | None = None) -> str | None:
    """A sentence where a server cannot be started here."""
    home = HOMES.get(name)
    if home is not None and not (PEERS / home / ".done").exists():
        return f"{name} is left out: it is not installed. Type benchmarks/peers/install.sh {home}."
    if name == "llama-server" and model is not None and model.gguf is None:
        return "llama-server is left out of a quick look: its model is a file of another kind."
    return None


def at(url: str, name: str | None, model: str | None, key: str | None) -> Target:
    """A server that somebody else started. UserError."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise UserError(f"--url {url} is no address such as http://127.0.0.1:8000: give one.")
    place = (parts.hostname, parts.port or 80)
    found = Target(name or parts.netloc, place, model or "", (key,) if key else ())
    try:
        reply = found.ask("/v1/models")
    except (Hung, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"Nothing answers at {url} ({why}): start it, or name another address.") from error
    card = card_of(reply, model)
    if not model and not card:
        raise UserError(f"{url}/v1/models names no model ({reply.status}): give --model, and --api-key.")
    context = card.get("max_model_len")  # vLLM's word, and this service's
    found.model, found.context = model or card["id"], context if isinstance(context, int) else None
    return found


def card_of(reply: Reply, model: str | None) -> dict[str, Any]:
    """What /v1/models tells of this model, or of its first one; empty where it tells nothing."""
    told = reply.json.get("data") if isinstance(reply.json, dict) else None
    cards = [one for one in told if isinstance(one, dict) and "id" in one] if isinstance(told, list) else []
    return next((one for one in cards if not model or one["id"] == model), {})
