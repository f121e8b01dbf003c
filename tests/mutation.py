"""Are the tests worth their time? The decisions' code is broken in a thousand small ways; each must make a test fail.

Run by `make mutation` in an environment of its own (requirements-mutation.txt): mutmut changes one operator, number or
text at a time and runs those tests that reach the line. A mutant that no test notices is a rule that nobody checks, or
a change that changes nothing: EQUIVALENT says why for those that were looked at; they count as survivors all the same.

    make mutation                          # all modules: minutes
    make mutation ARGS="limits ladder"     # some of them
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    "breaker": ("test_breaker",),
    "ladder": ("test_ladder",),
    "admission": ("test_admission",),
    "foretelling": ("test_foretelling", "test_admission"),
    "rates": ("test_foretelling", "test_admission"),
    "limits": ("test_limits",),
    "quarantine": ("test_quarantine",),
}
COPIED = ("service", "engine", "config.py", "tests")  # what those modules and their tests import is among it
TARGET = 0.90
KILLED, TIMEOUT = (1, 3), (36, -24, 24, 152, 255)  # mutmut's exit codes; a loop without an end is noticed too
EQUIVALENT = {  # (module, what was changed): why nobody could tell the difference
    ("limits", "Bucket.wait_s: return float('inf') -> return float('INF')"): "the same number",
    (
        "limits",
        "RateLimits.refusal: never = wait_s == float('inf') -> never = wait_s == float('INF')",
    ): "the same number",
    (
        "quarantine",
        "fingerprint: return hashlib.sha256(repr(choosing).encode() + array('q', prompt).tobytes()).digest() -> "
        "return hashlib.sha256(repr(choosing).encode() + array('Q', prompt).tobytes()).digest()",
    ): "token ids are never negative: the same bytes",
    (
        "quarantine", "Quarantine.struck: self.suspects.popitem(last=False) -> self.suspects.popitem(last=None)",
    ): "both are no",
}  # fmt: skip


def main(wanted: list[str]) -> int:
    unknown = [name for name in wanted if name not in MODULES]
    if unknown:
        print(f"{', '.join(unknown)}: no such module; there are {', '.join(MODULES)}.", file=sys.stderr)
        return 2
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        run(Path(place), wanted or list(MODULES))
        found = {name: verdicts(Path(place), name) for name in wanted or MODULES}
        print(report(found, Path(place), time.monotonic() - begin_s))
    return int(any(score(codes) < TARGET for codes in found.values()))


def run(place: Path, names: list[str]) -> None:
    """mutmut, on a copy: it leaves folders behind, and its settings would be everybody's in pyproject.toml."""
    for one in COPIED:
        copy = shutil.copytree if (ROOT / one).is_dir() else shutil.copy
        copy(ROOT / one, place / one)
    tests = sorted({f"tests/{test}.py" for name in names for test in MODULES[name]})
    lines = ["[mutmut]", "source_paths=service", "also_copy="]
    lines += [f"    {one}" for one in COPIED if one not in ("service", "tests")]
    lines += ["only_mutate=", *(f"    service/{name}.py" for name in names)]
    lines += ["pytest_add_cli_args=", "    -p", "    no:cacheprovider", "    -m", "    not slow"]
    lines += ["pytest_add_cli_args_test_selection=", *(f"    {test}" for test in tests)]
    (place / "setup.cfg").write_text("\n".join([*lines, ""]))
    (place / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    with (place / "log").open("w") as log:  # a progress bar of megabytes
        done = subprocess.run(
            [Path(sys.executable).parent / "mutmut", "run"], cwd=place, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    if done.returncode:
        lines = (place / "log").read_text().replace("\r", "\n").splitlines()
        said = [line for line in lines if line.isascii()]  # without the progress bar
        raise SystemExit(
            "\n".join(said[-60:]) + f"\nmutmut ended with status {done.returncode}: its last words are above."
        )


def verdicts(place: Path, name: str) -> dict[str, int]:
    """Exit code by mutant."""
    return json.loads((place / f"mutants/service/{name}.py.meta").read_text())["exit_code_by_key"]


def killed(codes: dict[str, int]) -> int:
    return sum(code in KILLED + TIMEOUT for code in codes.values())


def score(codes: dict[str, int]) -> float:
    return killed(codes) / len(codes)


def report(found: dict[str, dict[str, int]], place: Path, took_s: float) -> str:
    lines = [
        "| module      | mutants | killed | of them by time | survived | said to be equivalent | score |",
        "|:------------|--------:|-------:|----------------:|---------:|----------------------:|------:|",
    ]
    rest = []
    for name, codes in found.items():
        changes = list(survivors(place, name, codes))
        said = [change for change in changes if (name, change) in EQUIVALENT]
        late = sum(code in TIMEOUT for code in codes.values())
        lines.append(
            f"| {name:11} | {len(codes):7} | {killed(codes):6} | {late:15} | {len(changes):8} | {len(said):21} | "
            f"{score(codes):5.1%} |"
        )
        rest += [f"{name}: {change}" for change in changes if change not in said]
        rest += [f"{name}: {change}   (equivalent: {EQUIVALENT[name, change]})" for change in said]
    return "\n".join([*lines, "", f"{took_s:.0f} s. Survivors:", *rest])


def survivors(place: Path, name: str, codes: dict[str, int]) -> Iterator[str]:
    """What was changed, and no test noticed: the lines of code before and after."""
    tree = ast.parse((place / f"mutants/service/{name}.py").read_text())
    bodies = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for mutant, code in codes.items():
        if code not in KILLED + TIMEOUT:
            function = mutant.rpartition(".")[2]
            stem = function.rpartition("__mutmut_")[0]
            before, after = (ast.unparse(bodies[one]).splitlines()[1:] for one in (f"{stem}__mutmut_orig", function))
            yield f"{stem.lstrip('x_ǁ').replace('ǁ', '.')}: {difference(before, after)}"


def difference(before: list[str], after: list[str]) -> str:
    while before and after and before[0] == after[0]:
        before, after = before[1:], after[1:]
    while before and after and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    return " -> ".join(" ".join(line.strip() for line in part) or "nothing" for part in (before, after))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
