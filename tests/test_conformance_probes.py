"""What conformance's probes say of servers that are good for nothing, and of this one."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from service_kit import CONTEXT, NAME, served
from stand_kit import EVENTS, FAILS, REFUSES, SAYS_YES, Stand, http

from config import UserError
from conformance import clients, identity, look, overload, servers, transport, values
from conformance.judge import Kind, Verdict, otherwise, passed, unsafe
from conformance.look import IN_TURN, PATIENT, Looks, attempted
from conformance.target import Target

REFUSALS = (1, 2, 3, 10, 11, 13, 14, 28, 29, 35, 36, 39, 41, 42, 44, 48)  # of which every request must be a 400


# ---- one by one


@pytest.mark.slow
@pytest.mark.parametrize("number", REFUSALS)
def test_who_refuses_passes_who_says_yes_differs_and_who_fails_or_hangs_is_unsafe(stand, number: int):
    look = IN_TURN[number]
    found = [attempted(look, stand(answer).target()) for answer in (REFUSES, SAYS_YES, FAILS, None)]
    assert [one.kind for one in found] == [Kind.PASS, Kind.OTHERWISE, Kind.UNSAFE, Kind.UNSAFE], found
    assert "200" in found[1].says and "500" in found[2].says and "did not answer" in found[3].says


@pytest.mark.slow
@pytest.mark.parametrize("number", sorted({*IN_TURN} - {*REFUSALS} - {27, 50, 51, 52, 54, 60, 61, 62, 67}))
def test_no_probe_is_content_with_a_server_that_always_fails(stand, number: int):
    """But for those of what it does not have: keys, quotas."""
    found = attempted(IN_TURN[number], stand(FAILS).target())
    assert found.kind != Kind.PASS, found


@pytest.mark.slow
def test_a_server_that_neither_reads_on_nor_answers_is_told_so(stand):
    found = transport.too_large_in_chunks(stand(None).target())
    assert found.kind == Kind.OTHERWISE and "neither reads on nor answers" in found.says


@pytest.mark.slow
def test_a_fetched_picture_is_seen(stand):
    def fetch(raw: bytes) -> bytes:
        if found := re.search(rb'"url": "http://127.0.0.1:(\d+)/', raw):
            socket.create_connection(("127.0.0.1", int(found[1]))).close()
        return REFUSES

    assert values.parts(stand(fetch).target()) == unsafe("it fetches an address that a client names")


@pytest.mark.slow
def test_a_context_that_is_not_told_is_not_guessed(stand):
    """Whoever rightly answered 2,252 words was told that it computes past its context, of which nothing was known."""
    target = stand(SAYS_YES).target()
    assert values.too_long(target).kind == Kind.OTHERWISE
    target.context = None
    assert values.too_long(target).kind == Kind.UNSEEN


@pytest.mark.slow
def test_a_servers_context_is_what_it_tells_of_the_model_that_is_asked(stand):
    cards = [{"id": "small", "max_model_len": 64}, {"id": "large", "max_model_len": 96}, {"id": "untold"}]
    url = "http://{}:{}".format(*stand(http(200, json.dumps({"data": cards}).encode())).socket.getsockname())
    found = [servers.at(url, None, model, None) for model in (None, "large", "untold", "unlisted")]
    assert [(one.model, one.context) for one in found] == [
        ("small", 64), ("large", 96), ("untold", None), ("unlisted", None),
    ]  # fmt: skip


@pytest.mark.slow
def test_of_memory_that_is_not_seen_nothing_is_said(stand, monkeypatch):
    """It was 0 before and after, and so it never grew."""
    monkeypatch.setattr(identity, "BOGUS", 10)
    target = stand(http(401, b"{}")).target()
    target.keys = ("a-key",)
    assert identity.bogus_keys(target) == passed("its memory is not seen")


class Batch:
    """Answers of 16 steps, all of them at once. A step takes as long as this function of their number says."""

    def __init__(self, step_s: Callable[[int], float]) -> None:
        self.step_s, self.lock, self.answers = step_s, threading.Lock(), 0

    def __call__(self, raw: bytes) -> bytes:  # noqa: ARG002
        with self.lock:
            self.answers += 1
        for _ in range(16):
            time.sleep(self.step_s(self.answers))
        with self.lock:
            self.answers -= 1
        return SAYS_YES


@pytest.mark.slow
def test_a_server_that_computes_all_answers_at_once_loses_none_of_them_to_the_clock(stand, monkeypatch):
    """Whole answers were counted in a fixed time: here 16 clients get none in it, and it was told "0 %"."""
    monkeypatch.setattr(overload, "LOAD_S", 0.5)
    fair = stand(Batch(lambda answers: 0.003 * answers)).target()
    worse = stand(Batch(lambda answers: 0.0005 * answers**2)).target()
    fair.slow = worse.slow = 1.0
    found = [overload.sustained(target) for target in (fair, worse)]
    assert [one.kind for one in found] == [Kind.PASS, Kind.OTHERWISE], found
    assert overload.sustained(stand(http(503, b"")).target()) == otherwise("it serves none of 4 clients")


@pytest.mark.slow
@pytest.mark.parametrize(("of", "kind"), [(b"", Kind.OTHERWISE), (b"the-same", Kind.UNSAFE), (b"nobody", Kind.PASS)])
def test_a_text_that_depends_on_who_else_is_served_is_not_blamed_on_equal_ids(stand, of: bytes, kind: Kind):
    """of: those that get another text when two of them are served at once."""
    lock, names, now = threading.Lock(), count(), []

    def together(raw: bytes) -> bytes:
        mine = [] if of not in raw else [raw]
        with lock:
            now.extend(mine)
        time.sleep(0.2)
        text = b"no!" if len(now) > 1 else b"yes"
        time.sleep(0.2)
        with lock:
            for one in mine:
                now.remove(one)
        return http(200, b'{"id": "%d", "choices": [{"message": {"content": "%s"}}]}' % (next(names), text))

    target = stand(together).target()
    target.slow = 1.0
    found = attempted(identity.equal_ids, target)
    assert found.kind == kind, found


@pytest.mark.slow
def test_who_gets_the_text_of_another_is_served_unsafely(stand):
    def mixed(raw: bytes) -> bytes:
        first = (b"Count" in raw) != (b"the-same" in raw)
        return SAYS_YES if first else SAYS_YES.replace(b"yes", b"no!")

    assert identity.equal_ids(stand(mixed).target()) == unsafe("one of them gets the text of the other")


def by_the_piece(raw: bytes) -> Iterator[bytes]:
    """A stream of as many pieces as are wanted, one each millisecond. Any other answer takes a tenth of a second."""
    if b'"stream": true' not in raw:
        time.sleep(0.1)
        yield SAYS_YES
        return
    yield EVENTS
    wanted = re.search(rb'"max_tokens": (\d+)', raw)
    for _ in range(int(wanted[1]) if wanted else 0):
        yield b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
        time.sleep(0.001)
    yield b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
    time.sleep(0.01)
    yield b'data: {"choices": [], "usage": {"prompt_tokens": 3}}\n\n'


@pytest.mark.slow
def test_who_computes_one_answer_after_the_other_is_told_from_who_is_quick(stand):
    """The last piece alone decided, so that usage after the end hid it, and 64 tokens in no time looked like it."""
    turn = threading.Lock()

    def in_turn(raw: bytes) -> Iterator[bytes]:
        with turn:
            yield from by_the_piece(raw)

    quick, serial = stand(by_the_piece).target(), stand(in_turn).target()
    quick.meet()
    serial.meet()
    assert (quick.serial, serial.serial) == (False, True)


class OneAtATime(Stand):
    """It serves one connection after the other, and gives a request that is not all there two seconds."""

    turn = threading.Lock()

    def one(self, connection: socket.socket) -> None:
        with self.turn, connection, contextlib.suppress(OSError):
            if connection.recv(1 << 20).endswith((b"\r\n\r\n", b"}")):
                connection.sendall(self.answer)
            else:
                time.sleep(2.0)


@pytest.mark.slow
@pytest.mark.parametrize("probe", [transport.slow_headers, transport.slow_body])
def test_who_lets_others_wait_for_a_slow_sender_and_then_closes_is_unsafe(probe: Callable[[Target], Verdict]):
    """That it closed in time was all that counted."""
    one = OneAtATime(SAYS_YES)
    target = one.target()
    target.slow = 0.1  # 2 s of patience, of which others may wait 0.5
    found = attempted(probe, target)
    one.close()
    assert found.kind == Kind.UNSAFE and "others wait for" in found.says, found


def floods(raw: bytes, size: int) -> bytes:
    """A stream of about so many bytes, at once."""
    event = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
    end = b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
    return EVENTS + event * (size // len(event)) + end if b'"stream": true' in raw else SAYS_YES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "grown", "kind", "says"),
    [
        (5_000, 0, Kind.UNSEEN, "too little"), (100_000, 0, Kind.UNSEEN, "too little"),
        (2_000_000, 0, Kind.PASS, ""), (2_000_000, 65 << 20, Kind.OTHERWISE, "grew by 65 MiB"),
        (2_000_000, None, Kind.UNSEEN, "memory are not known"),
    ],
)  # fmt: skip
def test_a_reader_of_single_bytes_says_something_only_where_a_connection_is_full(
    stand, monkeypatch, size: int, grown: int | None, kind: Kind, says: str
):
    """It read from 100 kB, which the kernel takes, so that no server's memory ever grew."""
    monkeypatch.setattr(clients, "READS_S", 1.0)
    monkeypatch.setattr(Target, "grown", lambda *_: grown)
    found = attempted(clients.byte_by_byte, stand(lambda raw: floods(raw, size)).target())
    assert found.kind == kind and says in found.says, found


