"""Two load records in one picture: throughput, and the latency that one request in a hundred exceeds, against load."""

from pathlib import Path

from lab.figure_file import FOLDER, section
from lab.load_runs import Record, level, over_rounds, rounds_by_load, shape
from lab.report_figures import SERIES, canvas, legend, plain

PANELS = (("throughput", "output tokens/s"), ("e2e_p99", "E2E p99, s"))
Lines = dict[str, list[tuple[float, float]]]  # prompt + new tokens -> (load, value)


def lines_of(record: Record, figure: str, axis: str) -> Lines:
    found: Lines = {}
    for runs in rounds_by_load(record).values():
        place, value = level(runs[0]), over_rounds(runs, figure)
        if place and place[0] == axis and value is not None:
            found.setdefault(shape(runs[0]), []).append((place[1], value))
    return {name: sorted(points) for name, points in found.items()}


def axis_of(a: Record, b: Record) -> str | None:
    """The axis on which both have points; requests at once before requests/s."""
    ours, theirs = ({place[0] for run in r["runs"] if (place := level(run))} for r in (a, b))
    return next((axis for axis in ("requests at once", "requests/s") if axis in ours & theirs), None)


def drawn(a: Record, b: Record, axis: str):
    """A dashed, B drawn through; a colour for each prompt and answer length."""
    figure, panels = canvas(3.4, len(PANELS))
    for axes, (name, label) in zip(panels[0], PANELS, strict=True):
        sides = [lines_of(record, name, axis) for record in (a, b)]
        shapes = list(dict.fromkeys([*sides[0], *sides[1]]))
        for which, style, side in zip("AB", ("o--", "o-"), sides, strict=True):
            for shape_name, points in side.items():
                color = SERIES[shapes.index(shape_name) % len(SERIES)]
                axes.plot(*zip(*points, strict=True), style, color=color, markersize=4,
                          label=plain(f"{which}, {shape_name}"))  # fmt: skip
        axes.set_xticks(sorted({load for side in sides for points in side.values() for load, _ in points}))
        axes.set_xlabel(axis)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    legend(panels[0][0])
    return figure


def save(a: Record, b: Record, name: str, folder: Path = FOLDER) -> str | None:
    """Draw it as a PNG file of that name; a Markdown section that names it. None without a common axis."""
    axis = axis_of(a, b)
    if axis is None:
        return None
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-compared.png"
    figure = drawn(a, b, axis)
    figure.suptitle(f"A [{a['id']}], B [{b['id']}]", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return section(path)
