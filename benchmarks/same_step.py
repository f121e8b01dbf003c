"""kv_experiment.py and infer.py, started as a user starts them, time the same decode step alike."""

import json
import subprocess
import sys
from statistics import median

from benchmarks.claim import Claim, rounds
from config import ROOT, PromptConfig, UserError
from lab.console import progress
from lab.verdict import verdict

ROUNDS, NEW_TOKENS = 8, 24


def record(script: str, config: PromptConfig, *words: str) -> dict:
    given = [
        "--model",
        config.model or "smollm2",
        "--device",
        config.device,
        "--dtype",
        config.dtype,
        "--seed",
        str(config.seed),
    ]
    given += ["--threads", str(config.threads), "--json", "-"]
    done = subprocess.run([sys.executable, script, *given, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{script} failed, so it was not compared: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def claims(config: PromptConfig) -> list[Claim]:
    count, new = rounds(config, ROUNDS), str(NEW_TOKENS)
    ours: list[float] = []
    theirs: list[float] = []

    def infer() -> int:
        found = record("infer.py", config, "--raw", "--ignore-eos", "--max-new-tokens", new, "--runs", "2")
        theirs.append(median(step for run in found["runs"] for step in run["decode"]))
        return found["prompt_tokens"]

    def kv(tokens: int) -> None:
        words = ("--prompt-lens", str(tokens), "--cache", "dynamic", "--new-tokens", new, "--rounds", "2")
        found = record("kv_experiment.py", config, *words)
        ours.append(median(step for trial in found["trials"] for step in trial["decode_s"]))

    tokens = infer()  # one start that is not counted tells the prompt's length
    theirs.clear()
    for turn in progress(range(count), count, "infer.py, kv_experiment.py"):
        for run in (infer, lambda: kv(tokens)) if turn % 2 == 0 else (lambda: kv(tokens), infer):
            run()
    said = verdict(ours, theirs)
    return [
        Claim(
            "a decode step in kv_experiment.py and in infer.py",
            "WITHIN NOISE (5 %), each in its own process",
            f"time / infer.py's, {tokens} prompt tokens: {said}",
            None if said.word == "NO VERDICT" else said.word == "WITHIN NOISE",
        )
    ]
