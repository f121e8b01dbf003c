"""How many connections there may be: who goes first, who is turned away, and how everybody learns why."""

import json
import resource
import socket
import time

import pytest
from service_kit import raw_request, read_all, read_until, served
from step_kit import figure

from service import connections
from service.connections import Connections, enough_files

CHAT = "/v1/chat/completions"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


class Guest:
    def __init__(self) -> None:
        self.gone = False

    def send_away(self) -> None:
        self.gone = True


def come(books: Connections, count: int) -> list[Guest]:
    guests = [Guest() for _ in range(count)]
    assert [books.come(guest) for guest in guests] == [None] * count
    return guests


# ---- the books


def test_of_idle_ones_the_longest_idle_goes_for_a_newcomer():
    books = Connections(3)
    first, second, third = come(books, 3)
    books.works(first)
    books.rests(first)  # the last of all that began to rest
    come(books, 1)
    assert [one.gone for one in (first, second, third)] == [False, True, False]
    come(books, 2)
    assert first.gone and third.gone and len(books.open) == 3 == len(books.idle)


def test_who_is_at_work_stays_and_a_newcomer_is_told_why_it_cannot():
    books = Connections(2)
    guests = come(books, 2)
    for guest in guests:
        books.works(guest)
    stranger = Guest()
    error = books.come(stranger)
    assert (error.status, error.code, error.retry, error.retry_after_s) == (503, "server_overloaded", True, 1.0)
    assert error.message == (
        "The server holds as many connections as it may (2), all of them at work: try again later, and keep few "
        "connections for many requests."
    )
    assert error.details == {"limit_hit": "connections", "connections": 2} and books.refused == 1
    books.rests(stranger)
    books.leave(stranger)
    assert books.open == set(guests) and not books.idle, "it never was one of them"
    books.leave(guests[0])
    books.leave(guests[0])
    assert books.come(Guest()) is None


@pytest.mark.parametrize(("open_now", "kept"), [(0, True), (8, True), (9, False), (10, False)])
def test_near_the_limit_none_is_kept_after_its_answer(open_now, kept):
    books = Connections(10)
    come(books, open_now)
    assert books.kept is kept
    assert not Connections(10, tight=lambda: True).kept


def test_all_idle_ones_can_be_sent_away():
    books = Connections(9)
    guests = come(books, 3)
    books.works(guests[1])
    books.send_idle_away()
    assert [one.gone for one in guests] == [True, False, True] and books.open == {guests[1]}


@pytest.mark.parametrize(
    ("soft", "hard", "most", "becomes", "says"),
    [
        (1024, 4096, 900, None, None), (256, 4096, 1000, 1100, None), (256, resource.RLIM_INFINITY, 1000, 1100, None),
        (256, 512, 1000, 512, "--max-connections 412"), (50, 50, 1000, None, "--max-connections 1."),
    ],
)  # fmt: skip
def test_as_many_files_as_connections_are_asked_for(monkeypatch, soft, hard, most, becomes, says):
    asked = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, limits: asked.append(limits))
    said = enough_files(most)
    assert asked == ([] if becomes is None else [(becomes, hard)])
    assert said is None if says is None else says in said and f"may have {hard}" in said


# ---- the service


@pytest.fixture
def here(checkpoint_folder):
    with served(checkpoint_folder, max_connections=4, max_body=20_000, body_timeout=1.0) as found:
        yield found


def fill(here, count: int) -> list[socket.socket]:
    """Connections at work: their requests are in the engine, which is held."""
    here.runner.hold()
    busy = [here.send_chat(f"{i}", max_tokens=2) for i in range(count)]
    here.until(lambda: len(here.jobs) == count)
    return busy


@pytest.mark.slow
def test_idle_connections_make_way_and_those_at_work_do_not(here):
    idle = [here.open() for _ in range(3)]
    idle[0].sendall(LIVE)
    read_until(idle[0], b"threshold_s")  # used last
    busy = fill(here, 1)
    assert here.ask("/health/live").status == 200 and idle[1].recv(1) == b"", "the first that was silent"
    here.runner.go()
    assert b" 200 " in read_until(busy[0], b'"usage"')
    for connection in (*idle, *busy):
        connection.close()


@pytest.mark.slow
def test_one_too_many_is_told_in_openais_form_whatever_it_was_about_to_ask(here):
    busy = fill(here, 4)
    for request in (LIVE, raw_request(CHAT, b'{"x": "' + b"y" * 15_000 + b'"}'), b""):
        with here.open() as connection:
            connection.sendall(request)
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ") and b"connection: close" in head and b"x-request-id: req-" in head
            assert b"retry-after: " in head and b"x-should-retry: true" in head
            error = json.loads(body)["error"]
            assert (error["code"], error["type"]) == ("server_overloaded", "overloaded_error")
            assert error["details"] == {"limit_hit": "connections", "connections": 4}
    reply = here.chat()  # and by a client of the standard library
    assert (reply.status, reply.error["details"]["limit_hit"]) == (503, "connections")
    here.runner.go()
    assert all(b" 200 " in read_until(connection, b'"usage"') for connection in busy), "those inside do not notice"
    for connection in busy:
        connection.close()
    here.until(lambda: not here.house.watch.connections.open)
    assert here.chat().status == 200 and figure(here, "connections_refused_total") == 4
    assert figure(here, "connections") == 1, "the scrape's own"


@pytest.mark.slow
def test_near_the_limit_an_answer_ends_its_connection(here):
    idle = [here.open() for _ in range(3)]
    here.until(lambda: len(here.house.watch.connections.open) == 3)
    assert here.ask("/health/live").headers["connection"] == "close"
    for connection in idle:
        connection.close()
    here.until(lambda: not here.house.watch.connections.open)
    assert "connection" not in here.ask("/health/live").headers


@pytest.mark.slow
def test_a_flood_of_strangers_leaves_nothing_behind(here):
    busy = fill(here, 4)
    flood = [here.open() for _ in range(150)]  # more than are given the time to read why
    here.until(lambda: here.house.watch.connections.refused == 150)
    here.runner.go()
    assert all(b" 200 " in read_until(connection, b'"usage"') for connection in busy)
    for connection in (*flood, *busy):
        connection.close()
    here.until(lambda: not here.house.watch.connections.open and not here.house.watch.connections.lingering)


# ---- the end of an answer to a body that is still coming


@pytest.mark.slow
@pytest.mark.parametrize("declared", [True, False])
def test_b5_b6_too_large_is_read_by_whoever_is_still_sending(here, declared):
    """The connection was closed over unread bytes: it was reset, and a client might never see the answer."""
    data = b"x" * 3_000_000
    length = f"Content-Length: {len(data)}" if declared else "Transfer-Encoding: chunked"
    for _ in range(5):
        with here.open() as connection:
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode())
            connection.sendall(data if declared else b"2dc6c0\r\n" + data + b"\r\n")
            answer = connection.recv(65536)
            time.sleep(0.05)
            answer += connection.recv(65536)  # ConnectionResetError, where it was reset
        assert b" 413 " in answer and b"body_too_large" in answer


@pytest.mark.slow
def test_b9_too_slow_is_read_by_whoever_goes_on_sending(here):
    with here.open() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n".encode())
        for _ in range(16):
            connection.sendall(b"x")
            time.sleep(0.1)
        answer = read_until(connection, b"}}")
    assert b" 408 " in answer and b"body_timeout" in answer and b"connection: close" in answer
