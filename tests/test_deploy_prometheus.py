"""deploy/prometheus: its rules are right as rules, and a real Prometheus finds data for them and fires every alert."""

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from config import ROOT

FOLDER = ROOT / "deploy" / "prometheus"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool is installed here (Debian: apt-get install prometheus)"
)


def rules(file: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((FOLDER / file).read_text())["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}
RECORDS = [rule["record"] for rule in rules("recording.yml")]


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
@pytest.mark.slow
def test_promtool_finds_no_fault_in_the_files():
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")
    for file in ("recording.yml", "alerts.yml"):
        assert f"SUCCESS: {len(rules(file))} rules found" in promtool("check", "rules", file)


@needs_promtool
@pytest.mark.slow
def test_every_alert_fires_when_it_should_and_not_before():
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


def test_every_alert_has_a_unit_test_in_which_it_fires_and_one_look_in_which_nothing_does():
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    for one in tests:
        assert any(look["exp_samples"] == [] for look in one["promql_expr_test"]) or "burst" in one["name"], one["name"]
    fired = re.findall(
        r'alertname="(\w+)"', str([look["exp_samples"] for t in tests for look in t["promql_expr_test"]])
    )
    assert set(fired) == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_why_and_where_to_read_on(name: str):
    alert = ALERTS[name]
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert notes["runbook"] == f"RUNBOOK.md#{name.lower()}"
    assert len(notes["summary"]) < 120 and notes["description"].endswith(".")
    assert "$labels." in notes["summary"], "whose it is"


def test_the_runbook_has_an_entry_for_every_alert():
    runbook = ROOT / "RUNBOOK.md"
    if not runbook.exists():
        pytest.skip("there is no RUNBOOK.md yet")
    text = runbook.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors |= set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    assert {alert["annotations"]["runbook"].partition("#")[2] for alert in ALERTS.values()} <= anchors
