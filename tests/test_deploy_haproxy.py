"""deploy/haproxy/haproxy.cfg with two real replicas behind it: killed, ended, stopped, cut off, asked too much."""

import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest
from process_kit import SMALL, longer, until
from prometheus_client.parser import text_string_to_metric_families
from replica_kit import (
    CHAT,
    House,
    answering,
    asked,
    asked_at_once,
    bodies,
    kinds,
    needs_haproxy,
    piped,
    served_by,
    under_load,
)
from service_kit import chat_body, raw_request, read_all, read_until

from experiments import replica_kill
from experiments.replicas import Balancer, free_ports, pair
from lab.availability import failed, kind_of
from lab.client import closed_loop
from load import server

pytestmark = pytest.mark.slow

LONG = {"max_tokens": 4000, "ignore_eos": True}  # seconds of work
SLOTS, PLACES = 8, 24  # of each replica: as many run, and 16 more wait


@pytest.fixture(scope="module")
def folder(checkpoint_folder, tmp_path_factory):
    return longer(checkpoint_folder, tmp_path_factory.mktemp("long") / "tiny", 100_000)


@pytest.fixture(scope="module")
def started(folder, tmp_path_factory):
    needs_haproxy()
    place = tmp_path_factory.mktemp("replicas")
    patient = ["--queue-timeout", "120"]  # a machine that is busy with other tests is no full one
    with pair(["--model", str(folder), *SMALL, "--max-running", str(SLOTS), *patient], place) as (balancer, replicas):
        yield House(balancer, replicas, place)


@pytest.fixture
def house(started):
    """The same two for all tests, whatever became of them before."""
    return started.heal()


