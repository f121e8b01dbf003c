"""kv_experiment.py and infer.py time the same prefill and the same decode step alike: their figures may be compared."""

from dataclasses import replace
from statistics import median

from benchmarks.claim import Claim, rounds
from config import PromptConfig
from infer import InferConfig, as_run, one_request
from kv_experiment import run_experiment
from lab.console import progress
from lab.verdict import interleaved, verdict
from metrics import Stats
from model import load

ROUNDS, NEW_TOKENS = 160, 8  # short runs that alternate quickly: a slow second meets both


def claims(config: PromptConfig) -> list[Claim]:
    model, tokenizer, prompt = load(replace(config, max_new_tokens=NEW_TOKENS))
    plain = InferConfig(prompt=config.prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    runs: dict[str, list[dict]] = {"kv": [], "infer": []}

    def kv() -> float:
        runs["kv"].append(run_experiment(len(prompt), True, model=model, prompt=prompt, new_tokens=NEW_TOKENS))
        return median(runs["kv"][-1]["decode_s"])

    def infer() -> float:
        stats: Stats = {}
        one_request(model, tokenizer, config.prompt, plain, stats)
        runs["infer"].append(as_run(stats))
        return median(stats["decode"])

    list(interleaved([kv, infer], 1))  # warms both up
    count = rounds(config, ROUNDS)
    pairs = list(progress(interleaved([kv, infer], count), count, "infer.py, kv_experiment.py"))
    first = [[run["prefill_s"] for run in runs["kv"][1:]], [run["prefill"] for run in runs["infer"][1:]]]
    said = {"decode step": verdict(*zip(*pairs, strict=True)), "prefill": verdict(*first)}
    return [
        Claim(
            f"a {what} in kv_experiment.py and in infer.py",
            "WITHIN NOISE (5 %)",
            f"time / infer.py's, {len(prompt)} prompt tokens: {found}",
            None if found.word == "NO VERDICT" else found.low > 0.95 and found.high < 1.05,
        )
        for what, found in said.items()
    ]
