"""vLLM's CPU build as a server, no prefix cache.

python vllm_server.py FOLDER THREADS bfloat16|float32 PORT
"""

import os
import runpy
import sys
from pathlib import Path

from vllm_cpu import ENVIRONMENT, with_embedding


def main() -> None:
    folder, threads, form, port = sys.argv[1:]
    os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": threads})
    options = {
        "model": str(with_embedding(Path(folder))), "served-model-name": "vllm", "dtype": form, "host": "127.0.0.1",
        "port": port, "max-model-len": "2048", "max-num-seqs": "32",
    }  # fmt: skip
    sys.argv[1:] = [f"--{name}={value}" for name, value in options.items()] + ["--no-enable-prefix-caching"]
    # Not `vllm serve`: it asks for the metadata of a package named vllm, and this one is vllm-cpu.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
