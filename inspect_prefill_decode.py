"""Day 1, by hand. What goes into the network and what comes out, pass by pass?

generate() is one prefill and a loop of decode steps. Here the loop is written out, and every pass is shown: shapes, the
cache as it grows by one token a step, the chosen token, the time. The tokens must equal those of transformers'
generate(). Then the loop runs several times, and a line through the steps' times says what a longer cache costs.

    python3 inspect_prefill_decode.py
    python3 inspect_prefill_decode.py --max-new-tokens 10 --raw --prompt "The GPU is"
"""

from config import PromptConfig, check_packages, knob

if __name__ == "__main__":
    check_packages()

from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch

from lab import ceilings, console, fits, records
from lab.card import hardware_card, machine_key
from lab.request_tables import card_table, quoted
from lab.verdict import t_half_width
from metrics import Stats, mb, ms, table, timed
from model import Model, greedy, ids_tensor, kv_cache_bytes, kv_cache_layers, load, transformers_generate
from tokenizer import Tokenizer


@dataclass(frozen=True)
class InspectConfig(PromptConfig):
    runs: int = knob(5, "passes over the whole request, for the line through the step times", least=1, quick=3)


@torch.inference_mode()
def show_prefill(model: Model, ids: torch.Tensor, tokenizer: Tokenizer, page: console.Page) -> None:
    """One prefill with all its logits: they exist for every position, and only the last row is needed."""
    out = model.net(input_ids=ids, use_cache=True)
    layers = kv_cache_layers(out.past_key_values)
    token = greedy(out.logits).item()
    rows = [
        ("input ids", str(tuple(ids.shape)), "[batch, prompt tokens]"),
        ("logits", str(tuple(out.logits.shape)), "[batch, prompt tokens, vocabulary]: one row per position"),
        (
            "KV cache",
            f"{len(layers)} layers × 2 × {tuple(layers[0][0].shape)}",
            "keys and values, each [batch, KV heads, tokens, head dimension]",
        ),
        (
            "KV bytes",
            f"{kv_cache_bytes(out.past_key_values):,}",
            f"{model.kv_bytes_per_token():,} a token × {ids.shape[1]} tokens",
        ),
        ("first new token", f"{token} {quoted(tokenizer.decode([token]))}", "argmax of logits[0, -1]"),
    ]
    columns = [("prefill", "left"), ("value", "left"), ("meaning", "left")]
    page.show("### Prefill: the whole prompt in one pass\n\n" + table(columns, rows))


