"""Day 1's answers in plain sentences, and the warnings that belong beside them, from a record of timed requests."""

from collections.abc import Sequence
from statistics import median

from lab import roofline
from lab.request_figures import (
    Record,
    card_ceilings,
    conserved,
    floors_of,
    run_ceilings,
    share,
    shares_of_ceiling,
    stage_s,
)
from lab.verdict import steady_rounds
from metrics import cold_warning, median_interval, ms, unsteady_warning


def sentences(record: Record) -> list[str]:
    """The answers to Day 1's question, from these numbers alone."""
    runs = record["runs"]
    if not runs:
        return ["No timed run was finished: only the cold one is known, and one cold run supports no conclusion."]
    if not runs[0]["decode"]:
        why = "the model ended its answer at once; try --ignore-eos" if record["stopped"] else "as asked for"
        return [f"One new token was generated ({why}): it came from prefill, so there is no decode to compare with."]
    return [*share_sentences(record), *wall_sentences(record), cold_sentence(record)]


def share_sentences(record: Record) -> list[str]:
    runs, prompt = record["runs"], record["prompt_tokens"]
    steps = len(runs[0]["decode"])
    shares = {phase: [share(run, phase) for run in runs] for phase in ("prefill", "decode")}
    larger = max(shares, key=lambda phase: median(shares[phase]))
    per_prompt = median(run["prefill"] for run in runs) / prompt
    per_step = median(stage_s(run, "decode") for run in runs) / steps
    return [
        f"Where is the time? Of {ms(median(run['total'] for run in runs), 0)} ms, prefill takes "
        f"{with_interval(shares['prefill'])} and decode {with_interval(shares['decode'])}: "
        f"{larger} is where the time goes. (Medians of the runs' own shares.)",
        f"Per token: {ms(per_prompt, 2)} ms for each of {prompt} prompt tokens and {ms(per_step, 2)} ms for each of "
        f"{steps} decode steps. A new token costs {per_step / per_prompt:.1f} times a prompt token: prefill reads the "
        f"weights once for all {prompt}, decode reads them again for every one.",
    ]


def with_interval(shares: Sequence[float]) -> str:
    interval = median_interval(shares)
    bounds = " [{:.1%}, {:.1%}]".format(*interval) if interval else f" (n={len(shares)}, no interval)"
    return f"{median(shares):.1%}" + bounds


def wall_sentences(record: Record) -> list[str]:
    if card_ceilings(record) is None:
        return [f"No GEMM ceiling is known for {record['model']['dtype']} here, so no wall can be named."]
    floors, reached = floors_of(record, run_ceilings(record)), shares_of_ceiling(record)
    found = []
    for phase, work, name in (("prefill", "the prompt", "prefill MFU"), ("decode", "one step", "decode MBU")):
        floor = floors[phase]
        took = median(stage_s(r, phase) / (len(r["decode"]) if phase == "decode" else 1) for r in record["runs"])
        times = took / floor.least_s
        sentence = (
            f"Which wall binds {phase}? {floor.wall.capitalize()}: at the rates read around the runs {work} needs "
            f"{ms(floor.compute_s)} ms of arithmetic and {ms(floor.memory_s)} ms of reading. It took {ms(took)} ms, "
            f"{times:.1f} times the larger ({name.split()[1]} {median(reached[name]):.0%})."
        )
        if times < 1:
            found.append(
                f"Which wall binds {phase}? None can be named: it took {ms(took)} ms, and the ceilings read around the "
                f"runs allow {ms(floor.least_s)} ms at the least. They are read too low for this dtype or this minute."
            )
            continue
        if times > 1.5:
            sentence += (
                f" That is the nearest wall, but it is not reached: {ms(took - floor.least_s)} ms are spent otherwise, "
                "and the breakdown shows where (--breakdown)."
            )
        found.append(sentence)
    return found


def cold_sentence(record: Record) -> str:
    cold = record["cold"]["prefill"]
    ratio = cold / median(run["prefill"] for run in record["runs"])
    if ratio < 1.2:
        return f"The cold prefill took {ratio:.2f} times the warm one: nothing to warn of here."
    return (
        f"The first prefill of this process took {ms(cold)} ms, {ratio:.1f} times the warm median: whoever times one "
        "cold call measures the warm-up (python3 -m experiments.mistakes cold shows where that leads)."
    )


def warnings(record: Record) -> list[str]:
    """What must be known before these numbers are quoted, each with its remedy."""
    runs, config = record["runs"], record["config"]
    found = [
        cold_warning([run["prefill"] for run in runs], "timed prefill", config["warmup"]),
        unsteady_warning([run["prefill"] for run in runs], "prefill", config["runs"]),
        unsteady_warning([stage_s(run, "decode") for run in runs], "decode", config["runs"]),
        roofline.impossible({name: max(values) for name, values in shares_of_ceiling(record).items()}),
    ]
    found += machine_warnings(record)
    if not all(map(conserved, runs)):
        found.append(
            "conservation of time is broken (see STATS): do not quote these numbers, and report this as a bug."
        )
    if not record["same_tokens"]:
        found.append(
            "the runs did not give the same tokens: greedy generation was not repeatable. Try --dtype float32."
        )
    if 0 < len(runs) < 6:
        found.append(f"{len(runs)} runs give no 95 % interval of the median: use --runs 6 or more before quoting.")
    return [warning for warning in found if warning]


def machine_warnings(record: Record) -> list[str]:
    """Whether the machine itself changed: between the runs, or since its ceilings were kept."""
    readings, kept = record["run_ceilings"], card_ceilings(record)
    found = []
    for name, place in (("memory bandwidth", 0), ("matrix rate", 1)):
        values = [reading[place] for reading in readings]
        off = len(values) - len(steady_rounds(values)) if values else 0
        if off:
            found.append(
                f"{off} of {len(values)} runs met a {name} more than 15 % off the usual: the machine was disturbed. "
                f"Close other programs and try --runs {2 * len(values)}."
            )
        elif values and kept and not 0.75 < median(values) / kept[place] < 1.33:
            found.append(
                f"the {name} around the runs is {median(values) / kept[place]:.2f} times the one kept on the card: "
                "the card is out of date or the machine is busy. Use --recalibrate on an idle machine."
            )
    return found
