"""A soak in one picture: memory, what is open, latencies, over the minutes."""

from pathlib import Path
from typing import Any

from lab.figure_file import FOLDER, drawing, section
from lab.soak_judge import MIB

Record = dict[str, Any]


def draw(record: Record, folder: Path = FOLDER) -> str:
    """Draw it as a PNG file; a Markdown section that names it."""
    path = folder / f"{record['id']}-soak.png"
    title = f"{sum(record['ends'].values()):,} requests; grey: warm-up [{record['id']}]"
    with drawing(path, title, 3, figsize=(10, 8), sharex=True) as panels:
        drawn(record, *panels[:, 0])
    return section(path)


def drawn(record: Record, memory, held, waits) -> None:
    looks, rests, laps = record["looks"], [one for one in record["rests"] if one["ok"]], record["laps"]
    memory.plot(
        [one["at"] / 60 for one in looks], [one["bytes"] / MIB for one in looks], linewidth=0.8, label="all looks"
    )
    memory.plot([one["at"] / 60 for one in rests], [one["bytes"] / MIB for one in rests], "o", markersize=3,
                label="nobody there")  # fmt: skip
    memory.set_ylabel("RssAnon + VmSwap, MiB")
    for name, label in (("files", "open files"), ("tasks", "asyncio tasks"), ("threads", "threads")):
        held.plot([one["at"] / 60 for one in rests], [one[name] for one in rests], "o-", markersize=2, label=label)
    held.set_ylabel("while nobody is there")
    held.set_ylim(bottom=0)
    for i, (name, label) in enumerate((("ttft_s", "TTFT"), ("e2e_s", "E2E"))):
        known = [lap for lap in laps if lap[name]]
        for percent, style in (("p50", "-"), ("p99", ":")):
            waits.plot([lap["at"] / 60 for lap in known], [lap[name][percent] * 1e3 for lap in known], style,
                       color=f"C{i}", label=f"{label} {percent}")  # fmt: skip
    waits.set(ylabel="ms, from due", xlabel="minutes", yscale="log")
    for axes in (memory, held, waits):
        axes.axvspan(0, (record["ready_s"] or 0) / 60, color="#c9ced6", alpha=0.4, linewidth=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, ncols=4)
