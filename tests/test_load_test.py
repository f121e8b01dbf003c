"""load_test.py as a user runs it, against golden servers: what it prints and records, also when they break."""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socketserver
import ssl
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import load_test
from lab import compare, load_runs
from lab.client import Client, Trace
from load import drive, golden, measure
from load.plan import Cell
from load.script import Script

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
QUICK = Script(first_s=0.02, gap_s=0.002)


def command(url: str, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "load_test.py"), "--url", url, *options]


def asked(url: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(url, *options), capture_output=True, text=True, timeout=120)


def recorded(url: str, *options: str, status: int = 0) -> dict:
    done = asked(url, "--json", "-", "--requests", "12", "--prompt-tokens", "16", "--max-new-tokens", "8", *options)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def url():
    with golden.serve(QUICK) as server:
        yield server.url


def test_a_matrix_of_closed_loops(url):
    record = recorded(url, "--concurrency", "1,3", "--rounds", "2")
    loads = [
        (run["load"]["concurrency"], run["load"]["prompt_tokens"], run["load"]["new_tokens"]) for run in record["runs"]
    ]
    assert loads == [(1, 16, 8), (3, 16, 8), (3, 16, 8), (1, 16, 8)], "the second round turns"
    assert record["server"]["kind"] == "another server" and record["partial"] is False
    for run in record["runs"]:
        assert len(run["requests"]) == 12 and all(one["ok"] and one["new_tokens"] == 8 for one in run["requests"])
        assert run["laws"]["tokens"] == {"pieces": 96, "usage": 96, "server": 96, "holds": True}
        assert max(one["due"] for one in run["requests"]) > 0
        flying = run["laws"]["little"]
        assert flying["in_flight"] <= run["load"]["concurrency"] + 1e-9


def test_an_open_loop_sends_by_its_schedule_and_says_so(url):
    record = recorded(url, "--rate", "40", "--arrival", "constant")
    run = record["runs"][0]
    assert (run["load"]["kind"], run["load"]["arrival"], run["figures"]["requested_rate"]) == ("open", "constant", 40.0)
    gaps = [after["due"] - before["due"] for before, after in zip(run["requests"], run["requests"][1:], strict=False)]
    assert gaps == pytest.approx([1 / 40] * 11)


def test_recorded_loads_and_ramps(url, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "\n".join(json.dumps({"at": i / 20, "prompt_tokens": 8 + i, "new_tokens": 2 + i}) for i in range(4))
    )
    run = recorded(url, "--replay-file", str(path))["runs"][0]
    assert [one["new_tokens"] for one in run["requests"]] == [2, 3, 4, 5]
    assert [one["due"] for one in run["requests"]] == pytest.approx([0, 0.05, 0.1, 0.15])
    rising = recorded(url, "--ramp", "5:40:1")["runs"][0]
    assert rising["load"]["kind"] == "ramp" and len(rising["requests"]) > 5


def test_a_conversation_waits_for_its_answers(url):
    run = recorded(url, "--turns", "3", "--endpoint", "chat", "--concurrency", "2", "--requests", "2")["runs"][0]
    assert len(run["requests"]) == 6
    lengths = sorted(one["prompt_tokens"] for one in run["requests"])
    assert lengths[0] < lengths[2] < lengths[4], "each turn holds all that was said"


def test_the_search_goes_up_until_a_rate_misses_and_then_halves_the_space(url):
    record = recorded(url, "--find-slo", "ttft_p95=0.06", "--requests", "24")
    tried = [(run["load"]["rate"], run["keeps"]) for run in record["runs"][1:]]
    assert any("largest rate that keeps the limits" in sentence for sentence in record["verdicts"])
    kept, missed = ([rate for rate, keeps in tried if keeps is word] for word in (True, False))
    first = record["runs"][0]["figures"]["requests_per_s"]
    assert tried[0][0] == pytest.approx(first)
    rising = [rate for rate, _ in tried[: len(kept) + 1]]
    if kept and missed and tried[0][1]:
        assert rising[1] == pytest.approx(2 * rising[0]), "16 clients' rate is a beginning, not a limit"
        assert max(kept) < max(missed) <= 2 * max(rising)


