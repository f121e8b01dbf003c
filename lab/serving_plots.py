"""The picture that says it at a glance: a bar per request and way, waiting, prefill and tokens."""

from pathlib import Path
from statistics import median

from lab.batch_plots import DECODE, PREFILL, WAIT
from lab.figure_file import FOLDER, drawing, section
from lab.serving_figures import Record, Trial, makespan_s, tokens_per_s, ways

TOKEN = "#20502a"


def draw(record: Record, folder: Path = FOLDER) -> str:
    """Draw the timelines as a PNG file; a Markdown section that names it."""
    path = folder / f"{record['id']}-timelines.png"
    ways_there, requests = len(ways(record)), len(record["trials"][0]["due_s"])
    model, load = record["model"], record["config"]
    title = (
        f"{model['name']} on {model['device']}: {requests} requests ({load['arrival']}), prompts of up to "
        f"{load['prompt_tokens']} tokens, answers of up to {load['max_new_tokens']} [{record['id']}]"
    )
    size = (11, 0.9 + ways_there * (0.6 + 0.085 * requests))
    with drawing(path, title, ways_there, figsize=size, sharex=True) as panels:
        timelines(record, panels[:, 0])
    return section(path)


def timelines(record: Record, panels) -> None:
    """One panel per way, the same time axis; one bar per request, a tick per token."""
    for axes, (name, trials) in zip(panels, ways(record).items(), strict=True):
        trial = typical(trials)
        for i in range(len(trial["due_s"])):
            bar(axes, trial, i)
        axes.invert_yaxis()
        axes.set_yticks([])
        axes.set_title(f"{name}: {tokens_per_s(trial):.0f} tokens/s", loc="left", fontsize=9)
    panels[-1].set_xlabel("seconds; one bar per request, in order of arrival; a tick is a token in the asker's hands")
    panels[0].legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1.0))


def bar(axes, trial: Trial, i: int) -> None:
    """Grey: waits. Blue: until the first token. Green: until the last one."""
    due, done, tokens = trial["due_s"][i], trial["done_s"][i], trial["token_s"][i]
    began = trial["began_s"][i]
    if "timelines" in trial:
        began = trial["timelines"][i]["slices"][0][0]
    first = tokens[0]
    if "prefill_s" in trial:  # nothing is streamed: where the prefill ended is known from the inside
        first = began + trial["prefill_s"][i]
    began = first if began is None else began  # a server that does not tell
    for start, end, color, label in (
        (due, began, WAIT, "waits"),
        (began, first, PREFILL, "prefill"),
        (first, done, DECODE, "decode"),
    ):
        axes.barh(i, end - start, left=start, height=0.8, color=color, label=label if i == 0 else None)
    axes.plot(tokens, [i] * len(tokens), "|", color=TOKEN, markersize=4, label="token" if i == 0 else None)


def typical(trials: list[Trial]) -> Trial:
    """The trial whose time for all is the median one."""
    middle = median(map(makespan_s, trials))
    return min(trials, key=lambda trial: abs(makespan_s(trial) - middle))
