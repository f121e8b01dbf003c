"""Day 2's figures: throughput and latency by batch size, and one bar per request for each policy."""

from pathlib import Path
from statistics import mean, median

from lab.batch_figures import (
    Cell,
    Record,
    Trial,
    cells,
    interval_of_mean,
    latencies_s,
    mean_latency_s,
    parts_s,
    pooled_latencies_s,
    requests_per_s,
    tokens_per_s,
)
from lab.figure_file import FOLDER, drawing, section
from metrics import percentile

Cells = dict[Cell, list[Trial]]
WAIT, WINDOW, PREFILL, DECODE = "#c9ced6", "#e0a03c", "#3d7ab8", "#63a96b"


def draw(record: Record, folder: Path = FOLDER) -> str:
    """Draw both figures as PNG files; a Markdown section that names them."""
    found = cells(record)
    curves, bars = (folder / f"{record['id']}-{name}.png" for name in ("throughput", "timeline"))
    with drawing(curves, title(record), columns=2, figsize=(11, 4.2)) as panels:
        throughput_and_latency(found, *panels[0])
    with drawing(bars, title(record), len(found), figsize=(11, 1.0 + 1.7 * len(found)), sharex=True) as panels:
        timeline(found, panels[:, 0])
    return section(curves, bars)


def throughput_and_latency(found: Cells, left, right) -> None:
    """Left: tokens/s; right: average and P95 latency; both by batch size, one line per window, 95 % intervals."""
    for i, window in enumerate(sorted({window for _, window in found})):
        sizes = sorted(size for size, w in found if w == window)
        rows = [found[(size, window)] for size in sizes]
        places = [place + 0.06 * i for place in range(len(sizes))]  # side by side, so that bars do not hide each other
        with_bars(left, places, [list(map(tokens_per_s, trials)) for trials in rows], f"window {window:g} ms", f"C{i}")
        with_bars(
            right, places, [list(map(mean_latency_s, t)) for t in rows], f"average, window {window:g} ms", f"C{i}"
        )
        p95_bars(right, places, rows, f"P95, window {window:g} ms (bars: least and greatest round)", f"C{i}")
        for axes in (left, right):
            axes.set_xticks(range(len(sizes)), map(str, sizes))
    left.set(title="Throughput", xlabel="batch size", ylabel="new tokens/s", ylim=(0, None))
    right.set(title="Latency, due to done", xlabel="batch size", ylabel="seconds", ylim=(0, None))
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False, fontsize=8)


def with_bars(axes, places: list[float], samples: list[list[float]], label: str, color: str) -> None:
    """Means over the rounds with their 95 % t intervals."""
    means = [mean(values) for values in samples]
    halves = [(i[1] - i[0]) / 2 if (i := interval_of_mean(values)) else 0 for values in samples]
    axes.errorbar(places, means, yerr=halves, fmt="o-", capsize=3, color=color, label=label)


def p95_bars(axes, places: list[float], rows: list[list[dict]], label: str, color: str) -> None:
    """The P95 of all rounds' requests. Too few samples for an interval: the bars span the rounds' own P95s."""
    pooled = [percentile(pooled_latencies_s(trials), 95) for trials in rows]
    each = [[percentile(latencies_s(trial), 95) for trial in trials] for trials in rows]
    below = [max(p - min(values), 0) for p, values in zip(pooled, each, strict=True)]
    above = [max(max(values) - p, 0) for p, values in zip(pooled, each, strict=True)]
    axes.errorbar(places, pooled, yerr=[below, above], fmt="v:", capsize=3, color=color, alpha=0.5, label=label)


def timeline(found: Cells, panels) -> None:
    """One panel per policy, one bar per request from due to done: waiting, window, prefill, decode."""
    for axes, (cell, trials) in zip(panels, found.items(), strict=True):
        trial = typical(trials)
        parts = parts_s(trial)
        for i, due in enumerate(trial["due_s"]):
            start = due
            window = parts["window wait"][i]
            for width, color, label in (
                (parts["late"][i] + parts["queue wait"][i] - window, WAIT, "waits: the machine is busy"),
                (window, WINDOW, "waits: window"),
                (parts["prefill"][i], PREFILL, "prefill"),
                (parts["decode"][i] + parts["drop rows"][i], DECODE, "decode"),
            ):
                axes.barh(i, width, left=start, height=0.8, color=color, label=label if i == 0 else None)
                start += width
        axes.invert_yaxis()
        axes.set_ylabel(f"batch {cell[0]}\n{cell[1]:g} ms", rotation=0, ha="right", va="center")
        axes.set_yticks([])
        axes.text(
            1.0,
            1.0,
            f"{requests_per_s(trial):.2f} req/s",
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=8,
        )
    panels[-1].set_xlabel("seconds; one bar per request, in order of arrival")
    panels[0].legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))


def typical(trials: list[dict]) -> dict:
    """The trial whose average latency is the median one."""
    middle = median(map(mean_latency_s, trials))
    return min(trials, key=lambda trial: abs(mean_latency_s(trial) - middle))


def title(record: Record) -> str:
    config, model = record["config"], record["model"]
    return (
        f"{model['name']}, {model['dtype']}, {model['device']}: {config['requests']} requests ({config['arrival']}), "
        f"{config['max_new_tokens']} new tokens [{record['id']}]"
    )