def test_a_rate_at_which_more_and_more_are_in_flight_keeps_no_limit(monkeypatch):
    """Of a short run everybody may still be served in time, of an hour of it nobody."""

    def run(_target, cell):
        grows = (cell.rate or 0) > 15
        figures = {"requests_per_s": 10.0, "errors": {}, "ttft_s": {"p95": 0.1}}
        return {"figures": figures, "ended": None, "window": {"class": "growing" if grows else "steady"}}

    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(measure, "warm_up", lambda *_: None)
    runs = list(load_test.search(None, Cell(1, None, None, 16, 8, 12), [("ttft", 95, 1.0)], "poisson"))
    assert all(one["keeps"] is (one["window"]["class"] == "steady") for one in runs[1:])
    assert len(runs) > 4 and {one["keeps"] for one in runs[1:]} == {True, False}


def test_a_sweep_asks_more_of_more_clients(url):
    runs = recorded(url, "--sweep", "--requests", "8")["runs"]
    assert [run["load"]["concurrency"] for run in runs] == [2**i for i in range(len(runs))]
    rates = [run["figures"]["output_tokens_per_s"] for run in runs]
    more = [rate >= 1.05 * max(rates[:i], default=0.0) for i, rate in enumerate(rates)]
    assert len(runs) > 2 and more == [True] * (len(runs) - 1) + [False], "until more clients bring no more"
    for run in runs:
        clients = run["load"]["concurrency"]
        assert len(run["requests"]) >= 4 * clients or clients == 1
        assert run["laws"]["little"]["in_flight"] > 0.5 * clients, "so many were really there"


def test_another_tools_formulas_stand_beside_ours(url, tmp_path):
    done = asked(url, "--json", str(tmp_path / "out.jsonl"), "--requests", "6", "--concurrency", "2", "--as", "vllm")
    assert done.returncode == 0 and "In the formulas of vllm" in done.stdout and "mean_ttft_ms" in done.stdout


@pytest.mark.parametrize(
    "fault", ["429", "503", "500", "cut", "die", "malformed", "error_event", "no_done", "not_a_stream"]
)
def test_a_server_that_breaks_is_measured_as_broken(fault: str):
    whole = fault in ("no_done", "not_a_stream")
    with golden.serve(Script(first_s=0.01, gap_s=0.001, fault=fault)) as server:
        record = recorded(server.url, "--concurrency", "2", status=0 if whole else 1)
    run = record["runs"][0]
    failed = [one for one in run["requests"] if not one["ok"]]
    if whole:  # in another form
        assert not failed
    else:
        assert len(failed) == 12 and sum(run["figures"]["errors"].values()) > 0
        kinds = {one["error"].partition(":")[0] for one in failed}
        assert kinds <= {fault, "cut", "error event", "disconnected", "malformed"}, kinds
        assert any("not answered" in sentence for sentence in record["verdicts"])
    if fault == "not_a_stream":
        assert run["figures"]["ttft_s"] is None, "nobody saw a first token"


def test_a_server_that_hangs_costs_no_more_than_the_timeout():
    with golden.serve(Script(fault="hang_midway")) as server:
        begin = time.monotonic()
        record = recorded(server.url, "--concurrency", "12", "--timeout", "1", status=1)
    assert {one["error"].partition(":")[0] for one in record["runs"][0]["requests"]} == {"timeout"}
    assert time.monotonic() - begin < 30


def test_retries_are_counted_apart_and_follow_the_servers_word():
    with golden.serve(Script(first_s=0.01, gap_s=0.001, fault="503", times=3, retry_after_s=0)) as server:
        ran = drive.closed(Client(server.url + "/v1/completions", retries=3), [BODY] * 6, 1)
    assert all(trace.complete for trace in ran.traces)
    assert sum(trace.attempts - 1 for trace in ran.traces) == 3
    with golden.serve(Script(fault="503", retry_after_s=0)) as server:
        ran = drive.closed(Client(server.url + "/v1/completions", retries=50), [BODY], 1)
    assert ran.traces[0].attempts <= 12, "a budget ends what would never end"


