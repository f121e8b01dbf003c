"""deploy/prometheus: its rules are right as rules, and a real Prometheus finds data for them and fires every alert."""

import re
import subprocess

import pytest
import yaml
from alert_play import Play, played
from prometheus_kit import (
    FOLDER,
    asked_of_all,
    dashboard,
    hastened,
    needs_prometheus,
    needs_promtool,
    panel_queries,
    rules,
)

from config import ROOT

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
    text = (ROOT / "RUNBOOK.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors |= set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    assert {alert["annotations"]["runbook"].partition("#")[2] for alert in ALERTS.values()} <= anchors


# ---- a real Prometheus under a real load

# A service that shares its process with two others in trouble, on a busy machine, is late for people and for scrapes.
LATE = {
    "LlmServeEventLoopLate", "LlmServeFirstTokenSlow", "LlmServeTokensSlow", "LlmServePredictionOff", "LlmServeDown",
    "LlmServeNobodyReady",
}  # fmt: skip


@pytest.fixture(scope="module")
def play(checkpoint_folder, tmp_path_factory):
    with played(checkpoint_folder, tmp_path_factory.mktemp("play")) as found:
        yield found


def test_haste_shortens_durations_and_nothing_else():
    text = "for: 5m\nexpr: rate(llmserve:failed:ratio_rate1h[1h]) > 0.5 # 15s, p99_5m, 500 ms"
    assert hastened(text) == "for: 5s\nexpr: rate(llmserve:failed:ratio_rate1h[1m]) > 0.5 # 250ms, p99_5m, 500 ms"


@needs_prometheus
@pytest.mark.slow
def test_every_alert_fires_when_its_trouble_is_real_and_tells_of_it(play: Play):
    assert {name for name, _ in play.fired} == set(ALERTS)
    for (name, job), alert in play.fired.items():
        summary = alert["annotations"]["summary"]
        assert job in summary or "127.0.0.1:" in summary, name
        assert not re.search(r"<|\$|\{|NaN|Inf", summary), name


@needs_prometheus
@pytest.mark.slow
def test_the_service_that_was_well_alarmed_nobody(play: Play):
    assert {name for name, job in play.fired if job == "llmserve-well"} <= LATE
    assert play.prometheus.series('sum(rate(llmserve_requests_total{job="llmserve-well", outcome="ok"}[5s])) > 1')


@needs_prometheus
@pytest.mark.slow
def test_every_recording_rule_has_data(play: Play):
    empty = [record for record in RECORDS if not play.prometheus.series(f'{record}{{job="llmserve-slow"}}')]
    assert empty == []


@needs_prometheus
@pytest.mark.slow
def test_every_rule_could_be_evaluated(play: Play):
    groups = play.prometheus.data("rules")["groups"]
    assert sum(len(group["rules"]) for group in groups) == len(ALERTS) + len(RECORDS)
    assert {
        rule["name"]: rule["lastError"] for group in groups for rule in group["rules"] if rule.get("lastError")
    } == {}


@needs_prometheus
@pytest.mark.slow
def test_every_query_of_the_dashboard_has_data(play: Play):
    empty = {title: query for title, query in panel_queries() if not play.prometheus.series(asked_of_all(query))}
    assert empty == {}


@needs_prometheus
@pytest.mark.slow
def test_the_dashboard_can_choose_every_service_and_replica(play: Play):
    choices = {}
    for variable in dashboard()["templating"]["list"][1:]:
        metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
        asked = {"match[]": metric.replace("$job", ".*"), "start": play.prometheus.began}
        choices[variable["name"]] = play.prometheus.data(f"label/{label}/values", **asked)
    assert choices["job"] == [f"llmserve-{name}" for name in ("odd", "process", "slow", "well")]
    assert len(choices["instance"]) == 4
