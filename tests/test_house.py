"""The rules of the house: which room may import which, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Rows from below to above: a module may import rows above its own (smaller numbers) and siblings in its own folder.
ROWS = {
    "config": 0, "metrics": 0,
    "lab": 1, "tokenizer": 1, "weights": 1,
    "model": 2,
    "load": 2,  # asks any server: it knows neither the model nor the engine
    "engine": 3,
    "batcher": 3,  # its demonstration runs the model; the class itself knows neither torch nor the model
    "service": 4,
    "infer": 5, "serve": 5, "inspect_prefill_decode": 5, "batch_experiment": 5, "kv_experiment": 5, "report": 5,
    "load_test": 5, "experiments": 5,
    "benchmarks": 6, "conformance": 6,  # they may run the scripts themselves
}  # fmt: skip
TORCH_FREE = ("load.start", "load.looks", "load.mixed", "lab.soak_judge", "lab.soak_tables", "lab.soak_plots",
              "lab.pulse_figures", "lab.pulse_model", "lab.pulse_tables", "lab.pulse_words", "lab.pulse_plots",
              "config", "metrics", "tokenizer", "report", "lab.records", "lab.checklist", "lab.verdict", "lab.roofline",
              "lab.request_tables", "lab.request_words", "lab.console", "lab.fits", "lab.sampler", "weights.find",
              "weights.hub", "weights.room", "weights.gguf_cache", "weights.random_init", "batcher",
              "lab.arrivals", "lab.simulation", "lab.prompts", "lab.batch_trial", "lab.batch_figures",
              "lab.batch_tables", "lab.batch_words", "lab.batch_window", "lab.batch_plots", "lab.kv_figures",
              "engine.request", "engine.kv_blocks", "engine.scheduler", "engine.engine", "engine.text", "engine.step",
              "engine.shape", "engine.settings", "service.foretelling", "service.rates",
              "lab.kv_ledger", "lab.kv_tables", "lab.kv_words", "lab.kv_plots", "service.app", "service.assembly",
              "service.server", "service.capacity", "load_test", "load.drive", "load.measure", "load.server",
              "load.plan", "load.tables", "load.words", "load.prompts", "load.texts", "load.formulas",
              "load.answers", "load.clock", "load.connection", "load.golden", "load.script", "load.selfcheck",
              "load.measures", "lab.wire", "lab.client", "lab.compare", "lab.claims", "lab.claim_documents",
              "lab.report_page", "lab.report_render", "lab.report_figures", "lab.load_runs",
              "lab.availability", "lab.availability_plots", "experiments.replica_kill",
              "experiments.replicas")  # fmt: skip
ROOT_FILES = {"config", "metrics", "tokenizer", "model", "infer", "inspect_prefill_decode", "batcher",
              "batch_experiment", "kv_experiment", "serve", "load_test", "report"}  # fmt: skip


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("*.py"), *(p for room in ROWS for p in (ROOT / room).glob("*.py"))]
    return {str(p.relative_to(ROOT).with_suffix("")).replace("/", "."): p for p in files}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("name", modules())
def test_imports_flow_one_way(name: str):
    room = name.split(".")[0]
    assert room in ROWS, f"{name} stands in no row: add it to ROWS"
    for other in imports_of(modules()[name]):
        other_room = other.split(".")[0]
        if other_room in ROWS and other_room != room:
            assert ROWS[other_room] < ROWS[room], f"{name} may not import {other}"


@pytest.mark.slow
def test_modules_of_a_room_do_not_import_each_other_in_a_circle():
    graph = {name: {o for o in imports_of(path) if o in modules()} for name, path in modules().items()}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        for other in graph[name]:
            visit(other, (*trail, name))

    for name in graph:
        visit(name, ())


def test_the_root_holds_only_its_twelve_files_and_none_hides_the_standard_library():
    stems = {path.stem for path in ROOT.glob("*.py")}
    assert stems <= ROOT_FILES
    assert not stems & sys.stdlib_module_names
    assert not {p.parent.name for p in ROOT.glob("*/__init__.py")} & sys.stdlib_module_names


@pytest.mark.slow
def test_importing_prints_nothing_and_halves_without_torch_load_none():
    """One process per half: what one module loads, another one sees."""
    light = (
        f"import sys, importlib; [importlib.import_module(m) for m in {TORCH_FREE!r}]; print('torch' in sys.modules)"
    )
    everything = sorted(set(modules()) - {"benchmarks.__main__"})
    heavy = f"import importlib; [importlib.import_module(m) for m in {everything!r}]"
    for code, expected in ((light, "False\n"), (heavy, "")):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


def test_torch_is_imported_only_where_tensors_live():
    allowed = {"model", "infer", "inspect_prefill_decode", "kv_experiment"} | {
        f"engine.{room}" for room in ("sampler", "linear", "transformer", "runner", "native", "load")
    }
    for name, path in modules().items():
        if "torch" in {i.split(".")[0] for i in imports_of(path)}:
            assert name in allowed or name.split(".")[0] in ("weights", "lab", "experiments", "benchmarks"), name


@pytest.mark.parametrize("name", modules())
def test_every_module_opens_with_what_it_is_for(name: str):
    assert ast.get_docstring(ast.parse(modules()[name].read_text()))