BODY = {"model": "golden", "prompt": "x", "max_tokens": 4, "stream": True}


@pytest.mark.parametrize(
    ("headers", "status", "waits"),
    [
        ({"retry-after-ms": "1500"}, 503, 1.5), ({"retry-after": "2"}, 429, 2.0), ({"retry-after": "500"}, 503, None),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 503, 0.0),
        ({"retry-after-ms": "20", "retry-after": "9"}, 503, 0.02),
        ({"x-should-retry": "false"}, 503, None), ({"x-should-retry": "true", "retry-after": "1"}, 400, 1.0),
        ({}, 400, None), ({}, 200, None),
    ],
)  # fmt: skip
def test_when_a_request_is_sent_again(headers, status, waits):
    assert Trace(0.0, status=status, headers=headers).again_after_s() == waits


def test_without_the_servers_word_the_wait_grows():
    waits = [Trace(0.0, status=503, attempts=n).again_after_s() for n in (1, 2, 3, 9)]
    assert 0.37 < waits[0] <= 0.5 and 0.75 <= waits[1] <= 1.0 and 1.5 <= waits[2] <= 2.0 and 6.0 <= waits[3] <= 8.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rate", "-1"], "--rate takes numbers of at least"), (["--rate", "x"], "--rate takes numbers"),
        (["--concurrency", "0"], "--concurrency takes numbers of at least"), (["--slo", "ttft"], "is no limit"),
        (["--arrival", "sometimes"], "gamma"), (["--rate", "1", "--sweep"], "are different loads"),
        (["--until", "5"], "is no precision"), (["--ramp", "1:2"], "is no ramp"), (["--requests", "0"], "--requests"),
        (["--prompts-file", "/nowhere"], "cannot be read"), (["--tokenizer", "/nowhere"], "cannot be read"),
        (["--model", "other"], "has no model 'other'"), (["--turns", "2", "--rate", "1"], "waits for its answers"),
        (["--concurrency", "64"], "never keep 64 clients busy"),
        (["--concurrency", "4", "--rate", "2"], "different loads"),
        (["--find-slo", "ttft_p75=1"], "one of the percentiles 50, 90"), (["--sweep", "--rounds", "3"], "once"),
        (["--find-slo", "ttft_p95=1", "--prompt-tokens", "8,16"], "give --prompt-tokens one value"),
        (["--rate", "2", "--arrival", "burst", "--seconds", "2"], "never ends by the clock"),
        (["--ramp", "1:1e9:1e9"], "all their stamps are kept"),
        (["--rate", "9", "--seconds", "1e12"], "all their stamps"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(url, options, says):
    done = asked(url, *options)
    assert done.returncode == 2 and "###" not in done.stdout, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "https://127.0.0.1:9", "nonsense", "http://",
                                     "http://127.0.0.1:x", "http://a b/"])  # fmt: skip
def test_nobody_there_is_one_sentence(address: str):
    done = asked(address)
    assert done.returncode == 2 and "No OpenAI-compatible server answers at" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0


