"""The owner's progress wall: which rows of notes.md's checklists the records prove, and what the others lack.

A row is done when a whole record of the named question lies in results/cited.jsonl (so it was made with --note), from a
trained model and without --quick, and, where the row asks for a written conclusion, when notes.md holds a record of
that question with words under Observations.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.records import read_lines

OPEN, DONE = "☐", "☑"


@dataclass(frozen=True)
class Item:
    """chinese finds the row in notes.md, whatever else stands in it. questions: any of these proves it.

    shows: what a record must hold beside its question. conclusion: it needs words under Observations.
    """

    group: str
    chinese: str
    english: str
    questions: tuple[str, ...]
    conclusion: bool = False
    command: str = ""
    shows: Callable[[dict[str, Any]], bool] = lambda _: True


def batch_sizes(least: int) -> Callable[[dict[str, Any]], bool]:
    return lambda record: len({trial["batch_size"] for trial in record.get("trials", [])}) >= least


def kv_on_and_off(lengths: int) -> Callable[[dict[str, Any]], bool]:
    """At so many prompt lengths, both ways ran and gave the same tokens."""

    def shows(record: dict[str, Any]) -> bool:
        found: dict[int, tuple[set, set]] = {}
        for trial in record.get("trials", []):
            ways, tokens = found.setdefault(trial["prompt_len"], (set(), set()))
            ways.add(trial["cache"] == "off")
            tokens.add(trial["tokens"])
        return sum(len(ways) == 2 and len(tokens) == 1 for ways, tokens in found.values()) >= lengths

    return shows


DAY1, BY_HAND = "day1-one-request", "day1-prefill-decode-by-hand"
BATCH, KV, FLOW, NEXT = "day2-batching", "day3-kv-cache", "architecture", "next-directions"
INFER, INSPECT = "infer.py --note", "inspect_prefill_decode.py --note"
ITEMS = (
    Item("Day1", "记录硬件 + dtype 假设", "record hardware and dtype", (DAY1,), command=INFER),
    Item("Day1", "完成 `infer.py` 并输出分段 STATS", "infer.py prints STATS by stage", (DAY1,), command=INFER),
    Item("Day1", "拆解 generate：prefill vs decode loop", "take generate apart", (BY_HAND,), command=INSPECT),
    Item("Day2", "实现 batcher & 日志（队列等待 + 批大小）", "batcher and its log (queue wait, batch size)", (BATCH,)),
    Item("Day2", "表格化 latency/throughput，对比 3 组 batch", "three batch sizes in a table", (BATCH,),
         shows=batch_sizes(3)),
    Item("Day2", "写出 trade-off 结论（牺牲谁换谁）", "conclusion: who pays for throughput", (BATCH,), True,
         shows=batch_sizes(2)),
    Item("Day3", "复现 KV Cache on/off 实验", "KV cache on and off", (KV,), shows=kv_on_and_off(1)),
    Item("Day3", "绘制 prompt 长度 × latency 表格", "table of prompt length and latency", (KV,),
         shows=kv_on_and_off(3)),
    Item("Day3", "写下“KV Cache 什么时候救命/什么时候吃显存”", "when it saves you, when it eats memory", (KV,), True,
         shows=kv_on_and_off(2)),
    Item("基础 Basics", "明确设备/精度假设（CPU vs GPU / FP32 vs FP16）", "device, precision", (DAY1,), command=INFER),
    Item("基础 Basics", "完成最小推理脚本并打印分段 STATS", "smallest script with STATS", (DAY1,), command=INFER),
    Item("Batch", "实现动态 batcher（固定等待窗口）", "dynamic batcher with a fixed window", (BATCH,)),
    Item("Batch", "给出“牺牲谁换谁”的文字结论", "who pays, in words and numbers", (BATCH,), True, shows=batch_sizes(2)),
    Item("KV Cache", "复现 `past_key_values` on/off 实验", "past_key_values on and off", (KV,), shows=kv_on_and_off(1)),
    Item("系统 System", "绘制简化的推理服务流程图", "diagram of a serving system", (FLOW,)),
    Item("系统 System", "列出下一步扩展方向（Serving、Kernel、系统工程）", "next directions", (NEXT,), True),
)  # fmt: skip


@dataclass(frozen=True)
class State:
    item: Item
    evidence: tuple[str, ...]
    missing: str

    @property
    def done(self) -> bool:
        return not self.missing

    def row(self) -> dict[str, Any]:
        """The same for machines."""
        item = {name: getattr(self.item, name) for name in ("group", "chinese", "english", "questions", "conclusion")}
        return {"item": item, "evidence": self.evidence, "missing": self.missing, "done": self.done}


def observations(notes: str) -> dict[str, str]:
    """Record id -> the words under its Observations. A half-written record has none."""
    found = {}
    for section in re.split(r"(?m)^## Experiment:", notes.replace("\r\n", "\n"))[1:]:
        mark = re.search(r"Evidence\*\*:\s*\[([\w-]+)\]", section)
        words = section.partition("**Observations**")[2].split("\n## ")[0].strip()
        if mark:
            found[mark.group(1)] = words
    return found


def states(notes: str, records: Sequence[dict[str, Any]]) -> list[State]:
    """Every item with its evidence, and what it lacks."""
    words = observations(notes)
    return [state_of(item, words, records) for item in ITEMS]


def state_of(item: Item, words: dict[str, str], records: Sequence[dict[str, Any]]) -> State:
    proofs = [record["id"] for record in records if proves(record, item)]
    if not proofs:
        how = f": run python3 {item.command}" if item.command else ""
        return State(item, (), f"no whole record of {' or '.join(item.questions)}{how}")
    if item.conclusion:
        concluded = [proof for proof in proofs if words.get(proof)]
        if not concluded:
            return State(item, tuple(proofs[-1:]), "no record in notes.md has words under Observations")
        proofs = concluded
    return State(item, tuple(proofs[-1:]), "")


def all_records(notes_file: Path) -> list[dict[str, Any]]:
    """The records whose raw lines are committed beside notes.md: those that a clone finds too."""
    return read_lines(notes_file.parent / "results" / "cited.jsonl")


def proves(record: dict[str, Any], item: Item) -> bool:
    """Interrupted runs, first looks and random weights prove nothing."""
    weak = record.get("partial") or record.get("config", {}).get("quick") or record.get("model", {}).get("timing_only")
    return record.get("question") in item.questions and not weak and item.shows(record)


def ticked(notes: str, wall: Sequence[State]) -> tuple[str, int]:
    """notes.md with the status and evidence cells of its checklist rows set, and how many rows were found.

    Only a table row that holds an item's Chinese words and a box is touched; everything else stays byte for byte.
    """
    lines, found = notes.splitlines(keepends=True), 0
    for i, line in enumerate(lines):
        state = next((s for s in wall if s.item.chinese in line and line.lstrip().startswith("|")), None)
        body = line.rstrip("\r\n")
        cells = body.split("|")
        box = next((k for k, cell in enumerate(cells) if cell.strip() in (OPEN, DONE)), None)
        if state is None or box is None:
            continue
        found += 1
        cells[box] = f" {DONE if state.done else OPEN} "
        if box + 1 < len(cells) and state.done and "[" not in cells[box + 1]:
            cells[box + 1] = f" {cells[box + 1].strip()} [{state.evidence[0]}] ".replace("  ", " ")
        lines[i] = "|".join(cells) + line[len(body) :]
    return "".join(lines), found