def stream_on(port: int, **wishes) -> tuple[socket.socket, str]:
    """A long stream that has begun to speak, and who serves it."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(raw_request(CHAT, chat_body("count", stream=True, **LONG | wishes)))
    head = read_until(connection, b'"content":"')
    return connection, re.search(rb"x-served-by: (\S+)", head)[1].decode()


def streams_on_both(port: int, **wishes) -> dict[str, socket.socket]:
    """One on each replica: the second goes where fewer are."""
    found = {}
    for _ in range(2):
        connection, name = stream_on(port, **wishes)
        found[name] = connection
    assert len(found) == 2
    return found


# ---- what is there when nothing is wrong


def test_both_replicas_answer_and_say_which_one_it_was(house):
    traces = asked(house.balancer.url, bodies(8, 20), 0.02)
    assert kinds(traces) == {"answered": 8} and served_by(traces) == {"replica-1", "replica-2"}


def test_a_request_has_one_id_for_the_client_the_balancer_and_the_replica(house):
    url, log = house.balancer.url + CHAT, house.balancer.log

    def ids(**headers: str) -> str:
        asked_for = Request(url, json.dumps(chat_body()).encode(), {"Content-Type": "application/json"} | headers)
        with urlopen(asked_for, timeout=30) as answer:
            return answer.headers["x-request-id"]

    assert ids(**{"X-Request-Id": "mine-1"}) == "mine-1"
    made = ids()
    assert made.startswith("lb-") and ids(**{"X-Request-Id": "not one, but words"}).startswith("lb-")
    until(lambda: f"id={made} " in log.read_text(), "for HAProxy's line")
    assert until(lambda: house.line(made), "for the replica's line")["outcome"] == "ok"


def test_prometheus_finds_the_balancers_own_figures(house):
    page = server.get(f"http://127.0.0.1:{house.balancer.stats_port}", "/metrics", {}).decode()
    found = {one.name: one for one in text_string_to_metric_families(page)}
    up = [one for one in found["haproxy_server_status"].samples if one.labels["state"] == "UP" and one.value == 1]
    assert {one.labels["server"] for one in up} == {"replica-1", "replica-2"}
    assert {"haproxy_server_retry_warnings", "haproxy_server_redispatch_warnings"} <= found.keys()


def test_where_no_replica_is_there_openais_clients_are_told_what_they_understand(tmp_path):
    needs_haproxy()
    nobody = Balancer([f"127.0.0.1:{port}" for port in free_ports(2)], tmp_path / "log")
    try:
        nobody.start()
        with pytest.raises(openai.InternalServerError) as caught:
            client = openai.OpenAI(base_url=f"{nobody.url}/v1", api_key="none", max_retries=0)
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
        assert (caught.value.status_code, caught.value.code) == (503, "no_replica")
        told = caught.value.response.headers
        assert told["x-should-retry"] == "true" and told["retry-after"] == "1" and told["x-request-id"]
    finally:
        nobody.close()


def test_the_checks_two_questions_keep_a_full_replica_spare_a_draining_one_and_drop_a_dead_one(tmp_path):
    needs_haproxy()
    alive, ready = (200, '{"status":"ok"}'), (200, '{"ready":true,"reason":null}')
    turns = [
        ("NOLB", "L7OKC", alive, (503, '{"ready":false,"reason":"drain"}')),
        ("UP", "L7OK", alive, (503, '{"ready":false,"reason":"full"}')),
        ("DOWN", "L7STS", (503, '{"status":"stalled"}'), ready),
        ("UP", "L7OK", alive, ready),
    ]
    with answering({}) as pages, answering({}) as others:
        for one in (pages, others):
            one["/health/live"], one["/health/ready"] = alive, ready
        balancer = Balancer([f"127.0.0.1:{one['port']}" for one in (pages, others)], tmp_path / "log")
        try:
            balancer.start()
            for state, check, pages["/health/live"], pages["/health/ready"] in turns:
                until(lambda state=state: balancer.state("replica-1") == state, f"for {state}")
                assert balancer.table()["replica-1"]["check_status"].removeprefix("* ") == check
        finally:
            balancer.close()


# ---- replicas that end, hang, or are full


def test_b73_a_killed_replica_costs_nobody_who_had_not_begun_and_comes_back(folder, tmp_path):
    needs_haproxy()
    record_file = tmp_path / "record.jsonl"
    wishes = ["--kills", "1", "--period", "8", "--dead", "3", "--rate", "10", "--max-new-tokens", "200",
              "--kv-memory", "0.02", "--model", str(folder), "--json", str(record_file)]  # fmt: skip
    assert replica_kill.main(wishes) == 0
    record = json.loads(record_file.read_text())
    kill, requests = record["kills"][0], record["requests"]
    assert len(requests) > 40 and failed(requests) == [], record["verdicts"]
    assert all(one["kind"] in ("answered", "cut") for one in requests), record["verdicts"]
    assert all(one["replica"] == kill["replica"] for one in requests if one["kind"] == "cut")
    assert kill["killed"] < kill["down"] < kill["killed"] + 5 and kill["ready"] <= kill["up"]
    since = {one["replica"] for one in requests if one["due"] > kill["down"] and one["end"] < kill["started"]}
    assert since <= {"replica-2"}
    assert "HOLDS, 0 of" in record["verdicts"][0]


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGTERM]], ids=["killed", "ended"])
def test_b73_streams_that_wait_in_the_queue_of_a_replica_that_ends_are_answered_by_the_other(house, signals: list[int]):
    """Nothing of them has been sent before their first token. Two signals: it gives up at once whom it has inside."""
    with (
        house.another() as balancer,
        ThreadPoolExecutor(1) as pool,
    ):  # one that gives both the same share from the start
        streams = streams_on_both(balancer.port, n=SLOTS)  # all that runs at a time
        with streams.pop("replica-1") as cut, streams.pop("replica-2") as other:
            bodies = [chat_body(f"waits {i}", stream=True) for i in range(4)]
            waiting = pool.submit(asked_at_once, balancer.url, bodies)
            until(lambda: all(house.figure(name, "waiting") >= 1 for name in house.replicas), "for both queues")
            for number in signals:
                house.signal("replica-1", number)
                time.sleep(0.2)
            assert b"[DONE]" not in read_all_chunks(cut)
            other.close()  # and there is room
            traces = waiting.result()
        assert kinds(traces) == {"answered": 4} and served_by(traces) == {"replica-2"}
        assert int(balancer.table()["replica-1"]["wredis"]) >= 1
    house.replicas["replica-1"].process.wait(20)


def test_b73_a_replica_that_is_told_to_end_is_missed_by_nobody(house):
    traces = under_load(house.balancer.url, lambda: house.signal("replica-1", signal.SIGTERM))
    assert kinds(traces) == {"answered": len(traces)}
    assert house.replicas["replica-1"].process.wait(20) == 0
    house.heal()
    assert served_by(asked(house.balancer.url, bodies(30, 20), 0.02)) == {"replica-1", "replica-2"}


def test_a_long_stream_outlives_the_drain_of_its_replica_and_its_readiness(house):
    """With /health/ready alone as the check, its "not ready" was "down", and down cuts what the drain waits for."""
    streams = streams_on_both(house.balancer.port)
    house.signal("replica-2", signal.SIGTERM)
    house.await_state("replica-2", "NOLB")
    for connection in streams.values():
        with connection:
            rest = read_all_chunks(connection)
            assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert house.replicas["replica-2"].process.wait(20) == 0


def read_all_chunks(connection: socket.socket) -> bytes:
    """To the end of the body, or of the connection."""
    found = b""
    while not found.endswith(b"\r\n0\r\n\r\n") and (piece := connection.recv(65536)):
        found += piece
    return found


def test_a_replica_that_hangs_is_taken_out_its_streams_end_and_what_waits_is_answered_elsewhere(house):
    streams = streams_on_both(house.balancer.port)
    house.signal("replica-1", signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asked, house.balancer.url, [chat_body(str(i)) for i in range(6)], 0.02)
        with streams.pop("replica-1") as connection:
            cut = read_all(connection)
        traces = waiting.result()
    assert not cut.endswith(b"0\r\n\r\n") and b"[DONE]" not in cut, "the missing last chunk is what its client sees"
    assert kinds(traces) == {"answered": 6} and served_by(traces) == {"replica-2"}
    with streams.pop("replica-2") as connection:
        assert b"data: [DONE]" in read_all_chunks(connection)
    house.signal("replica-1", signal.SIGCONT)
    house.await_state("replica-1", "UP")
    until(lambda: house.figure("replica-1", "running") == 0, "for nothing to be computed for those who were cut off")


def test_two_full_replicas_refuse_in_their_own_words_and_stay_in_rotation(house):
    wishes = [chat_body(str(i), max_tokens=600, ignore_eos=True) for i in range(3 * PLACES)]
    traces = asked_at_once(house.balancer.url, wishes)
    found = kinds(traces)
    assert (
        found["answered"] >= 2 * PLACES and found["refused"] > 0 and found["answered"] + found["refused"] == len(traces)
    )
    refused = [trace for trace in traces if kind_of(trace) == "refused"]
    assert {trace.events[0][1]["error"]["code"] for trace in refused} == {"server_overloaded"}
    assert all(trace.status == 503 and "retry-after" in trace.headers for trace in refused)
    assert {row["status"] for row in house.balancer.table().values()} == {"UP"}


# ---- a bad network


def test_a_cut_connection_is_an_error_for_openais_client_and_the_end_of_a_raw_one(house):
    with piped(house) as (pipe, balancer):
        client = openai.OpenAI(base_url=f"{balancer.url}/v1", api_key="none", max_retries=0)
        streams = streams_on_both(balancer.port)
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "count"}], max_tokens=4000, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        served = stream.response.headers["x-served-by"]
        next(iter(stream))
        whole = chat_body("in one piece", max_tokens=1500, ignore_eos=True)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(closed_loop, balancer.url + CHAT, [whole] * 4, 4)
            until(lambda: int(balancer.table()["replica-1"]["scur"]) >= 3, "for requests on both")
            pipe.cut()
            traces = waiting.result()
        with streams.pop("replica-1") as connection:
            raw = read_all(connection)
        assert not raw.endswith(b"0\r\n\r\n") and b"[DONE]" not in raw
        if served == "replica-1":
            with pytest.raises(openai.APIConnectionError):
                list(stream)
        else:
            stream.close()
        streams.pop("replica-2").close()
        assert kinds(traces) == {"answered": 4}, "no byte of theirs had come"
        assert int(balancer.table()["replica-1"]["wredis"]) >= 1


def test_a_stream_that_still_waits_is_answered_elsewhere_when_its_replica_is_cut_off(house):
    with piped(house) as (pipe, balancer), ThreadPoolExecutor(1) as pool:
        running = [stream_on(balancer.port)[0] for _ in range(2 * SLOTS)]
        waiting = pool.submit(asked_at_once, balancer.url, [chat_body(str(i), stream=True) for i in range(6)])
        until(lambda: house.figure("replica-1", "waiting") >= 1, "for one that waits there")
        pipe.cut()
        traces = waiting.result()
        assert int(balancer.table()["replica-1"]["wredis"]) >= 1
        for connection in running:
            connection.close()
    assert kinds(traces) == {"answered": 6}


def test_a_request_that_is_too_long_to_be_kept_is_lost_with_an_error_that_openais_clients_send_again(house):
    padded = json.dumps(chat_body("long", max_tokens=4000, ignore_eos=True)).encode() + b" " * 100_000
    with piped(house) as (pipe, balancer), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(posted, balancer.url + CHAT, padded) for _ in range(2)]
        until(lambda: balancer.table()["replica-1"]["scur"] == "1", "for one on each")
        until(lambda: house.figure("replica-1", "running") == 1, "for it to run")
        pipe.cut()
        found = {status: (headers, body) for status, headers, body in (one.result() for one in waiting)}
    assert set(found) == {200, 502}
    headers, body = found[502]
    assert body["error"]["code"] == "replica_lost" and headers["x-should-retry"] == "true"


def posted(url: str, raw: bytes) -> tuple[int, dict[str, str], dict]:
    try:
        with urlopen(Request(url, raw, {"Content-Type": "application/json"}), timeout=30) as answer:
            return answer.status, dict(answer.headers), json.load(answer)
    except HTTPError as error:
        with error:
            return error.code, dict(error.headers), json.load(error)


def test_late_packets_and_a_slow_line_change_no_answer(house):
    for bad in ({"delay_s": 0.15}, {"bytes_per_s": 40_000.0}):
        with piped(house, **bad) as (_, balancer):
            traces = asked(balancer.url, bodies(8, 20), 0.05)
            assert kinds(traces) == {"answered": 8} and served_by(traces) == {"replica-1", "replica-2"}, bad
            assert {row["status"] for row in balancer.table().values()} == {"UP"}


def test_b64_b65_a_client_that_hardly_reads_is_let_go_and_what_it_asked_for_ends(house):
    with house.another(LB_READER_TIMEOUT="2s") as balancer, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", balancer.port))
        wish = chat_body("much", stream=True, max_tokens=9_000, ignore_eos=True, n=4)
        connection.sendall(raw_request(CHAT, wish, "X-Request-Id: hardly-reads"))
        until(lambda: connection.recv(1) and house.line("hardly-reads"), "for its end at the replica", every_s=1.0)
        assert house.line("hardly-reads")["outcome"] == "cancelled"
        assert kinds(asked(balancer.url, bodies(6, 20), 0.02)) == {"answered": 6}


@pytest.mark.parametrize("stream", [True, False])
def test_b61_a_client_that_leaves_the_balancer_leaves_the_replica_too(house, stream: bool):
    with socket.create_connection(("127.0.0.1", house.balancer.port), timeout=30) as connection:
        connection.sendall(raw_request(CHAT, chat_body("long", stream=stream, max_tokens=30_000, ignore_eos=True)))
        until(lambda: sum(house.figure(name, "running") for name in house.replicas) == 1, "for it to run")
    until(lambda: sum(house.figure(name, "running") for name in house.replicas) == 0, "for it to end")
