"""Fault matrix B2: who asks, under which id, and how much. The numbers are the matrix's."""

import base64
import hashlib
import json

import pytest
from service_kit import NAME, PROBES, chat_body, raw_request, read_all, read_until, served

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
KEY, OTHER = "sk-a-secret-that-nobody-may-see", "sk-another-secret"
HASH = hashlib.sha256(KEY.encode()).hexdigest()
MINE, THEIRS = {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {OTHER}"}
REQUESTS, TOKENS = 5, 1000  # a minute


class Clock:
    """A minute passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def here(checkpoint_folder, tmp_path):
    """Two keys with a quota each, whose minutes are the test's."""
    (tmp_path / "keys").write_text(f"# who may ask\n\n{OTHER}\n")
    wishes = {"requests_per_minute": REQUESTS, "tokens_per_minute": TOKENS}
    with served(checkpoint_folder, api_key=KEY, api_keys_file=str(tmp_path / "keys"), **wishes) as found:
        found.limits, found.clock = found.house.serving.limits, Clock()
        found.limits.clock = found.clock
        found.limits.buckets.clear()  # the probe's
        yield found
        found.clock.now_s += 600


def lines(here, count: int) -> list[dict]:
    """The log's, of so many requests of the test: the probe's is before them. They come a moment after the answers."""
    here.until(lambda: len(here.lines()) > count)
    return here.lines()[1 : count + 1]


def left(here, what: str, key: str = HASH) -> float:
    return here.limits.bucket(key, what).level


# ---- keys

LOCKED = ("/v1/models", "/config", "/capacity", "/debug/requests", "/debug/requests/req-1")
WRONG = [
    None, "Bearer wrong", "Bearer", "Bearer ", KEY, f"Token {KEY}", f"Bearer {KEY} {KEY}", f"Bearer {KEY[:-1]}",
    f"Bearer {HASH}", "Basic " + base64.b64encode(f"user:{KEY}".encode()).decode(), f"Basic {KEY}",
    "Bearer " + "x" * 9000,
]  # fmt: skip


def test_b20_no_key_or_a_wrong_one(here):
    bodies = set()
    for path, body in ((CHAT, chat_body()), ("/v1/completions", {}), *((path, None) for path in LOCKED)):
        for said in WRONG:
            reply = here.ask(path, body, **({} if said is None else {"Authorization": said}))
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer"), (path, said)
            assert (reply.error["code"], reply.error["type"]) == ("invalid_api_key", "authentication_error")
            assert reply.headers["x-should-retry"] == "false" and "x-ratelimit-limit-requests" not in reply.headers
            bodies.add(reply.body)
    assert len(bodies) == 1, "what is wrong with a key is told to nobody"
    assert here.limits.buckets == {}, "nobody's quota pays for it"
    assert here.runner.steps == 4, "only the probe was computed"


def test_b20_right_keys_however_the_scheme_is_written(here):
    for said in (f"Bearer {KEY}", f"bearer {KEY}", f"BEARER  {KEY} ", f"Bearer {OTHER}"):
        assert here.ask("/v1/models", Authorization=said).status == 200, said


def test_b21_a_key_is_shown_nowhere(here):
    told = [here.chat(headers=MINE), here.chat(headers=MINE, stream=True), here.chat(headers={"Authorization": KEY})]
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("on purpose")
    told += [here.chat(headers=MINE), here.chat(headers=MINE, model=KEY[:0]), here.chat(headers=MINE, max_tokens=0)]
    told += [here.chat(headers=MINE) for _ in range(REQUESTS)]
    assert {200, 400, 401, 404, 429, 500} <= {reply.status for reply in told}
    views = ("/config", "/capacity", "/debug/requests", "/openapi.json", "/v1/models", "/nothing", *PROBES)
    told += [here.ask(path, **MINE) for path in views]
    told += [here.ask(f"/debug/requests/{told[0].headers['x-request-id']}", **MINE)]
    here.until(lambda: sum(here.outcomes().values()) == here.received)
    texts = [reply.body.decode() + json.dumps(reply.headers) for reply in told] + [here.log.getvalue()]
    for secret in (KEY, OTHER, HASH, HASH[:9], base64.b64encode(KEY.encode()).decode()[:-4]):
        assert not [text for text in texts if secret in text], secret
    assert {line.get("key_hash8") for line in here.lines()} == {HASH[:8], None}, "None: who had no right key"
    config = here.ask("/config", **MINE).json
    assert (config["api_key"], config["api_keys_file"]) == ("set", "set")


def test_b21_nobody_sees_anothers_requests(here):
    mine = here.chat(headers=MINE).headers["x-request-id"]
    here.until(lambda: here.house.books.lives.latest(HASH))
    assert here.ask(f"/debug/requests/{mine}", **MINE).status == 200
    assert here.ask(f"/debug/requests/{mine}", **THEIRS).status == 404
    assert not here.ask("/debug/requests", **THEIRS).json["requests"]


def test_b22_probes_need_no_key(here):
    for path in PROBES:
        assert here.ask(path).status == here.ask(path, Authorization="Bearer wrong").status == 200


def test_b22_however_a_path_is_written_a_key_is_asked_for(here):
    for path in ("/%63onfig", "/v1/./models", "/v1//models", "/debug/requests/", "/v1/models/tiny"):
        assert here.ask(path).status == 401, path
        assert here.ask(path, **MINE).status in (200, 404, 307), path


# ---- ids


def test_b23_a_good_id_comes_back_also_with_an_error(here):
    good = "a-Good_id.1" + "x" * 53
    for reply in (here.chat(headers=MINE | {"X-Request-Id": good}), here.ask("/v1/no", X_Request_Id=good)):
        assert reply.headers["x-request-id"] == good
    assert [line["client_request_id"] for line in lines(here, 2)] == [good, good]


def test_b23_a_bad_id_is_dropped_with_a_flag(here):
    bad = ("x" * 65, "x" * 20_000, "a b", "a/b", 'a"b', "{}", "a\tb", "ä", "🙂", "\x80")
    for number, theirs in enumerate(bad, start=1):
        reply = here.ask("/v1/models", **MINE, X_Request_Id=theirs.encode())
        assert reply.status == 200 and reply.headers["x-request-id"].startswith("req-"), theirs
        line = lines(here, number)[-1]
        assert line["client_request_id_dropped"] is True and "client_request_id" not in line, theirs
        assert line["request_id"] == reply.headers["x-request-id"]
        assert theirs not in here.log.getvalue() and json.dumps(theirs) not in here.log.getvalue()


def test_b23_no_line_of_the_log_or_of_a_reply_can_be_written_by_a_client(here):
    """httptools refuses what is no header; what it lets through is dropped."""
    evil = b'{"event": "request", "evil": 1}'
    for end in (b"\r\n ", b"\n", b"\r", b"\n ", b"\x00", b"\x7f", b"%0d%0a", b"\\r\\n"):
        with here.open() as connection:
            head = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: a"
            connection.sendall(head + end + evil + b"\r\n\r\n")
            answer = read_all(connection)
        assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400")) and b"evil" not in answer.lower(), end
    assert "evil" not in here.log.getvalue()
    here.lines()  # each of them is JSON


def test_b23_a_mebibyte_is_more_than_headers_may_have(here):
    """The matrix wants it dropped with a flag; but B18 sets a limit on headers, and that comes first."""
    with here.open() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + b"x" * 60_000)
        answer = read_all(connection)
    assert b" 431 " in answer and b"header_too_large" in answer


