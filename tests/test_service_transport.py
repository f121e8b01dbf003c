"""Fault matrix B1: what comes over the wire before anybody knows what is wanted. The numbers are the matrix's."""

import contextlib
import gzip
import json
import socket
import time
import tracemalloc

import pytest
from service_kit import chat_body, raw_request, read_all, read_until, served

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"


@pytest.fixture
def here(checkpoint_folder):
    with served(checkpoint_folder, max_body=20_000, header_timeout=1.0, body_timeout=1.0) as found:
        yield found


@pytest.mark.parametrize(
    ("number", "raw"),
    [
        (1, b'{"a":'), (2, b""), (3, b"[]"), (3, b'"x"'), (3, b"null"), (10, b"[" * 10_000), (10, b'{"a":' * 3_000),
        (11, json.dumps(chat_body()).encode("utf-16")), (11, b"\xef\xbb\xbf" + json.dumps(chat_body()).encode()),
        (11, b'{"model": "\xff"}'), (11, b'{"model": "\xed\xa0\x80"}'), (11, b'{"model": "\\ud800"}'),
        (13, b'{"temperature": NaN}'), (13, b'{"temperature": Infinity}'), (13, b'{"temperature": -Infinity}'),
        (13, b'{"temperature": 1e999}'), (42, b'{"logit_bias": {"1": NaN}}'), (14, b'{"seed": ' + b"9" * 5_000 + b"}"),
    ],
)  # fmt: skip
def test_b1_2_3_10_11_13_14_what_is_no_json_object(here, number: int, raw: bytes):
    before = time.monotonic()
    reply = here.ask(CHAT, raw)
    assert time.monotonic() - before < 0.5, number
    assert (reply.status, reply.error["code"]) == (400, "invalid_json")
    assert reply.error["type"] == "invalid_request_error" and reply.error["param"] is None
    assert len(reply.body) <= 1024
    assert here.runner.steps == 4, "only the probe was computed"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_b4_another_content_type(here, kind: str):
    reply = here.ask(CHAT, chat_body(), Content_Type=kind)
    assert (reply.status, reply.error["code"]) == (415, "content_type")


def test_b5_too_large_by_its_own_word_is_refused_unread(here):
    with here.open() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode())
        answer = read_all(connection)
    assert b" 413 " in answer and b"connection: close" in answer.lower() and b"body_too_large" in answer


def test_b6_too_large_in_chunks_is_refused_at_the_limit(here):
    with here.open() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(30):
            connection.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        answer = read_all(connection)
    assert b" 413 " in answer and b"body_too_large" in answer


