"""An overload in one picture: who came and what became of them, the queue, and the waits, second by second."""

from pathlib import Path
from typing import Any

from lab.figure_file import FOLDER, drawing, section
from lab.pulse_figures import SERVED, due_in, served
from metrics import percentile

Record = dict[str, Any]


def draw(record: Record, folder: Path = FOLDER) -> str:
    """Draw it as a PNG file; a Markdown section that names it."""
    path = folder / f"{record['id']}-pulse.png"
    title = f"{record['model']['name']}: {record['config']['pulse']:g} times the capacity [{record['id']}]"
    with drawing(path, title, 3, figsize=(10, 8.5), sharex=True) as panels:
        drawn(record, *panels[:, 0])
    return section(path)


def drawn(record: Record, rates, queue, waits) -> None:
    """Seconds from the beginning of the pulse; rates are means of the rounds, waits are of all rounds together."""
    begin_s, rounds = record["pulse_begin_s"], [one["requests"] for one in record["rounds"]]
    bins = range(int(record["round_s"]))
    for axes in (rates, queue, waits):
        axes.axvspan(0, record["pulse_end_s"] - begin_s, color="#e0a03c", alpha=0.2, linewidth=0)
        axes.grid(alpha=0.3)
    for name, color, moments in (
        ("asked", "#8a8f98", [[one["due"] for one in r] for r in rounds]),
        ("answered", "#2f9e63", [[one["end"] for one in served(r)] for r in rounds]),
        ("not served", "#d0632f", [[one["end"] for one in r if one["kind"] != SERVED] for r in rounds]),
    ):
        counts = [sum(b <= moment < b + 1 for r in moments for moment in r) / len(rounds) for b in bins]
        rates.step([b - begin_s for b in bins], counts, where="post", color=color, label=name)
    rates.axhline(record["capacity_per_s"], color="#8a8f98", linestyle=":", label="capacity")
    rates.set_ylabel("requests/s")
    looks = [look for one in record["rounds"] for look in one["looks"] if look["waiting"] is not None]
    for name, label in (("running", "in slots"), ("waiting", "in the queue")):
        queue.plot(*steps_of([(look["at"] - begin_s, look[name]) for look in looks]), label=label)
    queue.set_ylabel("requests")
    for p, style in ((50, "-"), (99, ":")):
        points = [(b - begin_s, percentile(found, p)) for b in bins if (found := ttfts(rounds, b))]
        waits.plot(
            [moment for moment, _ in points],
            [value for _, value in points],
            style,
            color="#2f7fd0",
            label=f"TTFT p{p}, by when it was due",
        )
    waits.set(ylabel="seconds", xlabel="seconds from the beginning of the overload", ylim=(0, None))
    for axes in (rates, queue, waits):
        axes.legend(frameon=False, fontsize=8, ncols=4)


def ttfts(rounds: list, begin_s: float) -> list[float]:
    return [one["ttft"] for r in rounds for one in served(due_in(r, begin_s, begin_s + 1.0))]


def steps_of(points: list[tuple[float, float]]) -> tuple[list[int], list[float]]:
    """The mean of all looks of each second."""
    seconds: dict[int, list[float]] = {}
    for moment, value in points:
        seconds.setdefault(int(moment // 1), []).append(value)
    return sorted(seconds), [sum(seconds[s]) / len(seconds[s]) for s in sorted(seconds)]
