"""The report's pictures as SVG text: lines in the colour of the page's text, so that light and dark pages show them."""

import io
import re
from collections.abc import Sequence
from typing import Any

INK = "#010203"  # stands for "the text's colour": no series has it
SERIES = ("#2f7fd0", "#d0632f", "#2f9e63", "#9b5fc0", "#b08d20", "#c04a72")  # readable on white and on black
WAIT, PREFILL, DECODE = "#8a8f98", "#2f7fd0", "#2f9e63"
LONGEST_TIMELINE = 48

Series = dict[str, list[tuple[float, float]]]  # name -> points


def canvas(height: float, panels: int = 1):
    """A figure and its panels, with no colour of its own but INK. A panel is so narrow that a phone shows its words."""
    import matplotlib

    matplotlib.use("Agg")  # draws into memory; asks no display
    import matplotlib.pyplot as plt

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with plt.rc_context({**ink, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        return plt.subplots(1, panels, figsize=(4.6 * panels, height), layout="constrained", squeeze=False)


def svg(figure, name: str) -> str:
    """The drawing as an <svg> element. name: no other drawing of the page has it (it keeps their ids apart)."""
    import matplotlib
    import matplotlib.pyplot as plt

    text, broad = io.StringIO(), figure.get_figwidth() > 5
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    plt.close(figure)
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor")
    drawing = re.sub(r' (?:width|height)="[\d.]+pt"', "", drawing, count=2)  # the page says how wide
    drawing = re.sub(r' id="[\w.]+_\d+"', "", drawing)  # groups are numbered alike in every drawing
    return drawing.replace("<svg", '<svg role="img" class="broad"' if broad else '<svg role="img"', 1)


def against_load(throughput: Series, latency: Series, tail: Series, axis: str) -> str:
    """Two drawings against the load: throughput; E2E p50, and p99 dashed."""
    first, ((axes,),) = canvas(3.1)
    lines(axes, throughput, axis, "output tokens/s")
    second, ((axes,),) = canvas(3.1)
    for points, color in zip(tail.values(), SERIES * len(tail), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), "--", color=color, linewidth=1)
    lines(axes, latency, axis, "E2E p50 (dashed: p99), s")
    return svg(first, f"throughput-{axis}") + svg(second, f"latency-{axis}")


def lines(axes, series: Series, x: str, y: str) -> None:
    for (name, points), color in zip(series.items(), SERIES * len(series), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=plain(name), markersize=4)
    axes.set_xticks(sorted({level for points in series.values() for level, _ in points}))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)  # the last: from here on the upper end stays where it is
    axes.margins(x=0.08)
    legend(axes)


def legend(axes, columns: int = 2) -> None:
    """Above the drawing, where no line runs through it."""
    axes.legend(frameon=False, fontsize=8, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), labelcolor=INK)


def frontier(points: Sequence[tuple[float, float, str]], knee: int | None) -> str:
    """points: (tokens per second, E2E p50 in seconds, what load), in the order of the load."""
    figure, ((axes,),) = canvas(3.1)
    axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=SERIES[0], markersize=4)
    for x, y, name in points:
        axes.annotate(
            plain(name), (x, y), textcoords="offset points", xytext=(-4, 6), ha="right", fontsize=8, color=INK
        )
    if knee is not None:
        axes.plot(*points[knee][:2], "o", markersize=12, fillstyle="none", color=SERIES[1], label="knee")
        legend(axes)
    axes.set_xlabel("output tokens/s")
    axes.set_ylabel("E2E p50, s")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.12, y=0.15)
    return svg(figure, "frontier")


def timeline(run: dict[str, Any]) -> str:
    """One bar per request: waits, prefill (or both, where the server does not tell them apart), decode."""
    shown = [r for r in run["requests"] if r["ok"] and r["chunks"]][:LONGEST_TIMELINE]
    figure, ((axes,),) = canvas(1.0 + 0.07 * len(shown))
    labels: set[str] = set()
    for row, request in enumerate(shown):
        for start, end, color, label in stages(request):
            named = None if label in labels else label
            labels.add(label)
            axes.barh(row, end - start, left=start, height=0.8, color=color, label=named)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlabel("seconds after the start; one bar per request")
    legend(axes, columns=3)
    return svg(figure, "timeline")


def stages(request: dict[str, Any]) -> list[tuple[float, float, str, str]]:
    """(from, to, colour, name) of what is known of a request."""
    due, first, last = request["due"], request["chunks"][0][0], request["chunks"][-1][0]
    if request["queue"] is None:
        return [(due, first, WAIT, "until the first token: queue and prefill"), (first, last, DECODE, "decode")]
    began = min(request["sent"] + request["queue"], first)
    return [(due, began, WAIT, "waits"), (began, first, PREFILL, "prefill"), (first, last, DECODE, "decode")]


def plain(text: str) -> str:
    """Dollar signs would begin a formula, and a leading underscore would hide the label."""
    shown = "".join(c if c.isprintable() else " " for c in text[:40])
    return shown.replace("$", r"\$").lstrip("_") or "–"