def test_b6_no_more_of_it_is_held_than_the_limit(checkpoint_folder):
    limit, piece = 1 << 20, b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    with served(checkpoint_folder, max_body=limit) as here, here.open() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        tracemalloc.start()
        with contextlib.suppress(OSError):  # it stops reading, or closes
            for _ in range(20 * limit // len(piece)):
                connection.sendall(piece)
        answer = read_until(connection, b"body_too_large")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert b" 413 " in answer
    assert limit / 2 < peak < 3 * limit, "the matrix's: some of it may be there twice, on its way"


def test_b7_a_body_shorter_than_it_said(here):
    with here.open() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{{".encode())
        connection.shutdown(socket.SHUT_WR)
        read_all(connection)
    line = here.until(lambda: [one for one in here.lines() if one.get("error_code") == "incomplete_body"])[0]
    assert line["outcome"] == "client_error"


def test_b8_headers_letter_by_letter(here):
    with here.open() as connection:
        begin = time.monotonic()
        connection.sendall(b"POST / HTTP/1.1\r\n")
        connection.settimeout(0.2)
        while time.monotonic() - begin < 10:
            try:
                connection.sendall(b"X")
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                asked = time.monotonic()
                assert here.ask("/health/live").status == 200
                assert time.monotonic() - asked < 1.0, "others wait for nobody's headers"
            except OSError:
                break
    assert 0.8 < time.monotonic() - begin < 10  # the limit is 1 s here


def test_b8_the_same_on_a_connection_that_was_used_before(here):
    with here.open() as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(connection, b"threshold_s")
        begin = time.monotonic()
        connection.sendall(b"GET /health/live HTTP/1.1\r\nX: ")
        assert read_all(connection) in (b"", b"}")  # closed, with the rest of the first answer at most
        assert 0.8 < time.monotonic() - begin < 10


def test_b9_a_slow_body(here):
    with here.open() as connection:
        begin = time.monotonic()
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{{".encode())
        answer = read_all(connection)
    assert b" 408 " in answer and b"x-should-retry: false" in answer and b"connection: close" in answer
    assert 0.8 < time.monotonic() - begin < 10
    assert not here.admission.inside


def test_b12_of_two_equal_keys_the_last_counts(here):
    raw = b'{"model": "no", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}], "model": "tiny"}'
    reply = here.ask(CHAT, raw)
    assert reply.status == 200
    line = here.until(lambda: [one for one in here.lines() if one["request_id"] == reply.headers["x-request-id"]])[0]
    assert line["model"] == reply.json["model"] == "tiny", "the log tells the same"


def test_b15_unknown_path_and_wrong_method(here):
    missing = here.ask("/v2/nothing")
    assert (missing.status, missing.error["code"]) == (404, "not_found")
    wrong = here.ask(CHAT, method="GET")
    assert (wrong.status, wrong.error["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert here.ask("/v1/models", {}, method="DELETE").status == 405


def test_b16_head_and_options(here, checkpoint_folder):
    assert here.ask("/v1/models", method="HEAD").status == 405
    assert here.ask(CHAT, method="OPTIONS").status == 405
    with served(checkpoint_folder, cors_origin="https://a.example", api_key="k") as open_to_browsers:
        asked = {"Origin": "https://a.example", "Access_Control_Request_Method": "POST"}
        reply = open_to_browsers.ask(CHAT, method="OPTIONS", **asked)  # a preflight carries no key
        assert reply.status == 200 and reply.headers["access-control-allow-origin"] == "https://a.example"


def test_b17_pipelined_requests_and_a_connection_used_again_after_an_error(here):
    with here.open() as connection:
        good, bad = raw_request(CHAT, chat_body()), raw_request(CHAT, b"{")
        connection.sendall(bad + good + good)
        answer = b""
        while answer.count(b"HTTP/1.1 ") < 3 or answer.count(b'"usage"') < 2:
            answer += connection.recv(65536)
        assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [400, 200, 200]
        connection.sendall(good)
        assert b" 200 " in read_until(connection, b'"usage"')


def test_b17_who_leaves_in_the_middle_of_pipelined_requests_frees_them_all(here):
    here.runner.hold()
    connection = here.open()
    connection.sendall(raw_request(CHAT, chat_body(max_tokens=100)) * 3)
    here.until(lambda: here.bridge.engine.answers)
    connection.close()
    here.until(lambda: not here.house.serving.jobs)


@pytest.mark.parametrize("headers", [b"X: " + b"y" * 65536, b"\r\n".join(b"X-%d: y" % i for i in range(500))])
def test_b18_too_many_headers(here, headers: bytes):
    with here.open() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n\r\n")
        answer = read_all(connection)
    assert b" 431 " in answer and b"header_too_large" in answer and answer.count(b"HTTP/1.1") == 1


def test_b18_what_is_no_http(here):
    with here.open() as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = read_all(connection)
    assert b" 400 " in answer and json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "invalid_http"


def test_b19_a_compressed_body_is_not_inflated(here):
    reply = here.ask(CHAT, gzip.compress(b"0" * 1_000_000), Content_Encoding="gzip")
    assert (reply.status, reply.error["code"]) == (415, "content_encoding")


# ---- what a sceptical reader found


def test_b16_a_refused_head_has_no_body_that_the_next_answer_could_begin_with(checkpoint_folder):
    with served(checkpoint_folder, api_key="k") as locked, locked.open() as connection:
        connection.sendall(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\nGET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = read_until(connection, b"threshold_s")
    assert answer.startswith(b"HTTP/1.1 401 ") and b"invalid_api_key" not in answer
    assert answer.partition(b"\r\n\r\n")[2].startswith(b"HTTP/1.1 200 ")


def test_b16_a_browser_may_read_a_refusal_at_the_door(checkpoint_folder):
    with served(checkpoint_folder, cors_origin="https://a.example", api_key="k") as open_to_browsers:
        reply = open_to_browsers.ask(CHAT, chat_body(), Origin="https://a.example")
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (401, "https://a.example")


def test_b15_a_slash_too_many_is_another_path(here):
    assert (reply := here.ask(CHAT + "/", chat_body())).status == 404 and reply.error["code"] == "not_found"


def test_b18_trailers_are_no_headers_and_have_a_limit(checkpoint_folder):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = json.dumps(chat_body()).encode()
    trailer = b"x-request-deadline-ms: none\r\n"
    with served(checkpoint_folder, max_body=1024) as here:
        with here.open() as connection:
            connection.sendall(head.encode() + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(data), data, trailer))
            assert b" 200 " in read_until(connection, b'"usage"')
        with here.open() as connection:
            connection.sendall(head.encode() + b"%x\r\n%b\r\n0\r\n" % (len(data), data))
            with contextlib.suppress(OSError):
                for _ in range(40):  # 40 kB, of which 8 kB are read: eight times what a body may have
                    connection.sendall(b"a: " + b"v" * 1000 + b"\r\n")
            assert b" 413 " in read_all(connection)


def test_b18_headers_that_end_where_a_packet_does(checkpoint_folder):
    raw = raw_request(CHAT, chat_body("word " * 8000))  # more bytes than headers may have
    with served(checkpoint_folder) as here:
        for cut in range(5):
            at = raw.index(b"\r\n\r\n") + cut
            with here.open() as connection:
                connection.sendall(raw[:at])
                time.sleep(0.05)
                connection.sendall(raw[at:])
                assert b"context_length_exceeded" in read_until(connection, b"}}"), cut


def test_a_body_that_nobody_reads_ends_its_connection(here):
    with here.open() as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        answer = read_all(connection)  # its end, although the body never came
    assert b" 200 " in answer and b"connection: close" in answer


def test_the_beginning_of_a_next_request_does_not_end_this_ones_answer(here):
    here.runner.hold()
    with here.open() as connection:
        connection.sendall(raw_request(CHAT, chat_body(stream=True)) + b"\r\n")
        here.runner.allow(1)
        read_until(connection, b"assistant")
        time.sleep(1.3)  # the limit on headers is 1 s here
        here.runner.go()
        assert b"[DONE]" in read_all(connection)


def test_b17_nonsense_behind_a_request_stays_out_of_its_answer(here):
    here.runner.hold()
    with here.open() as connection:
        connection.sendall(raw_request(CHAT, chat_body(stream=True)))
        here.runner.allow(1)
        read_until(connection, b"assistant")
        connection.sendall(b"\x00\x01nonsense\r\n\r\n")
        time.sleep(0.1)
        here.runner.go()
        rest = read_all(connection)
    assert b"[DONE]" in rest and b"HTTP/1.1" not in rest


@pytest.mark.parametrize("in_two", [False, True])
def test_an_offer_of_http_2_does_not_cost_the_body(here, in_two: bool):
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    raw = raw_request(CHAT, chat_body(), *offer)
    with here.open() as connection:
        at = raw.index(b"\r\n\r\n") + 4 if in_two else len(raw)
        connection.sendall(raw[:at])
        time.sleep(0.05)
        connection.sendall(raw[at:])
        assert b" 200 " in read_until(connection, b'"usage"')


def test_a_refusal_reaches_whoever_is_still_sending(checkpoint_folder):
    with served(checkpoint_folder, api_key="k") as locked:
        for _ in range(5):
            assert locked.ask(CHAT, b'{"x": "' + b"a" * 900_000 + b'"}').status == 401
