"""vLLM's own load generator against any server.

python vllm_load.py URL MODEL TOKENIZER_FOLDER CLIENTS REQUESTS PROMPT NEW FOLDER   # writes FOLDER/result.json
"""

import argparse
import os
import sys

from vllm_cpu import ENVIRONMENT


def main() -> None:
    os.environ.update(ENVIRONMENT)
    url, model, tokenizer, clients, requests, prompt, new, folder = sys.argv[1:]
    # Not `vllm bench serve`: it asks for the metadata of a package named vllm, and this one is vllm-cpu.
    from vllm.benchmarks import serve

    options = {
        "backend": "openai", "base-url": url, "endpoint": "/v1/completions", "model": model, "tokenizer": tokenizer,
        "dataset-name": "random", "random-input-len": prompt, "random-output-len": new, "num-prompts": requests,
        "max-concurrency": clients, "percentile-metrics": "ttft,tpot,itl,e2el", "result-dir": folder,
        "result-filename": "result.json", "seed": "0",
    }  # fmt: skip
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    given = [f"--{name}={value}" for name, value in options.items()]
    given += ["--ignore-eos", "--save-result", "--disable-tqdm"]
    serve.main(parser.parse_args(given))


if __name__ == "__main__":
    main()
