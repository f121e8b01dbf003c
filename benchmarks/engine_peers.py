"""The engine against what one would otherwise install: llama.cpp, vLLM's CPU build, each in an environment of its own.

`make peers` installs them; one that is not there is left out. All take the same token ids, greedy, end tokens ignored,
and take turns in one run; a peer that is not at work is stopped, so that its threads do not spin beside another's.
"""

import contextlib
import json
import select
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.claim import Claim, rounds
from benchmarks.engine_speed import OFFLINE, OFFLINE_NEW, offline_prompts
from benchmarks.family import Family
from config import ROOT, PromptConfig, UserError
from engine import load as engine_load
from engine import native
from engine.request import Sampling
from engine.settings import EngineConfig
from lab.console import progress, warn
from lab.prompts import exact
from lab.verdict import interleaved, verdict
from model import ids_tensor, load_pair, transformers_generate
from weights.find import EMBEDDED, embedded_gguf, find

PEERS = ROOT / ".peers"
START_S = 600  # vLLM compiles for minutes the first time

Ask = Callable[[Sequence[list[int]], int], list[list[int]]]


class Peer(Family):
    """Another engine in a process of its own, spoken to by a line each way (benchmarks/peers/line.py)."""

    def __init__(self, name: str, command: Sequence[str | Path], seconds: float = START_S) -> None:
        self.name = name
        # A session of its own, so that its whole family can be stopped and ended together.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
            start_new_session=True,
        )  # fmt: skip
        try:
            self.version = self.reply(seconds)["version"]
        except BaseException:
            self.close()
            raise
        self.rest()

    def __call__(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        self.work()
        try:
            with contextlib.suppress(BrokenPipeError):  # it is gone: reply() says so
                self.process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
            return self.reply(START_S)["answers"]
        finally:
            self.rest()

    def reply(self, seconds: float) -> dict[str, Any]:
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            why = f"nothing for {seconds:.0f} s" if not ready else f"it ended with status {self.process.wait()}"
            raise UserError(f"{self.name} does not answer ({why}): run its program under benchmarks/peers by hand.")
        return json.loads(line)


def commands(config: PromptConfig, threads: int) -> dict[str, list[str | Path]]:
    """Name -> how to start it, for every peer that takes this model. Some take a GGUF file only, some never one."""
    here, folder = Path(__file__).with_name("peers"), find(config.model).folder
    llama = [PEERS / "llama_cpp/bin/python", here / "llama_cpp.py"]
    vllm = [PEERS / "vllm_cpu/bin/python", here / "vllm_cpu.py", folder, str(threads)]
    gguf = embedded_gguf()[0] if config.model == EMBEDDED else config.model
    found: dict[str, list[str | Path]] = {}
    if str(gguf).endswith(".gguf"):
        found |= {f"llama.cpp, {gguf.stem.rpartition('.')[2]}": [*llama, gguf, str(threads)],
                  "llama.cpp, float32": [*llama, gguf, str(threads), "f32"]}  # fmt: skip
    return found | {f"vLLM, {form}": [*vllm, form] for form in ("bfloat16", "float32")}


def cannot(name: str, command: Sequence[str | Path]) -> str | None:
    """Why a peer is left out, or None."""
    if not Path(command[0]).exists():
        return "not installed: make peers"
    if name.endswith("bfloat16") and not {"avx512_bf16", "amx_bf16"} & set(native.cpu_flags().split()):
        return "this processor has no bfloat16 products: they would be imitated, and slower than float32"
    return None


def claims(config: PromptConfig) -> list[Claim]:
    engine_load.prepare()
    model, tokenizer = load_pair(replace(config, dtype="float32"), "raw")
    loaded = engine_load.load(EngineConfig(model=config.model, kv_memory=1.0, threads=config.threads))

    def ours(prompts: Sequence[list[int]], new: int) -> list[list[int]]:
        engine = loaded.new_engine(no_prefix_cache=True)
        wish = Sampling(max_new_tokens=new, ignore_eos=True)
        return [answer.result().tokens for answer in engine.generate(prompts, wish)]

    def transformers(prompts: Sequence[list[int]], new: int) -> list[list[int]]:
        return [transformers_generate(model, ids_tensor([p]), max_new_tokens=new)[0].tolist() for p in prompts]

    peers: dict[str, Ask] = {}
    missing: list[Claim] = []
    try:
        for name, command in commands(config, torch.get_num_threads()).items():
            if why := cannot(name, command):
                missing.append(left_out(name, why))
                continue
            warn(f"starting {name} ...")
            try:
                peer = Peer(name, command)
                peers[f"{name} ({peer.version})"] = peer
            except UserError as why:
                missing.append(left_out(name, str(why)))
        encode = tokenizer.codec.encode
        return [*compared(config, {"this engine": ours, **peers}, transformers, encode), *missing]
    finally:
        for peer in peers.values():
            peer.close()


def left_out(name: str, why: str) -> Claim:
    return Claim(f"the engine against {name}", "–", why, None, skipped=True)


def compared(config: PromptConfig, asks: dict[str, Ask], reference: Ask, encode: Callable) -> list[Claim]:
    offline = offline_prompts(encode)
    wanted = reference(progress(offline, len(offline), "transformers' answers"), OFFLINE_NEW)
    equal = {name: sum(map(list.__eq__, ask(offline, OFFLINE_NEW), wanted)) for name, ask in asks.items()}
    short, long = exact(encode, 128), exact(encode, 1024)
    tokens = OFFLINE * OFFLINE_NEW
    figures = {
        "decode, one request": (partial(between_tokens_s, short), 12, lambda s: f"{1 / s:.1f} tokens/s"),
        "first token, prompt of 128": (partial(seconds, [short], 1), 12, lambda s: f"{s * 1e3:.0f} ms"),
        "first token, prompt of 1,024": (partial(seconds, [long], 1), 6, lambda s: f"{s * 1e3:.0f} ms"),
        f"{OFFLINE} requests": (partial(seconds, offline, OFFLINE_NEW), 6, lambda s: f"{tokens / s:.1f} tokens/s"),
    }
    found = []
    for what, (figure, count, text) in figures.items():
        count = rounds(config, count)
        variants = [partial(figure, ask) for ask in asks.values()]
        list(interleaved(variants, 1))  # warms all up
        own, *others = zip(*progress(interleaved(variants, count), count, what), strict=True)
        for name, theirs in zip(list(asks)[1:], others, strict=True):
            said = verdict(own, theirs)
            low, high = 1 / (said.high or said.ratio), 1 / (said.low or said.ratio)
            found.append(Claim(
                f"{what}, against {name}", "not slower",
                f"×{1 / said.ratio:.2f} [{low:.2f}, {high:.2f}] (n={said.rounds}): {text(median(own))} against "
                f"{text(median(theirs))}; transformers' text in {equal['this engine']} and {equal[name]} of {OFFLINE}",
                said.not_slower,
            ))  # fmt: skip
    return found


def seconds(prompts: list[list[int]], new: int, ask: Ask) -> float:
    start = time.perf_counter()
    answers = ask(prompts, new)
    taken = time.perf_counter() - start
    if [len(answer) for answer in answers] != [new] * len(prompts):
        raise RuntimeError(f"asked for {new} tokens each, and got {[len(answer) for answer in answers]}")
    return taken


def between_tokens_s(prompt: list[int], ask: Ask) -> float:
    """What 64 more tokens take, each."""
    return (seconds([prompt], 65, ask) - seconds([prompt], 1, ask)) / 64