def test_b24_two_live_requests_of_the_same_id(here):
    here.runner.hold()
    ids = {"X-Request-Id": "the-same"}
    both = [here.later(here.chat, text, headers=MINE | ids) for text in ("one", "two")]
    here.until(lambda: len(here.house.serving.jobs) == 2)
    here.runner.go()
    replies = [one.result() for one in both]
    assert [reply.status for reply in replies] == [200, 200]
    assert [reply.headers["x-request-id"] for reply in replies] == ["the-same"] * 2
    assert replies[0].json["id"] != replies[1].json["id"]
    assert replies[0].json["choices"] != replies[1].json["choices"], "each has its own answer"
    told = lines(here, 2)
    assert len({line["request_id"] for line in told}) == 2
    assert {line["client_request_id"] for line in told} == {"the-same"}
    latest = here.ask("/debug/requests/the-same", **MINE).json["request_id"]
    assert latest == told[-1]["request_id"], "of two, the one that ended last"
    for line in told:  # and by our own id, which the log has, each of them
        assert here.ask(f"/debug/requests/{line['request_id']}", **MINE).json["request_id"] == line["request_id"]
    assert [one["id"] for one in here.ask("/debug/requests", **MINE).json["requests"][:2]] == ["the-same"] * 2


# ---- quota