@pytest.mark.slow
def test_who_serves_nobody_beside_a_reader_of_single_bytes_is_unsafe(stand, monkeypatch):
    monkeypatch.setattr(clients, "READS_S", 1.0)
    turn = threading.Lock()

    def in_turn(raw: bytes) -> Iterator[bytes]:
        with turn:
            yield floods(raw, 30_000_000)  # more than the kernel takes

    found = attempted(clients.byte_by_byte, stand(in_turn).target())
    assert found == unsafe("it did not answer within 1.2 s")


# ---- a whole look


@pytest.mark.slow
def test_a_server_that_dies_is_asked_no_more_and_nothing_is_made_up(stand):
    one = stand(SAYS_YES, 10)
    looks = Looks(one.target, again=False)
    found = looks.all({1, 2, 3, 28, 29, 73, 74})
    assert found[3].kind == Kind.UNSAFE
    assert found[29].kind == Kind.UNSEEN and "was not asked" in found[29].says
    assert found[74].kind == Kind.UNSEEN


ODD = http(200, b'{"choices": [{"message": null}], "usage": 3}')


@pytest.mark.slow
@pytest.mark.parametrize("number", [12, 24, 34, 40, 43, 46])
def test_an_answer_of_no_known_form_is_a_finding(stand, number: int):
    """Of {"message": null} nothing was left but a traceback, and no card of any server."""
    found = attempted(IN_TURN[number], stand(ODD).target())
    assert found.kind == Kind.OTHERWISE and "no known form (AttributeError: " in found.says


