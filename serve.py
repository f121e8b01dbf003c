"""Day 4. The engine as a service that any OpenAI client can talk to.

Requests share the engine by continuous batching. Who cannot be served in time is told so at once, with the numbers; the
time of every answer is split into its parts, in its own Server-Timing header and in its usage; what the service does
lies open at /metrics, /health, /capacity and /debug/requests. Every option is also an environment variable
(LLM_INFER_PORT=8001); secrets belong there.

    make serve                            # or, in an environment with requirements-serve.txt installed:
    python3 serve.py                      # on http://127.0.0.1:8000; Ctrl-C finishes what runs, twice ends at once
    python3 serve.py --max-running 4      # fewer at once, each faster
    LLM_INFER_API_KEY=secret python3 serve.py --host 0.0.0.0
"""

from config import SERVE_PACKAGES, UserError, check_packages

if __name__ == "__main__":
    check_packages(*SERVE_PACKAGES, target="serve", requirements="requirements-serve.txt")

import gc
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any, TextIO

from lab import console
from lab.sampler import process_age_s
from metrics import number
from service import capacity
from service.app import make_app
from service.assembly import LogHandler, Model, assembled, on_passing_thread
from service.connections import enough_files
from service.memory import check_room, pool_bytes
from service.prompts import Prompts
from service.server import run
from service.settings import ServeConfig
from weights.find import find
from weights.room import rooms

# How long whoever computes in Python may keep the others waiting. The engine's thread asks for the interpreter after
# every pass through native code, and would wait up to Python's own 5 ms each time while others come and go. What that
# is worth is undecided (benchmarks/serve_interpreter.py).
SWITCH_S = 0.0005


def main() -> int:
    settings = ServeConfig.from_cli(__doc__)
    check(settings)
    log = opened(settings.log_file)
    house = on_passing_thread(lambda: assembled(settings, model_of(settings), log=log))
    for doubt in (check_room(rooms(), pool_bytes(house.about)), enough_files(settings.max_connections)):
        if doubt:
            console.warn(doubt)
    logging.basicConfig(handlers=[LogHandler(house.books.log)], level=logging.WARNING, force=True)
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not house.keys.hashes:
        console.warn(f"{settings.host} is open to others and no key is asked for: set LLM_INFER_API_KEY.")
    app = make_app(house)
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()  # what is loaded stays: the collector need not look through all of PyTorch while requests wait
    try:
        run(app, house, ready=lambda address: greet(address, house))
    except SystemExit:  # uvicorn's way to say that the port is taken
        raise taken(settings.host, settings.port, "somebody was faster") from None
    if not house.serving.bridge.stop():
        os._exit(1)  # a step that hangs cannot be ended otherwise
    return 0


def check(settings: ServeConfig) -> None:
    """What can be seen to fail before the model is loaded, which may take minutes. UserError."""
    settings.keys()
    settings.check_tracing()
    host, port = settings.host, settings.port
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise taken(host, port, (error.strerror or str(error)).partition(" (")[0]) from error


def taken(host: str, port: int, why: str) -> UserError:
    return UserError(f"Port {port} of {host} cannot be had ({why}): name another one with --port or --host.")


def model_of(settings: ServeConfig) -> Model:
    """Find and load it, and measure what it does here unless that is known. UserError."""
    from engine.load import load  # here: they load torch, for which --help and a wrong word need not wait
    from lab.card import cpu_model, versions

    checkpoint = find(settings.model)
    if checkpoint.folder is None:
        raise UserError(f"{checkpoint.name} has no tokenizer, which a service needs: name another model.")
    prompts = Prompts(checkpoint.folder)
    loaded = load(settings, prompts.decode, checkpoint)
    about = loaded.about | {"torch": versions()["torch"], "threads": settings.threads}
    rates, _ = capacity.known(loaded.new_engine, settings.max_running, about, cpu_model())
    return Model(loaded.new_engine, prompts, rates, about)


def opened(log_file: str | None) -> TextIO:
    try:
        return Path(log_file).open("a", encoding="utf-8") if log_file else sys.stderr
    except OSError as error:
        raise UserError(f"--log-file {log_file} cannot be written ({error.strerror}): name another one.") from error


def greet(address: str, house: Any) -> None:
    """The newcomer's first screen."""
    found, about = house.watch.capacity(), house.about
    path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": "What is a KV cache?"}]}
    hint = [f"  open {address} in a browser to talk to it, or paste:"] if house.serving.settings.page else []
    if house.serving.prompts.template is None:
        path, asked = "/v1/completions", {"prompt": "A KV cache is"}
        hint = ["  it has no chat template: it continues texts and cannot chat (--model smollm2 can)"]
    body = {"model": house.name, "max_tokens": 40} | asked
    key = ' -H "Authorization: Bearer $LLM_INFER_API_KEY"' if house.keys.hashes else ""
    lines = [
        f"{house.name} ({about['kernel']}, weights {about['weights']}, context {found['context']:,}) at {address}",
        f"  {found['slots']} slots, {found['queue']} places in the queue, longest wait {found['max_wait_s']:g} s",
        f"  measured here: {number(found['decode_tokens_per_s_alone'])} tokens/s for one answer, "
        f"{number(found['decode_tokens_per_s'])} for {found['slots']} together, prompts at "
        f"{number(found['prefill_tokens_per_s'])} tokens/s",
        f"  ready {process_age_s():.1f} s after the start; Ctrl-C ends it",
        *hint,
        "",
        f"curl {address}{path}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'",
    ]
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    console.run(main)
