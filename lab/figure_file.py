"""Figures as PNG files beside the records: what all experiments' --figure have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from config import ROOT

FOLDER = ROOT / "results" / "figures"


@contextmanager
def drawing(path: Path, title: str, rows: int = 1, columns: int = 1, **wishes: Any) -> Iterator[Any]:
    """An array (rows, columns) of panels to draw on; what is on them in the end is written to the path."""
    import matplotlib

    matplotlib.use("Agg")  # draws into files; asks no display
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(rows, columns, layout="constrained", squeeze=False, **wishes)
    figure.suptitle(title, fontsize=10)
    try:
        yield panels
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)


def section(*paths: Path) -> str:
    """A Markdown section that shows them, named from the project's folder where they lie in it."""
    shown = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else path for path in paths]
    images = "\n".join(f"![{path.stem}]({path})" for path in shown)
    return f"### Figure{'s' if len(paths) > 1 else ''}\n\n{images}"
