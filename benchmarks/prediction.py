"""The simulation predicts cells that it was not fitted to: throughput within 10 %, average latency within 15 %."""

import json
import subprocess
import sys

from benchmarks.claim import Claim
from config import ROOT, PromptConfig, UserError
from lab.batch_figures import cells, prediction_errors, scored

THROUGHPUT, LATENCY = 0.10, 0.15


def sweep(config: PromptConfig) -> dict:
    """The record of a short run of batch_experiment.py, as a user would start it."""
    words = ["--model", config.model or "smollm2", "--device", config.device, "--dtype", config.dtype, "--json", "-",
             "--threads", str(config.threads), "--attention", config.attention, "--seed", str(config.seed),
             "--requests", "8", "--max-new-tokens", "16", "--rounds", "2" if config.quick else "4"]  # fmt: skip
    done = subprocess.run([sys.executable, "batch_experiment.py", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"batch_experiment.py failed, so no prediction was checked: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def claims(config: PromptConfig) -> list[Claim]:
    record = sweep(config)
    found = []
    for cell, trials in cells(record).items():
        if scored(record, cell):
            throughput, latency = prediction_errors(trials)
            what = f"simulated batch {cell[0]}, window {cell[1]:g} ms"
            promised = f"within {THROUGHPUT:.0%} and {LATENCY:.0%} of measured"
            measured = f"throughput {throughput:+.1%}, average latency {latency:+.1%} ({len(trials)} rounds)"
            found.append(Claim(what, promised, measured, abs(throughput) <= THROUGHPUT and abs(latency) <= LATENCY))
    return found
