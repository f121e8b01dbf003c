"""deploy/grafana: the dashboard is one that Grafana can read. test_deploy_prometheus.py runs its queries.

How it looks is not tested: there is no Grafana here.
"""

import json
from itertools import combinations
from typing import Any

import pytest
import yaml
from prometheus_kit import dashboard, panel_queries

from config import ROOT

FOLDER = ROOT / "deploy" / "grafana"
WITH_DATA = {"timeseries", "stat", "heatmap", "state-timeline"}
UNITS = {"none", "s", "reqps", "percentunit", "bytes"}


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    at = panel["gridPos"]
    return {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}


def test_it_has_what_grafana_asks_of_a_dashboard():
    board = dashboard()
    assert board["id"] is None, "a number of its own comes from the Grafana that imports it"
    assert 0 < len(board["uid"]) <= 40 and board["title"] and board["schemaVersion"] >= 36
    assert "has not been looked at" in board["description"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


def test_no_panel_lies_on_another_or_beyond_the_edge():
    panels = dashboard()["panels"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    for one, other in combinations(panels, 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])
    rows = [(panel["gridPos"]["y"], panel["title"]) for panel in panels if panel["type"] == "row"]
    assert min(rows)[1] == "Are people served?"


def test_every_panel_says_what_it_shows_in_which_unit_from_the_chosen_source():
    for panel in dashboard()["panels"]:
        assert panel["type"] in WITH_DATA | {"row"}
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"].get("unit", "none") in UNITS
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert sources == [{"type": "prometheus", "uid": "${datasource}"}] * len(sources)
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(letters) == len(set(letters))


def test_every_variable_that_is_used_is_there():
    board = dashboard()
    names = {one["name"] for one in board["templating"]["list"]}
    assert names == {"datasource", "job", "instance"}
    for _, query in panel_queries():
        for name in ("$__rate_interval", "$job", "$instance"):
            query = query.replace(name, "")
        assert "$" not in query
    for _, query in panel_queries():
        assert '{job=~"$job"' in query or 'job=~"$job"}' in query, "it is of the chosen service"


@pytest.mark.parametrize("file", ["datasources/prometheus.yml", "dashboards/llm-infer.yml"])
def test_provisioning_files_have_their_form(file: str):
    found = yaml.safe_load((FOLDER / "provisioning" / file).read_text())
    assert found.pop("apiVersion") == 1
    (entries,) = found.values()
    assert all({"name", "type"} <= set(entry) for entry in entries)


@pytest.mark.parametrize("file", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "deploy").rglob("*.y*ml")))
def test_no_key_stands_twice_in_a_file(file: str):
    """Two people had each added what Grafana needs to compose.yaml; Python takes the last, Docker refuses the file."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            assert len(keys) == len(set(keys)), (keys, node.start_mark)
            return super().construct_mapping(node, deep)

    assert yaml.load((ROOT / file).read_text(encoding="utf-8"), Strict)


def test_the_file_is_written_one_field_a_line():
    """So that a change can be read. Python's json would make 3,000 lines of it, or one."""
    lines = (FOLDER / "dashboard.json").read_text(encoding="utf-8").splitlines()
    assert 300 < len(lines) < 1000
    assert json.loads("\n".join(lines)) == dashboard()