@pytest.mark.slow
def test_openais_client_waits_no_longer_than_others(stand):
    """Its own patience is ten minutes."""
    assert attempted(clients.typed, stand(None).target()) == unsafe("it did not answer OpenAI's client within 0.4 s")
    gone = attempted(clients.typed, stand(b"").target())
    assert gone == otherwise("the connection closed without an answer")


@pytest.mark.slow
def test_a_server_whose_plain_answer_has_no_known_form_is_asked_all_the_same(stand):
    found = Looks(stand(lambda raw: ODD if b"messages" in raw else REFUSES).target, again=False).all({1, 2, 34})
    assert (found[1].kind, found[2].kind, found[34].kind) == (Kind.PASS, Kind.PASS, Kind.OTHERWISE), found


@pytest.mark.slow
def test_a_server_that_does_not_start_again_keeps_what_was_found(stand):
    starts = iter([stand(SAYS_YES, 10).target])

    def start() -> Target:
        for first in starts:
            return first()
        raise UserError("it ended with status 1 before it served.")

    found = Looks(start, again=True).all({1, 2, 3, 28, 29, 73})
    assert found[1].kind == Kind.OTHERWISE and found[3].kind == Kind.UNSAFE
    assert found[29].kind == Kind.UNSEEN and found[29].says.endswith("and then it ended with status 1 before it served")