def run_by_hand(model: Model, ids: torch.Tensor, stops: frozenset[int], config: InspectConfig) -> dict[str, Any]:
    """One request as passes through the network: seconds, tokens, and the cache after every step."""
    stats: Stats = {"decode": []}
    with torch.inference_mode():
        with timed("prefill", stats):
            out = model.net(input_ids=ids, use_cache=True, logits_to_keep=1)
            token = greedy(out.logits)
        tokens, cache_tokens, cache_bytes = [token.item()], [], []
        while len(tokens) < config.max_new_tokens and tokens[-1] not in stops:
            with timed("decode", stats):
                out = model.net(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = greedy(out.logits)
            tokens.append(token.item())
            cache_tokens.append(kv_cache_layers(out.past_key_values)[0][0].shape[2])
            cache_bytes.append(kv_cache_bytes(out.past_key_values))
    return {
        "prefill": stats["prefill"][0],
        "decode": stats["decode"],
        "tokens": tokens,
        "cache_tokens": cache_tokens,
        "cache_bytes": cache_bytes,
    }


def steps_table(runs: list[dict[str, Any]], tokenizer: Tokenizer, timing_only: bool) -> str:
    """A row per step; ms is the median of the runs."""
    last = runs[-1]
    pieces = tokenizer.pieces(last["tokens"])
    rows = [("prefill", ms(median(run["prefill"] for run in runs), 2), "", "", last["tokens"][0], quoted(pieces[0]))]
    for i, token in enumerate(last["tokens"][1:]):
        step_ms = ms(median(run["decode"][i] for run in runs), 2)
        rows.append(
            (i + 1, step_ms, last["cache_tokens"][i], mb(last["cache_bytes"][i], 2), token, quoted(pieces[i + 1]))
        )
    if timing_only:
        rows = [(*row[:-1], "(noise)") for row in rows]
    columns = [
        ("step", "right"),
        ("ms", "right"),
        ("KV seq_len", "right"),
        ("KV MB", "right"),
        ("token id", "right"),
        ("text", "left"),
    ]
    return f"### Decode: one token in, one token out (median of {len(runs)} runs)\n\n" + table(columns, rows)


def sentences(model: Model, runs: list[dict[str, Any]], reference: list[int], read_s_per_byte: float) -> list[str]:
    tokens = runs[0]["tokens"]
    if any(run["tokens"] != reference for run in runs):
        at = next((i for i, pair in enumerate(zip(tokens, reference, strict=False)) if len(set(pair)) > 1), len(tokens))
        found = [f"DIFFERENT from transformers' generate() at new token {at + 1}: the times below are void."]
    else:
        found = [f"All {len(tokens)} tokens equal those of transformers' generate(), in each of {len(runs)} runs."]
    per_token = model.kv_bytes_per_token()
    exact = all(
        size == n * per_token for run in runs for size, n in zip(run["cache_bytes"], run["cache_tokens"], strict=True)
    )
    found.append(
        f"The cache grows by {per_token:,} bytes a token (2 × layers × KV heads × head dimension × bytes a number), "
        f"{'exactly so after every step' if exact else 'which its tensors do NOT follow'}."
    )
    return [*found, growth_sentence(runs, per_token * read_s_per_byte)]


def growth_sentence(runs: list[dict[str, Any]], reading_s: float) -> str:
    """A line through (cache length, step time) for each run; the interval comes from how the runs' slopes differ.

    Steps of one run are not independent (the machine drifts while they run), so they cannot give an interval. The first
    step is left out: it is often a slow one. reading_s: what reading one more cached token must cost.
    """
    lengths = runs[0]["cache_tokens"][1:]
    if len(lengths) < 3 or len(runs) < 3:
        return "Too few steps or runs for a line through the step times: use --max-new-tokens 5 and --runs 3 or more."
    slopes = [fits.line(lengths, run["decode"][1:]).slope for run in runs]
    slope, half = mean(slopes), t_half_width(slopes)
    found = (
        f"Step time against cache length, {lengths[0]} to {lengths[-1]} tokens: {slope * 1e6:+.1f} ± {half * 1e6:.1f} "
        f"µs a step for each cached token (95 %, {len(runs)} runs). Reading its keys and values must cost "
        f"{reading_s * 1e6:.2f} µs. "
    )
    if abs(slope) <= half:
        typical = ms(median(step for run in runs for step in run["decode"]))
        return found + f"The interval holds 0: beside a step of {typical} ms, no growth can be seen at these lengths."
    if slope < 0:
        return found + "The steps got faster as the cache grew: the machine was slower at first. Run it again."
    return found + f"The growth is {slope / reading_s:.0f} times what reading explains."


def main(argv: list[str] | None = None) -> int:
    config = InspectConfig.from_cli(__doc__, argv)
    records.check_writable(config, "inspect_prefill_decode")
    model, tokenizer, prompt = load(config)
    page, partial = console.Page(silent=config.json == "-"), False
    card = hardware_card(model.device)
    ceiling = ceilings.kept(model.device, machine_key(card), config.recalibrate)
    record = records.new_record("inspect_prefill_decode", "day1-prefill-decode-by-hand", config, card)
    record |= {
        "model": model.description(),
        "prompt": config.prompt,
        "prompt_tokens": len(prompt),
        "batch_policy": "one request at a time",
        "kv_cache": "on (transformers DynamicCache)",
        "gpu_utilisation": "not sampled",
    }
    page.show("# Day 1, by hand: prefill and decode, pass by pass\n\n" + card_table(card), keep=False)
    page.show(
        f"Model: {model.name}, {model.place.dtype_name} on {model.device.type}; {model.origin}; "
        f"hash {model.weights_hash}. Prompt: {quoted(config.prompt)} ({tokenizer.template})."
    )
    ids, stops = ids_tensor([prompt]).to(model.device), model.stops(config.ignore_eos)
    show_prefill(model, ids, tokenizer, page)
    runs: list[dict[str, Any]] = []
    try:
        run_by_hand(model, ids, stops, config)  # warms both phases up
        for _ in console.progress(range(config.runs), config.runs, "runs"):
            runs.append(run_by_hand(model, ids, stops, config))
    except KeyboardInterrupt:
        partial = True
    if not runs:
        raise KeyboardInterrupt
    reference = transformers_generate(model, ids, max_new_tokens=config.max_new_tokens, eos_ids=stops)[0].tolist()
    record |= {
        "runs": runs,
        "partial": partial,
        "output_hash": records.output_hash(runs[0]["tokens"]),
        "verdicts": sentences(model, runs, reference, read_s_per_byte=1 / ceiling.bytes_per_s),
    }
    return console.conclude(config, record, page, [steps_table(runs, tokenizer, model.timing_only)])


if __name__ == "__main__":
    console.run(main)