def test_tls_without_a_server_that_speaks_it_is_one_sentence(url):
    done = asked(url.replace("http://", "https://"))
    assert done.returncode == 2 and "No OpenAI-compatible server answers at https://" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_a_certificate_that_nobody_signed_is_one_sentence(tmp_path):
    """And with a server that is there when it begins and whose certificate is wrong then, each request says so."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=elsewhere"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # its handshakes fail, as they should
    with served_by(server) as port:
        done = asked(f"https://127.0.0.1:{port}")
        assert done.returncode == 2 and "certificate" in done.stderr.lower() and "Traceback" not in done.stderr
        ran = drive.closed(Client(f"https://127.0.0.1:{port}/v1/completions"), [BODY] * 2, 1)
    assert [trace.error.startswith("connect: ") and "certificate" in trace.error for trace in ran.traces] == [True] * 2


@contextlib.contextmanager
def served_by(server: socketserver.BaseServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_terminal_shows_what_goes_on_and_keeps_a_line_of_every_run(url, tmp_path):
    path = tmp_path / "x.jsonl"
    screen, behind = os.openpty()
    termios.tcsetwinsize(behind, (24, 120))
    options = ("--json", str(path), "--concurrency", "2,3", "--requests", "60", "--prompt-tokens", "8")
    process = subprocess.Popen(command(url, *options), stdout=subprocess.DEVNULL, stderr=behind)
    os.close(behind)
    seen = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while piece := os.read(screen, 4096):
            seen += piece
    os.close(screen)
    assert process.wait(60) == 0
    shown = seen.decode()
    assert "2 in flight, 0 pieces/s, 0 errors" in shown, "before the first answer too"
    assert re.search(r"2 in flight, \d+ pieces/s, first byte p50 [\d.]+ p95 [\d.]+ s, 0 errors", shown), "and midway"
    assert all(run["laws"]["little"]["holds"] for run in json.loads(path.read_text())["runs"]), "it has been counted"
    for clients in (2, 3):
        assert re.search(rf"closed, {clients} clients, 8 → 32: [\d,.]+ tokens/s, TTFT p50 [\d.]+.*, 0 errors", shown)


def test_a_pipe_gets_the_tables_and_nothing_else(url, tmp_path):
    done = asked(url, "--json", str(tmp_path / "x.jsonl"), "--concurrency", "2", "--requests", "12")
    assert (done.returncode, done.stderr) == (0, "") and "in flight," in done.stdout


def test_a_service_that_it_starts_itself_and_what_differs_from_another_one(tmp_path):
    """--start, and that two starts of this kit's service differ in the settings that were changed, in nothing else."""
    records = []
    for slots in ("2", "4"):
        path = tmp_path / f"{slots}.jsonl"
        options = ["--start", "--model", "smollm2", "--concurrency", "2", "--requests", "3", "--prompt-tokens", "8"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "load_test.py"), *options, "--max-new-tokens", "2", "--json", str(path)],
            capture_output=True, text=True, timeout=300,
            env=os.environ | {"LLM_INFER_MAX_RUNNING": slots, "LLM_INFER_NATIVE": "off"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        records.append(json.loads(path.read_text()))
    assert records[0]["server"]["kind"] == "llm-infer-baseline" and records[0]["server"]["capacity"]["slots"] == 2
    assert records[0]["model"]["hash"] == records[1]["model"]["hash"] != "?"
    found = [one for one in compare.factors(*records) if not one.startswith("kernel (")]  # the quickest at each start
    assert found == ["max_running (2 → 4)"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_the_runs_that_it_had_ended(tmp_path, number):
    with golden.serve(QUICK) as server:
        options = ("--concurrency", "2,3", "--rounds", "500", "--requests", "6", "--prompt-tokens", "8")
        process = subprocess.Popen(
            command(server.url, *options, "--json", str(tmp_path / "out.jsonl")), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        end = time.monotonic() + 60
        while len(server.served) < 40 and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
    [path] = tmp_path.glob("*.jsonl")
    record = json.loads(path.read_text())
    assert record["partial"] and len(record["runs"]) >= 3
    assert load_runs.find(str(path), tmp_path)["id"] == record["id"], "and the report can read it"
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert (path.name == "out.jsonl") is (number == signal.SIGTERM)


def test_the_key_is_in_no_record(url, tmp_path):
    (tmp_path / "notes.md").write_text("# Notes\n")
    places = ("--json", str(tmp_path / "x.jsonl"), "--note", "n", "--notes-file", str(tmp_path / "notes.md"))
    done = asked(url, "--api-key", "sk-hush", "--requests", "2", "--concurrency", "1", *places)
    assert done.returncode == 0, done.stderr
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "sk-hush" not in written + done.stdout and "--api-key SECRET" in written and '"api_key":"set"' in written


def test_a_conversation_that_fails_ends_and_the_others_go_on():
    with golden.serve(Script(first_s=0.01, gap_s=0.001, fault="malformed", times=1)) as server:
        run = recorded(server.url, "--turns", "3", "--endpoint", "chat", "--concurrency", "1", "--requests", "4")[
            "runs"
        ][0]
        assert len(run["requests"]) == 12
    with golden.serve(Script(first_s=0.01, gap_s=0.001, done=False)) as server:
        run = recorded(server.url, "--turns", "3", "--endpoint", "chat", "--concurrency", "1", "--requests", "4")[
            "runs"
        ][0]
        assert len(run["requests"]) == 12, "a stream without its last word is whole where it says how it ended"


def test_a_ramp_that_the_server_keeps_up_with_is_not_over_saturated():
    with golden.serve(Script(first_s=0.2, gap_s=0.002)) as server:
        run = recorded(server.url, "--ramp", "0:60:12", "--arrival", "constant")["runs"][0]
    assert run["ended"] is None and len(run["requests"]) == 360


def test_a_request_that_a_closing_server_may_have_read_is_counted_twice():
    """It reads what comes on a kept connection and closes it: nobody knows whether it did the work."""

    class Reads(socketserver.StreamRequestHandler):
        def handle(self):
            for turn in range(2):
                length = 0
                while (line := self.rfile.readline()) not in (b"\r\n", b""):
                    length = int(line.split(b":")[1]) if line.lower().startswith(b"content-length") else length
                self.rfile.read(length)
                if turn == 0:
                    answer = b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))

    with served_by(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Reads)) as port:
        ran = drive.closed(Client(f"http://127.0.0.1:{port}/v1/completions"), [BODY] * 4, 1)
    assert [trace.attempts for trace in ran.traces] == [1, 2, 2, 2] and all(trace.complete for trace in ran.traces)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_measured(tmp_path, number):
    """SIGTERM lost the run under way, and of a single run everything."""
    with golden.serve(Script(first_s=0.05, gap_s=0.02)) as server:
        path = tmp_path / "out.jsonl"
        options = ("--json", str(path), "--concurrency", "2", "--requests", "5000", "--prompt-tokens", "8")
        process = subprocess.Popen(
            command(server.url, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        end = time.monotonic() + 60
        while len(server.served) < 12 and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "PARTIAL" in out and "Traceback" not in err
    record = json.loads(path.read_text())
    assert record["partial"] and sum(one["ok"] for one in record["runs"][0]["requests"]) >= 6


@pytest.mark.parametrize("meaning", [signal.SIG_DFL, signal.default_int_handler])
def test_sigterm_means_after_a_run_what_it_meant_before(url, meaning):
    before = signal.signal(signal.SIGTERM, meaning)
    try:
        drive.closed(Client(url + "/v1/completions"), [BODY] * 2, 1)
        assert signal.getsignal(signal.SIGTERM) == meaning
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_while_it_warms_up_ends_it():
    with golden.serve(Script(first_s=60.0)) as server:
        process = subprocess.Popen(command(server.url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while not server.served and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted before anything was measured" in err


def test_with_a_tokenizer_prompts_are_exact_and_pieces_are_counted(checkpoint_folder):
    with golden.serve(Script(first_s=0.01, gap_s=0.002, per_chunk=4)) as server:
        record = recorded(server.url, "--concurrency", "2", "--tokenizer", str(checkpoint_folder))
    assert all(count > 1 for one in record["runs"][0]["requests"] for _, count in one["chunks"])


def test_an_open_loop_that_is_too_much_is_stopped():
    def see(now: drive.Drive) -> None:
        flying.append(now.flying)

    flying: list[int] = []
    with golden.serve(Script(fault="hang")) as server:
        before, drive.OVERDUE_S = drive.OVERDUE_S, 1.0
        try:
            client = Client(server.url + "/v1/completions", timeout_s=60)
            ran = drive.opened(client, [BODY] * 4000, [i / 100 for i in range(4000)], see=see)
        finally:
            drive.OVERDUE_S = before
    assert ran.why == "over-saturated" and ran.end_s - ran.start_s < 30 and max(flying) > 20
