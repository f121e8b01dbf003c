"""Day 3's figures: a decode step by its context, with the fitted laws; and the cache's memory by length."""

from pathlib import Path

from lab import kv_figures as figures
from lab.figure_file import FOLDER, drawing, section
from lab.kv_figures import Record
from lab.kv_tables import kinds


def draw(record: Record, folder: Path = FOLDER) -> str:
    """Draw one PNG file with both panels; a Markdown section that names it."""
    path, model = folder / f"{record['id']}-kv.png", record["model"]
    title = f"{model['name']}, {model['dtype']}, {model['device']} [{record['id']}]"
    with drawing(path, title, columns=2, figsize=(12, 4.4)) as panels:
        steps_panel(record, panels[0, 0])
        memory_panel(record, panels[0, 1])
    return section(path)


def steps_panel(record: Record, axes) -> None:
    """Points: the median step at each context. Lines: the law that predicts held-out points best."""
    for i, (cache, attention) in enumerate(kinds(record)):
        points = figures.steps(record, cache, attention)
        axes.plot(
            points.context,
            [1e3 * s for s in points.seconds],
            ".",
            ms=3,
            color=f"C{i}",
            label=f"cache {cache}, {attention}",
        )
        growth = figures.step_growth(record, cache, attention)
        if growth:
            low, high = growth.span
            across = [low + (high - low) * k / 200 for k in range(201)]
            axes.plot(across, [1e3 * growth.law(n) for n in across], "-", lw=1, color=f"C{i}", label=f"{growth.law} s")
    axes.set(title="A decode step by its context", xlabel="tokens of context", ylabel="ms", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def memory_panel(record: Record, axes) -> None:
    """The formula's line up to where the cache outgrows the weights, and the bytes that the runs' caches held."""
    own = record["ledger"]
    held = {t["prompt_len"] + len(t["decode_s"]): t["kv_bytes"] for t in record["trials"] if t["cache"] == "dynamic"}
    ends = [min([*held, own["outgrows_at"]]) / 2, own["outgrows_at"] * 4]
    megabytes = own["token_bytes"] / 1e6
    axes.loglog(ends, [n * megabytes for n in ends], "-", color="C0", label=f"{own['token_bytes']:,} bytes a token")
    if own["kv_heads"] < own["heads"]:
        alone = megabytes * own["heads"] / own["kv_heads"]
        axes.loglog(ends, [n * alone for n in ends], ":", color="C0", label="if every head had its own keys and values")
    axes.axhline(
        own["weight_bytes"] / 1e6, color="grey", ls="--", label=f"weights: outgrown at {own['outgrows_at']:,.0f}"
    )
    axes.loglog(list(held), [size / 1e6 for size in held.values()], "o", color="C1", label="held by the runs' tensors")
    axes.set(title="Memory of the cache by length", xlabel="tokens, of all requests together", ylabel="MB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
