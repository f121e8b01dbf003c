"""RUNBOOK.md: every entry is whole, and names only what there is."""

import re
from pathlib import Path

import pytest
import yaml
from fault_play import FAULTS, play
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from config import ROOT
from experiments.soak import SoakConfig
from service.observe import ENDPOINTS, Metrics
from service.settings import ServeConfig

TEXT = (ROOT / "RUNBOOK.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^### (.+)\n((?:(?!#).*\n)*)", TEXT, re.MULTILINE))
PARTS = ("Symptom", "Look at", "Cause", "Remedy", "Shown by")
ALERTS = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
GOLDEN = {"port", "fault", "after"}  # of the server that stands in for another one
GREPPED = {"llmserve_requests", "process_resident", "process_start_time"}  # beginnings of names, and a label
MADE_OF_HISTOGRAMS = ("_bucket", "_count", "_sum", "_created")


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_alert_leads_to_a_heading():
    anchors = {anchor(name) for name in ENTRIES}
    for alert in ALERTS:
        file, _, place = alert["annotations"]["runbook"].partition("#")
        assert file == "RUNBOOK.md" and place in anchors, alert["alert"]


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_has_all_its_parts_each_once_and_a_line_that_was_run(name: str):
    assert tuple(re.findall(r"^\*\*(.+?)\.\*\*", ENTRIES[name], re.MULTILINE)) == PARTS
    shown = ENTRIES[name].partition("**Shown by.**")[2]
    assert re.search(r"^ {4}\S", shown, re.MULTILINE), "nothing that it printed"


def test_every_entry_is_in_the_table_and_every_link_leads_somewhere():
    links = set(re.findall(r"\]\(#([\w-]+)\)", TEXT))
    assert links == {anchor(name) for name in ENTRIES}


def test_every_metric_exists():
    text = generate_latest(Metrics({}).registry).decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    rules = yaml.safe_load((ROOT / "deploy/prometheus/recording.yml").read_text())["groups"]
    recorded = {rule["record"] for group in rules for rule in group["rules"]}
    for name in set(re.findall(r"\b(?:llmserve|process)[_:][\w:]*[a-z0-9]\b", TEXT)):
        plain = name.removesuffix("_total")
        for end in MADE_OF_HISTOGRAMS:
            plain = plain.removesuffix(end)
        assert {name, plain} & (families | recorded) or name in GREPPED, name


def test_every_flag_and_every_variable_exists():
    ours = {name for kind in (ServeConfig, SoakConfig) for name in kind.__dataclass_fields__} | GOLDEN
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])", TEXT)):
        assert flag.replace("-", "_") in ours, f"--{flag}"
    more = {"cache", "fallback_key"}
    for name in set(re.findall(r"LLM_INFER_([A-Z_]+)", TEXT)):
        assert name.lower() in set(ServeConfig.__dataclass_fields__) | more, name


def test_every_route_exists():
    routes = set(ENDPOINTS) | {"/debug/requests", "/debug/requests/ID"}
    for route in set(re.findall(r"(?<=[`S])(/(?:health|metrics|capacity|config|debug|v1)[\w/]*)", TEXT)):
        assert route in routes, route


def test_every_code_and_every_reason_is_in_the_service():
    code = "".join(path.read_text() for path in sorted((ROOT / "service").glob("*.py")))
    code += (ROOT / "deploy/haproxy/haproxy.cfg").read_text()
    for name in set(re.findall(r'"(?:code|outcome|error_code|limit_hit|reason)":"([^"]+)"', TEXT)):
        assert name in code, name


def test_every_test_file_and_play_exists():
    for file, word in re.findall(r"pytest (tests/\w+\.py) -k (\w+)", TEXT):
        assert re.search(rf"^def test_\w*{word}", (ROOT / file).read_text(), re.MULTILINE), f"{file} -k {word}"
    assert {name for name in re.findall(r"fault_play\.py (\w+)", TEXT) if name != "NAME"} == set(FAULTS)
    for path in set(re.findall(r"`((?:deploy|tests)/[\w./-]+)`", TEXT)):
        assert Path(ROOT, path).exists(), path


SAYS = {
    "stalled": '/health/live: 503 {"status":"stalled"', "failed": '/health: {"engine_restarts":1}',
    "quarantined": '"code":"request_quarantined"', "broken": '"broken_laws":["tokens"]',
    "circuit": '"code":"circuit_open"', "memory": '"limit_hit":"memory"', "capped": "x-degraded: max_tokens=8",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_is_played_says_what_the_runbook_says(name: str, capsys):
    play(name)
    assert SAYS[name] in capsys.readouterr().out