def test_b24_somebody_elses_equal_id_hides_nothing(here):
    here.chat(headers=MINE | {"X-Request-Id": "shared"})
    here.chat(headers=THEIRS | {"X-Request-Id": "shared"})
    ours = here.until(lambda: [here.ask("/debug/requests/shared", **who).json for who in (MINE, THEIRS)])
    assert ours[0]["request_id"] != ours[1]["request_id"]


def test_b25_over_the_requests_of_a_minute(here):
    for i, until_full in enumerate(("12s", "24s", "36s", "48s", "1m0s")):
        reply = here.chat(headers=MINE, max_tokens=1)
        assert reply.headers["x-ratelimit-limit-requests"] == str(REQUESTS)
        assert reply.headers["x-ratelimit-remaining-requests"] == str(REQUESTS - 1 - i)
        assert reply.headers["x-ratelimit-reset-requests"] == until_full
    steps, before = here.runner.steps, left(here, "tokens")
    reply = here.chat(headers=MINE)
    assert (reply.status, reply.error["code"], reply.error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    headers = reply.headers
    assert (headers["retry-after-ms"], headers["retry-after"], headers["x-should-retry"]) == ("12000", "12", "true")
    assert headers["x-ratelimit-remaining-requests"] == "0" and headers["x-ratelimit-reset-requests"] == "1m0s"
    assert "x-ratelimit-remaining-tokens" in headers
    assert here.runner.steps == steps and not here.admission.inside, "it never stood in the queue"
    assert left(here, "tokens") == before, "all or nothing"
    assert lines(here, REQUESTS + 1)[-1]["outcome"] == "rate_limited" and here.outcomes()["rate_limited"] == 1
    assert here.chat(headers=THEIRS).status == 200, "another key has its own"
    here.clock.now_s += 11.99
    assert here.chat(headers=MINE).status == 429
    here.clock.now_s += 0.01
    assert here.chat(headers=MINE).status == 200, "it is as was said"


def test_b25_what_is_wrong_or_finds_no_room_is_not_counted(here):
    here.chat(headers=MINE, max_tokens=0)
    here.chat(headers=MINE, model="another")
    assert here.limits.buckets == {}
    hurry = MINE | {"X-Request-Deadline-Ms": "1"}
    reply = here.chat(headers=hurry, max_tokens=400)
    assert (reply.status, reply.error["code"]) == (503, "deadline_unreachable")
    assert (left(here, "requests"), left(here, "tokens")) == (REQUESTS, TOKENS)


def test_a13_an_error_tells_what_is_left_too(here):
    """A 400 that came after the tokens were drawn told nothing, and neither did a 500 or a 504."""
    here.chat(headers=MINE)
    drawn = here.chat("x" * 500, headers=MINE, max_tokens=100)  # too long, once it is tokenised
    assert (drawn.status, drawn.headers["x-ratelimit-remaining-requests"]) == (400, str(REQUESTS - 2))
    assert drawn.headers["x-ratelimit-remaining-tokens"] == str(int(left(here, "tokens")))
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("on purpose")
    failed = here.chat(headers=MINE)
    assert (failed.status, failed.headers["x-ratelimit-remaining-requests"]) == (500, str(REQUESTS - 3))
    before = here.chat(headers=MINE | {"X-Request-Deadline-Ms": "1"}, max_tokens=400)
    assert (before.status, before.headers["x-ratelimit-remaining-requests"]) == (503, str(REQUESTS - 3))


@pytest.mark.parametrize("stream", [False, True])
def test_b26_tokens_that_were_not_used_are_given_back(here, stream: bool):
    """Drawn is an estimate, paid is what usage says: to the token."""
    here.runner.hold()
    asked = here.later(here.chat, "how long is this?", headers=MINE, max_tokens=300, n=2, stop="b", stream=stream,
                       **({"stream_options": {"include_usage": True}} if stream else {}))  # fmt: skip
    job = here.until(lambda: next(iter(here.house.serving.jobs), None))
    assert left(here, "tokens") == TOKENS - job.drawn and job.drawn > 600
    here.runner.go()
    reply = asked.result()
    usage = reply.events[-2]["usage"] if stream else reply.json["usage"]
    assert 0 < usage["completion_tokens"] < usage["total_tokens"] < job.drawn
    here.until(lambda: left(here, "tokens") == TOKENS - usage["total_tokens"])


def test_b26_also_when_the_client_leaves(here):
    here.runner.hold()
    connection = here.open()
    connection.sendall(raw_request(CHAT, chat_body(max_tokens=400), f"Authorization: Bearer {KEY}"))
    job = here.until(lambda: next(iter(here.house.serving.jobs), None))
    here.until(lambda: job.stream.answers)
    connection.close()
    here.until(lambda: not here.house.serving.jobs)
    assert left(here, "tokens") == TOKENS - job.prompt_tokens


def test_b26_more_than_was_estimated_is_paid_too(here):
    """A prompt of many tokens for few bytes: the next one waits for it."""
    text = "x" * 400
    used = here.chat(text, headers=MINE, max_tokens=1).json["usage"]["total_tokens"]
    assert used > 400 and left(here, "tokens") == TOKENS - used
    here.chat(text, headers=MINE, max_tokens=90)
    assert left(here, "tokens") < 100
    reply = here.chat(headers=MINE, max_tokens=400)
    assert (reply.status, reply.headers["x-should-retry"]) == (429, "true")
    here.clock.now_s += int(reply.headers["retry-after-ms"]) / 1e3
    assert here.chat(headers=MINE, max_tokens=400).status == 200


def test_b26_more_than_a_minute_ever_gives_can_never_be_served(here):
    reply = here.chat(headers=MINE, max_tokens=500, n=2)
    assert (reply.status, reply.headers["x-should-retry"]) == (429, "false")
    assert "retry-after" not in reply.headers and "never" in reply.error["message"]
    assert (left(here, "requests"), left(here, "tokens")) == (REQUESTS, TOKENS)


def test_b27_a_thousand_bogus_keys_leave_nothing_behind(here):
    here.chat(headers=MINE)
    kept, series = set(here.limits.buckets), here.ask("/metrics").body.count(b"\n")
    with here.open() as connection:
        for hundred in range(10):
            numbers = range(100 * hundred, 100 * hundred + 100)
            connection.sendall(
                b"".join(raw_request(CHAT, chat_body(), f"Authorization: Bearer no-{number}") for number in numbers)
            )
            answers = b""
            while answers.count(b"HTTP/1.1 401 ") < 100:
                answers += read_until(connection, b"}")
    here.until(lambda: here.outcomes().get("client_error") == 1000)
    assert set(here.limits.buckets) == kept == {(HASH, "requests"), (HASH, "tokens")}
    assert here.ask("/metrics").body.count(b"\n") - series <= 5, "one more outcome, not a thousand keys"
    assert len(here.house.books.lives.kept) <= 500


def test_what_nobody_foresaw_is_openais_error_object_too(here, monkeypatch):
    """A1: also of the 500 that the web framework would otherwise write as plain text. Its insides are for the log."""
    monkeypatch.setattr(here.house.watch, "capacity", lambda: 1 / 0)
    reply = here.ask("/capacity", **MINE)
    assert (reply.status, reply.error["code"], reply.error["type"]) == (500, "internal_error", "server_error")
    assert reply.headers["x-should-retry"] == "true" and b"zero" not in reply.body
    here.until(lambda: here.errors)  # what the server logged
    assert "ZeroDivisionError" in here.errors.pop()


def test_without_limits_nothing_is_said_of_them(checkpoint_folder):
    with served(checkpoint_folder) as free:
        reply = free.ask(CHAT, chat_body(), Authorization="Bearer whatever")
        assert reply.status == 200 and not [name for name in reply.headers if name.startswith("x-ratelimit")]
        assert free.house.serving.limits.buckets == {}
        assert free.ask("/v1/models").json["data"][0]["id"] == NAME
