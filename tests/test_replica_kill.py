"""The kills: what is kept when HAProxy's page is late, a replica stays away, or somebody has had enough."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from process_kit import until

from config import ROOT, UserError
from experiments import replica_kill
from experiments.replica_kill import Chaos, ReplicaKillConfig
from experiments.replicas import NAMES
from lab import availability
from lab.records import read_lines
from load import golden
from load.script import Script


class Replica:
    """Dies and comes back at once. begun: called at its new start. error: why it ends again instead."""

    def __init__(self, begun: Callable[[], object] = lambda: None, error: str | None = None) -> None:
        self.begun, self.error, self.alive = begun, error, True

    def kill(self) -> None:
        self.alive = False

    def start(self) -> None:
        self.alive = self.error is None
        self.begun()

    def ready(self) -> bool:
        if self.error:
            raise UserError(self.error)
        return self.alive


class Balancer:
    """Sees at once who is alive. late: so many times its page does not come."""

    def __init__(self, replicas: dict[str, Replica], url: str = "", late: int = 0) -> None:
        self.replicas, self.url, self.late = replicas, url, late

    def table(self) -> dict[str, dict[str, str]]:
        self.late -= 1
        if self.late >= 0:
            raise TimeoutError("timed out")
        return {name: {"wredis": "3"} for name in NAMES}

    def state(self, name: str) -> str:
        return "UP" if self.replicas[name].alive else "DOWN"


def chaos_after(seconds: float, *, kills: int, late: int = 0, **wishes: Any) -> Chaos:
    """Of a load that began so long ago. wishes: of replica-1."""
    replicas = {NAMES[0]: Replica(**wishes), NAMES[1]: Replica()}
    config = ReplicaKillConfig(kills=kills, period=40.0, dead=0.1)
    chaos = Chaos(config, Balancer(replicas, late=late), replicas)
    chaos.start_s = time.perf_counter() - seconds
    chaos.began.set()
    return chaos


def test_the_eighth_kill_is_waited_for_like_the_first():
    """It came 300 s after the load's start, and by then its replica was to be back: nobody looked whether it was."""
    chaos = chaos_after(310, kills=8)
    chaos.one(7)
    (kill,) = chaos.kills
    assert 310 < kill["killed"] < kill["down"] < kill["started"] < kill["ready"] < kill["up"] < 320
    assert kill["replica"] == NAMES[1] and kill["sent_again"] == 0


def test_a_round_that_is_over_has_no_kill():
    """After a long start kills came late: in the next round, or when nobody sent requests any more."""
    chaos = chaos_after(85, kills=2)
    chaos.run()
    assert chaos.kills == [] and chaos.error is None and all(one.alive for one in chaos.replicas.values())


def test_a_page_that_does_not_come_costs_a_number_and_no_kill():
    """It ended the thread that kills, and nobody was told."""
    chaos = chaos_after(20, kills=1, late=1)
    chaos.run()
    (kill,) = chaos.kills
    assert chaos.error is None and kill["up"] is not None and kill["sent_again"] is None


def test_what_else_goes_wrong_in_it_is_told():
    def broken() -> None:
        raise KeyError("replica-1")

    chaos = chaos_after(20, kills=2, begun=broken)
    chaos.run()
    assert chaos.error == "KeyError('replica-1')" and chaos.ended.is_set() and len(chaos.kills) == 1


def test_after_a_replica_that_does_not_come_back_the_other_one_is_not_killed():
    chaos = chaos_after(20, kills=2, error="replica-1 did not start")
    chaos.run()
    (kill,) = chaos.kills
    assert chaos.error == "replica-1 did not start" and kill["up"] is None and kill["sent_again"] == 0
    assert chaos.replicas[NAMES[1]].alive


def measured(begun: Callable[[], object] = lambda: None, error: str | None = None) -> tuple[dict[str, Any], int]:
    """(what two seconds of load leave, with a kill in their middle; how many requests came to the server)."""
    with golden.serve(Script(first_s=0.4, gap_s=0.0)) as server:
        replicas = {NAMES[0]: Replica(begun, error), NAMES[1]: Replica()}
        config = ReplicaKillConfig(kills=1, period=2.0, dead=0.1)
        found = replica_kill.measure(config, Balancer(replicas, server.url), replicas, "golden", 30.0)
        return found, len(server.served) - 4  # without those that warm up


@pytest.mark.slow
def test_ctrl_c_makes_no_lost_requests_of_those_in_flight():
    """They got nothing at all, and so every interrupted run said BROKEN."""
    found, came = measured(begun=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert found["partial"] and found["error"] is None and 0 < len(found["requests"]) < came
    assert {one["kind"] for one in found["requests"]} == {"answered"}
    assert "HOLDS, 0 of" in availability.sentences(found)[0]


@pytest.mark.slow
def test_a_replica_that_ends_at_its_second_start_is_a_result():
    """All that had been measured was thrown away."""
    found, came = measured(error="replica-1 did not start (status 1).")
    assert found["partial"] and len(found["requests"]) == came > 20
    assert {one["kind"] for one in found["requests"]} == {"answered"}
    said = availability.sentences(found)
    assert "The kills ended with an error: replica-1 did not start (status 1)." in said
    assert any("not every replica came back" in one for one in said) and availability.sections(found)


# Stands in for HAProxy's page, where there may be none: both replicas are always there. Nobody takes the requests.
PAGE = f"""#!{sys.executable}
import http.server, os

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"# pxname,svname,status,wredis\\nreplicas,replica-1,UP,0\\nreplicas,replica-2,UP,0\\n")

host, port = os.environ["LB_STATS_BIND"].split(":")
http.server.HTTPServer((host, int(port)), Page).serve_forever()
"""


def children(process: subprocess.Popen) -> dict[int, str]:
    """Number -> command line of those that live."""
    found = {}
    for one in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):
            found[one.pid] = " ".join(one.cmdline())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_told_to_end_leaves_no_process_and_keeps_the_kill(checkpoint_folder, tmp_path, number):
    """After SIGTERM two serve.py and HAProxy lived on. Ctrl-C, which a terminal gives the whole group, hit them too."""
    (tmp_path / "haproxy").write_text(PAGE)
    (tmp_path / "haproxy").chmod(0o755)
    record_file, seen = tmp_path / "record.jsonl", {}
    wishes = ["--kills", "1", "--period", "20", "--dead", "0.1", "--rate", "5", "--kv-memory", "0.02",
              "--model", str(checkpoint_folder), "--json", str(record_file)]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.replica_kill", *wishes], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip

    def again() -> bool:
        """Whether a third serve.py has been started, in the place of the killed one."""
        assert process.poll() is None, process.stderr.read()
        seen.update(children(process))
        return sum("serve.py" in line for line in seen.values()) == 3

    try:
        until(again, "for the killed replica's new start", 120, 0.05)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err, err
        assert [line for pid, line in seen.items() if psutil.pid_exists(pid)] == []
        (record,) = read_lines(record_file)
        assert record["partial"] and record["error"] is None and len(record["kills"]) == 1
        assert all(one["error"] != "interrupted" for one in record["requests"])
    finally:
        process.kill()
        process.communicate()
        for pid in seen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
