"""The picture of a kill test: what became of the requests of each second, and how long the answered ones took."""

from pathlib import Path

from lab.availability import Record, failed, of_kind
from lab.figure_file import FOLDER, drawing, section

ENDS = {"answered whole": "#63a96b", "begun, cut with an error": "#e0a03c", "failed": "#b8433d"}
REPLICAS = {"replica-1": "#3d7ab8", "replica-2": "#8a5fb0"}
AWAY = "#c9ced6"


def draw(record: Record, folder: Path = FOLDER) -> str:
    """Draw it as a PNG file; a Markdown section that names it."""
    path = folder / f"{record['id']}-availability.png"
    title = (
        f"{record['model']['name']} twice behind HAProxy, {record['rate']:.2f} requests/s, "
        f"{len(record['kills'])} kills [{record['id']}]"
    )
    with drawing(path, title, 2, figsize=(11, 5.6), sharex=True) as panels:
        top, bottom = panels[:, 0]
        ends_by_second(record, top)
        latencies(record, bottom)
        for axes in (top, bottom):
            away(record, axes)
            axes.grid(axis="y", alpha=0.3)
            axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper left")
        bottom.set_xlabel("seconds, by when a request was due")
    return section(path)


def ends_by_second(record: Record, axes) -> None:
    """A bar for each second, in parts by how its requests ended."""
    requests = record["requests"]
    seconds = range(int(max(one["due"] for one in requests)) + 1)
    cut = of_kind(requests, "cut") + of_kind(requests, "silent")
    floor = [0] * len(seconds)
    for (label, color), mine in zip(ENDS.items(), (of_kind(requests, "answered"), cut, failed(requests)), strict=True):
        counts = [sum(int(one["due"]) == second for one in mine) for second in seconds]
        axes.bar([second + 0.5 for second in seconds], counts, 0.9, bottom=floor, color=color, label=label)
        floor = [a + b for a, b in zip(floor, counts, strict=True)]
    axes.set_ylabel("requests due in that second")
    axes.set_ylim(0, 1.25 * max(floor))


def latencies(record: Record, axes) -> None:
    """A point for each answered request, in the colour of the replica that answered."""
    for name, color in REPLICAS.items():
        mine = [one for one in of_kind(record["requests"], "answered") if one["replica"] == name]
        axes.plot([one["due"] for one in mine], [one["end"] - one["due"] for one in mine], ".", color=color, label=name)
    axes.set_ylabel("due to last byte, s")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])


def away(record: Record, axes) -> None:
    """Grey while a replica was away, from its kill until it had its share again."""
    end_s = max(one["end"] for one in record["requests"])
    for i, kill in enumerate(record["kills"]):
        up_s = end_s if kill["up"] is None else kill["up"]
        axes.axvspan(
            kill["killed"], up_s, color=AWAY, alpha=0.5, lw=0, zorder=0, label=None if i else "a replica is away"
        )
