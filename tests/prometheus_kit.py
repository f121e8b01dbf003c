"""A real Prometheus over the project's own files, in which a minute passes in a second."""

import http.client
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from config import ROOT

FOLDER = ROOT / "deploy" / "prometheus"
RULES = ("recording.yml", "alerts.yml")
HASTE = 60  # so many times as fast as it is deployed
DURATION = re.compile(r"\b(\d+)([smh])\b")
SCRAPE = "1s"  # not 15 s / HASTE: a busy machine may take a third of a second for a scrape
START_S = 20.0

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus is installed here (Debian: apt-get install prometheus)"
)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool is installed here (Debian: apt-get install prometheus)"
)


def hastened(text: str) -> str:
    """Every duration HASTE times as short: 1h is 1m, 5m is 5s, 15s is 250ms. Names such as p99_5m stay."""

    def shorter(found: re.Match[str]) -> str:
        number, unit = int(found[1]), found[2]
        return f"{number * 1000 // HASTE}ms" if unit == "s" else f"{number}{'s' if unit == 'm' else 'm'}"

    return DURATION.sub(shorter, text)


def rules(file: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((FOLDER / file).read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text(encoding="utf-8"))


def panel_queries() -> list[tuple[str, str]]:
    """Each panel's title with each of its queries, and what the alerts' marks are drawn from."""
    board = dashboard()
    found = [(panel["title"], one["expr"]) for panel in board["panels"] for one in panel.get("targets", ())]
    return found + [(one["name"], one["expr"]) for one in board["annotations"]["list"] if "expr" in one]


def asked_of_all(query: str) -> str:
    """As Grafana would ask it with All chosen; four scrapes, as its rate interval is, take 5 s at our pace."""
    return hastened(query).replace("$__rate_interval", "5s").replace("$job", ".*").replace("$instance", ".*")


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        return found.getsockname()[1]


class Prometheus:
    """Started at once, with a job for each of `jobs` (job name -> port). Its rules are ours, hastened."""

    def __init__(self, place: Path, jobs: Mapping[str, int]) -> None:
        for file in RULES:
            (place / file).write_text(hastened((FOLDER / file).read_text()))
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE, "evaluation_interval": "250ms"}
        mould = config["scrape_configs"][0]
        config["scrape_configs"] = [
            mould | {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
            for job, port in jobs.items()
        ]
        self.file = place / "prometheus.yml"
        self.file.write_text(yaml.safe_dump(config))
        self.port, self.log, self.began = free_port(), place / "prometheus.log", time.time()
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                ["prometheus", f"--config.file={place}/prometheus.yml", f"--storage.tsdb.path={place}/data",
                 f"--web.listen-address=127.0.0.1:{self.port}", "--query.lookback-delta=5s", "--log.level=warn"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def ready(self) -> "Prometheus":
        end = time.monotonic() + START_S
        while True:
            assert self.popen.poll() is None and time.monotonic() < end, self.log.read_text()
            try:
                if self.fetch("/-/ready")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.05)

    def fetch(self, path: str, **fields: Any) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_S)) as connection:
            connection.request("GET", f"{path}?{urlencode(fields)}" if fields else path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def data(self, path: str, **fields: Any) -> Any:
        status, body = self.fetch(f"/api/v1/{path}", **fields)
        assert status == 200, body
        return json.loads(body)["data"]

    def firing(self) -> list[dict[str, Any]]:
        return [one for one in self.data("alerts")["alerts"] if one["state"] == "firing"]

    def series(self, query: str) -> list[dict[str, Any]]:
        """What a graph of the query shows from the start until now: of each series its labels and finite values."""
        found = self.data("query_range", query=query, start=self.began, end=time.time(), step="500ms")["result"]
        shown = [{"labels": one["metric"], "values": [float(value) for _, value in one["values"]]} for one in found]
        for one in shown:
            one["values"] = [value for value in one["values"] if math.isfinite(value)]
        return [one for one in shown if one["values"]]

    def stop_scraping(self) -> None:
        """And answer queries on: its connections to the services count as theirs."""
        config = yaml.safe_load(self.file.read_text())
        self.file.write_text(yaml.safe_dump(config | {"scrape_configs": []}))
        self.popen.send_signal(signal.SIGHUP)

    def close(self) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


@contextmanager
def watching(place: Path, jobs: Mapping[str, int]) -> Iterator[Prometheus]:
    place.mkdir(parents=True, exist_ok=True)
    prometheus = Prometheus(place, jobs)
    try:
        yield prometheus.ready()
    finally:
        prometheus.close()
