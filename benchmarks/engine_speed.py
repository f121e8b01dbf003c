"""The engine against transformers on the same requests, in turning order, with what theory allows beside each figure.

Multiples of a reference in the same run, because absolute figures drift here. The reference: transformers in float32,
a request at a time. "identical text" is the engine as it comes: weights in the fewest bytes that hold the checkpoint's
own numbers, all else in float32; the claim is void when one token differs. The embedded model was quantised to 4 and 8
bits once, so those bytes are few; a checkpoint that never was takes four each: "identical text, float32 weights".
"half precision": weights and cache are float16.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import mean, median

from benchmarks.claim import Claim, rounds
from config import PromptConfig
from engine import load as engine_load
from engine.load import Loaded
from engine.settings import EngineConfig
from experiments.ways import Load, OneByOne, OurEngine
from lab.ceilings import Ceilings, Probe, gemm_rate
from lab.console import progress
from lab.prompts import exact
from lab.serving_figures import makespan_s, tpot_s, ttft_s
from lab.verdict import interleaved, verdict
from model import Model, load_pair

OFFLINE, OFFLINE_NEW = 32, 32
IDENTICAL = ("identical text", "identical text, float32 weights")
FORMS = dict(zip((*IDENTICAL, "half precision"), ("auto", "float32", "float16"), strict=True))


@dataclass
class Bench:
    """What all claims share. answers: by name of the load, what transformers and each form of the engine said."""

    config: PromptConfig
    model: Model
    encode: Callable[[str], list[int]]
    forms: dict[str, Loaded]
    ceilings: Ceilings

    def engine(self, form: str, **changes) -> OurEngine:
        return OurEngine(lambda: self.forms[form].new_engine(no_prefix_cache=True, **changes))


def claims(config: PromptConfig) -> list[Claim]:
    engine_load.prepare()
    model, tokenizer = load_pair(replace(config, dtype="float32"), "raw")
    forms = {
        form: engine_load.load(EngineConfig(model=config.model, dtype=dtype, kv_memory=1.0, threads=config.threads))
        for form, dtype in FORMS.items()
    }
    bandwidth, gemm = Probe(model.device).bytes_per_s(15), gemm_rate(model.device, model.place.dtype)[0]
    ceilings = Ceilings(bandwidth, {"float32": gemm}, {})
    bench = Bench(config, model, tokenizer.codec.encode, forms, ceilings)
    return [*decode_claims(bench), *first_token_claims(bench), *offline_claims(bench), *sixteen_claims(bench)]


def one(bench: Bench, prompt_tokens: int, new_tokens: int, number: int = 0) -> Load:
    return Load([exact(bench.encode, prompt_tokens, number)], [new_tokens], [0.0])


def compare(bench: Bench, load: Load, figure: Callable, count: int, label: str):
    """Per form: (seconds of transformers, seconds of the engine, paired by round; whether all answers are equal)."""
    ways = [OneByOne(bench.model), *(bench.engine(form) for form in bench.forms)]
    seen: list[list[list[str]]] = [[] for _ in ways]

    def clocked(i: int) -> Callable[[], float]:
        def run() -> float:
            trial = ways[i].run(load)
            seen[i].append(trial["answers"])
            return figure(trial)

        return run

    variants = [clocked(i) for i in range(len(ways))]
    if count > 3:
        list(interleaved(variants, 1))  # warms all up; the long loads warm themselves
    columns = list(zip(*progress(interleaved(variants, count), count, label), strict=True))
    same = [all(answers == seen[0][0] for answers in one_way) for one_way in seen]
    return {form: (columns[0], columns[i + 1], same[i + 1]) for i, form in enumerate(bench.forms)}


def multiple(what: str, least: float, found: tuple, text: Callable[[float], str], identical: bool, floor_s: float):
    """A claim that the engine takes `least` times less time than transformers.

    found: (their seconds, the engine's, whether the answers are equal; None where there are none to compare).
    """
    theirs, ours, same = found
    said = verdict(ours, theirs)
    middle, low, high = 1 / said.ratio, 1 / (said.high or said.ratio), 1 / (said.low or said.ratio)
    # Slowed down by what is promised, it must still be faster: by the rule that every verdict follows.
    word = verdict([least * seconds for seconds in ours], theirs).word
    holds = {"FASTER": True, "SLOWER": False}.get(word)
    tokens = {None: "", True: "tokens equal; ", False: "tokens DIFFER: void; " if identical else "tokens differ; "}[
        same
    ]
    return Claim(
        what,
        f"≥ {least:g} × transformers float32",
        f"×{middle:.2f} [{low:.2f}, {high:.2f}] (n={said.rounds}): {text(median(ours))} against "
        f"{text(median(theirs))}; {tokens}theory allows {text(floor_s)}",
        False if identical and same is False else holds,
    )


def decode_claims(bench: Bench) -> list[Claim]:
    """One request: the time between its tokens."""
    load, count = one(bench, 128, 49), rounds(bench.config, 12)
    found = compare(bench, load, lambda trial: tpot_s(trial)[0], count, "decode, one request")
    least = dict.fromkeys(IDENTICAL, 4.7) | {"half precision": 5.6}
    claimed = []
    for form, loaded in bench.forms.items():
        floor_s = step_bytes(loaded, 152) / bench.ceilings.bytes_per_s
        what = f"decode, one request, {form}"
        claimed.append(multiple(what, least[form], found[form], tokens_per_s(1), form in IDENTICAL, floor_s))
    return claimed


def tokens_per_s(tokens: int) -> Callable[[float], str]:
    return lambda seconds: f"{tokens / seconds:.1f} tokens/s"


def step_bytes(loaded: Loaded, cached_tokens: int) -> int:
    """Least bytes a decode step reads: every weight once, every cached key and value once."""
    return loaded.about["weight_bytes"] + cached_tokens * loaded.about["kv_bytes_per_token"]


def first_token_claims(bench: Bench) -> list[Claim]:
    claimed = []
    for tokens, least, many in ((128, 1.0, 12), (1024, 1.0, 6)):
        load = one(bench, tokens, 1)
        found = compare(bench, load, lambda trial: ttft_s(trial)[0], rounds(bench.config, many), f"prompt of {tokens}")
        for form in bench.forms:
            floor_s = bench.model.flops(tokens, 0) / bench.ceilings.flops_per_s["float32"]
            claimed.append(
                multiple(
                    f"first token, prompt of {tokens}, {form}",
                    least,
                    found[form],
                    lambda s: f"{s * 1e3:.0f} ms",
                    form in IDENTICAL,
                    floor_s,
                )
            )
    return claimed


def offline_prompts(encode: Callable[[str], list[int]]) -> list[list[int]]:
    """16 to 256 tokens, more short ones than long ones, long beside short."""
    sizes = [16 + round(240 * (i * 0.6180339887 % 1) ** 1.3) for i in range(OFFLINE)]
    return [exact(encode, size, i) for i, size in enumerate(sizes)]


def offline_claims(bench: Bench) -> list[Claim]:
    """32 mixed requests at once: mainly a matter of prefill."""
    load = Load(offline_prompts(bench.encode), [OFFLINE_NEW] * OFFLINE, [0.0] * OFFLINE)
    prompts = sum(map(len, load.prompts))
    found = compare(bench, load, makespan_s, 2 if bench.config.quick else 3, f"{OFFLINE} requests")
    work = sum(
        bench.model.flops(len(prompt), 0) + bench.model.flops(new - 1, len(prompt), new - 1)
        for prompt, new in zip(load.prompts, load.new_tokens, strict=True)
    )
    floor_s = work / bench.ceilings.flops_per_s["float32"]
    text = tokens_per_s(OFFLINE * OFFLINE_NEW)
    return [
        multiple(
            f"{OFFLINE} requests of {prompts:,} prompt tokens × {OFFLINE_NEW} new, {form}",
            11.7,
            found[form],
            text,
            form in IDENTICAL,
            floor_s,
        )
        for form in bench.forms
    ]


def sixteen_claims(bench: Bench) -> list[Claim]:
    """16 sequences of 288 tokens decoding together, against one alone in transformers: time per token."""
    count, rows, context = rounds(bench.config, 6), 16, 288
    load = Load([exact(bench.encode, context - 8, i) for i in range(rows)], [17] * rows, [0.0] * rows)
    alone = one(bench, 128, 17)

    def per_token_s(form: str) -> float:
        trial = bench.engine(form, max_tokens=4096).run(load)
        return mean(b[2] - a[2] for a, b in pairwise(trial["steps"]) if a[5] == b[5] == b[4] == rows) / rows

    reference = OneByOne(bench.model)
    variants = [lambda: tpot_s(reference.run(alone))[0], *(partial(per_token_s, form) for form in bench.forms)]
    list(interleaved(variants, 1))  # warms all up
    theirs, *ours = zip(*progress(interleaved(variants, count), count, "16 sequences"), strict=True)
    claimed = []
    for form, seconds in zip(bench.forms, ours, strict=True):
        floor_s = max(
            step_bytes(bench.forms[form], rows * context) / bench.ceilings.bytes_per_s,
            bench.model.flops(1, context) * rows / bench.ceilings.flops_per_s["float32"],
        )
        what = f"{rows} sequences at {context} tokens, a step of {median(seconds) * rows * 1e3:.1f} ms, {form}"
        found = (theirs, seconds, None)  # other requests: there are no tokens to compare
        claimed.append(multiple(what, 29.4, found, tokens_per_s(1), False, floor_s / rows))
    return claimed
