"""What systemd hears of the service, on a datagram socket that stands in for its own."""

import asyncio
import os
import signal
import socket
import time

import pytest
from process_kit import Process, until
from service_kit import served

from service.notify import Notifier

OK = {"status": "ok", "last_step_age_s": 0.0}
STALLED = {"status": "stalled", "last_step_age_s": 73.0}


class Systemd:
    """Its side of the socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(60)

    def hears(self) -> list[str]:
        return self.socket.recv(4096).decode().split("\n")

    def heard(self) -> list[list[str]]:
        """All that is there by now."""
        self.socket.setblocking(False)
        found = []
        try:
            while True:
                found.append(self.socket.recv(4096).decode().split("\n"))
        except BlockingIOError:
            self.socket.settimeout(60)
            return found


@pytest.fixture(params=["path", "abstract"])
def systemd(request, tmp_path):
    address = str(tmp_path / "notify") if request.param == "path" else f"@llm-infer-{os.getpid()}"
    found = Systemd(address)
    yield found
    found.socket.close()


def test_lines_go_to_a_path_and_to_an_abstract_address(systemd):
    Notifier(systemd.address).say("READY=1", "STATUS=serving")
    assert systemd.hears() == ["READY=1", "STATUS=serving"]


def test_where_nobody_listens_nothing_is_sent_and_nothing_fails(tmp_path, caplog):
    Notifier().say("READY=1")
    assert caplog.text == ""
    Notifier(str(tmp_path / "nobody")).say("READY=1")
    assert "systemd could not be told READY=1" in caplog.text


@pytest.mark.parametrize(
    ("said", "watchdog_s"),
    [({"WATCHDOG_USEC": "30000000"}, 30.0), ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
     ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None), ({"WATCHDOG_USEC": "0"}, None),
     ({"WATCHDOG_USEC": "soon"}, None), ({}, None)],
)  # fmt: skip
def test_the_watchdogs_time_is_its_own_process_only(said, watchdog_s):
    assert Notifier.of(said | {"NOTIFY_SOCKET": "/run/notify"}) == Notifier("/run/notify", watchdog_s)


def test_signs_of_life_stop_while_there_is_none_and_say_why(tmp_path):
    systemd = Systemd(str(tmp_path / "notify"))
    states = iter([OK, OK, STALLED, STALLED, OK, *[OK] * 1000])
    seen: list[list[str]] = []

    async def until_back() -> None:
        beating = asyncio.create_task(Notifier(systemd.address, 0.01).beat(lambda: next(states)))
        while not any("STATUS=serving" in lines for lines in seen):
            seen.extend(systemd.heard())
            await asyncio.sleep(0.001)
        beating.cancel()

    asyncio.run(until_back())
    systemd.socket.close()
    assert seen[:4] == [["WATCHDOG=1"], ["WATCHDOG=1"], ["STATUS=stalled: the last step is 73 s old"],
                        ["WATCHDOG=1", "STATUS=serving"]]  # fmt: skip


@pytest.mark.slow
def test_b71_an_engine_that_stands_still_is_silent_until_it_moves_again(checkpoint_folder, tmp_path, monkeypatch):
    systemd = Systemd(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
    monkeypatch.setenv("WATCHDOG_USEC", "90000")
    with served(checkpoint_folder, stall_after=0.3) as service:
        assert systemd.hears() == ["READY=1", "STATUS=serving"]
        assert systemd.hears() == ["WATCHDOG=1"]
        service.runner.hold()
        asked = service.later(service.chat)
        service.runner.in_step.wait(20)
        until(lambda: any("stalled" in line for lines in systemd.heard() for line in lines), "for its last word")
        time.sleep(0.3)
        assert systemd.heard() == []
        service.runner.go()
        assert asked.result().status == 200
        assert systemd.hears() == ["WATCHDOG=1", "STATUS=serving"]
    systemd.socket.close()


@pytest.mark.slow
def test_b73_a_process_says_ready_when_it_serves_and_stopping_when_it_is_told_to_end(checkpoint_folder, tmp_path):
    systemd = Systemd(str(tmp_path / "notify"))
    said = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "3000000"}
    process = Process(checkpoint_folder, "--native", "off", place=tmp_path / "process", **said)
    try:
        assert systemd.hears() == ["READY=1", "STATUS=serving"]
        assert process.ready().ask("/health/ready").status == 200
        assert systemd.hears() == ["WATCHDOG=1"]
        process.signal(signal.SIGTERM)
        until(lambda: ["STOPPING=1", "STATUS=finishing what runs"] in systemd.heard(), "for the word")
        assert process.ended(10) == 0
    finally:
        process.close()
        systemd.socket.close()