def mortal(stand: Callable[..., Stand]) -> Target:
    """It takes no more connections once it is asked for /die."""

    def die(raw: bytes) -> bytes:
        if b"GET /die" in raw:
            one.socket.shutdown(socket.SHUT_RDWR)
        return SAYS_YES

    one = stand(die)
    return one.target()


def deadly(target: Target) -> Verdict:
    target.ask("/die")
    return passed()


@pytest.mark.slow
def test_who_is_asked_side_by_side_with_what_breaks_a_server_is_asked_again(stand, monkeypatch):
    """All that were asked together were called unsafe."""
    monkeypatch.setattr(look, "PATIENT", {8: lambda _: passed("8"), 9: deadly, 64: lambda _: passed("64")})
    found = Looks(lambda: mortal(stand), again=True).all({8, 9, 64})
    assert found[8] == passed("8") and found[64] == passed("64")
    assert found[9].kind == Kind.UNSAFE and "a plain request fails" in found[9].says


@pytest.mark.slow
def test_what_breaks_a_server_only_side_by_side_is_all_their_doing(stand, monkeypatch):
    monkeypatch.setattr(look, "PATIENT", {8: lambda _: passed(), 9: deadly})
    starts = iter([mortal(stand), stand(SAYS_YES).target()])
    found = Looks(lambda: next(starts), again=True).all({8, 9})
    assert found[8].kind == found[9].kind == Kind.UNSAFE, found


@pytest.mark.slow
def test_another_text_afterwards_is_no_pass(stand):
    asked = []

    def forgetful(raw: bytes) -> bytes:
        if b"capital of France" not in raw:
            return REFUSES
        asked.append(raw)
        return SAYS_YES if len(asked) == 1 else SAYS_YES.replace(b"yes", b"no!")

    found = Looks(stand(forgetful).target, again=False).all({1, 2})
    assert found[1].kind == found[2].kind == Kind.OTHERWISE and "another text" in found[1].says


QUICK = {1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 23, 24, 28, 29, 30, 32, 33, 34, 35, 36, 37, 38,
         39, 41, 42, 44, 47, 48, 49, 50, 63, 66}  # fmt: skip


@pytest.mark.slow
def test_this_service_passes_whatever_can_be_seen_from_outside_at_once(checkpoint_folder):
    with served(checkpoint_folder, max_queued=40, max_body=1 << 20) as here:
        target = Target("ours", ("127.0.0.1", here.port), NAME, long={"ignore_eos": True}, context=CONTEXT, greedy="")
        for number in sorted(QUICK):
            found = attempted(IN_TURN[number], target)
            assert found.kind == Kind.PASS, (number, found)


def test_every_case_is_looked_at_or_said_to_be_hidden():
    from conformance.ending import HIDDEN, LAST

    assert sorted([*IN_TURN, *PATIENT, *HIDDEN, *LAST]) == list(range(1, 75))
