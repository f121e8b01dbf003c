"""kv_experiment.py and infer.py time the same prefill and the same decode step alike: their figures may be compared."""

from dataclasses import replace
from statistics import median

from benchmarks.claim import Claim, rounds
from config import PromptConfig
from infer import InferConfig, as_run, one_request
from kv_experiment import run_experiment
from lab.ceilings import Probe, gemm_rate
from lab.console import progress
from lab.verdict import interleaved, verdict
from metrics import Stats
from model import load

ROUNDS, NEW_TOKENS = 40, 24


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
    probe, count, pairs, anchors = Probe(model.device), rounds(config, ROUNDS), [], []
    _, size = gemm_rate(model.device, model.place.dtype)
    for pair in progress(interleaved([kv, infer], count), count, "infer.py, kv_experiment.py"):
        pairs.append(pair)
        anchors.append(probe.anchor(model.place.dtype, size).seconds)
    first = [[run["prefill_s"] for run in runs["kv"][1:]], [run["prefill"] for run in runs["infer"][1:]]]
    said = {
        "decode step": verdict(*zip(*pairs, strict=True), anchors=anchors),
        "prefill": verdict(*first, anchors=anchors),
    }
    return [
        Claim(
            f"a {what} in kv_experiment.py and in infer.py",
            "WITHIN NOISE (5 %)",
            f"time / infer.py's, {len(prompt)} prompt tokens: {found}",
            None if found.word == "NO VERDICT" else found.low > 0.95 and found.high < 1.05,
        )
        for what, found in said.items()
    ]
