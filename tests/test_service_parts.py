"""The service's parts one by one, without a server: what they promise for any input. Prompts have their own file."""

import asyncio
import hmac
import itertools
import json
import time
from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from service_kit import END

from config import UserError
from engine.answer import Answer
from engine.request import Choice, Request, Sampling, Status, Timeline
from service.errors import ApiError
from service.guard import Guard
from service.keys import NOBODY, Keys, digest
from service.life import Life, server_timing
from service.protocol import Reply, usage
from service.schemas import ChatRequest, CompletionRequest, parsed, validated
from service.sending import ClientLeft, Events, event, unless_left
from service.settings import ServeConfig

# ---- schemas.py

NAMES = st.sampled_from(sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "tools", "echo", "x"}))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "system", "assistant", "king"])
GOOD = st.fixed_dictionaries(
    {"model": st.just("tiny")},
    optional={
        "messages": st.lists(st.fixed_dictionaries({"role": ROLES, "content": VALUES | st.text()}), max_size=3),
        "prompt": st.text(max_size=9) | st.lists(st.integers(0, 9), max_size=4),
        "temperature": st.floats(0, 2), "n": st.integers(0, 9), "seed": st.integers(0, 2**63), "stream": st.booleans(),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5), "logprobs": st.booleans(),
        "logit_bias": st.dictionaries(st.integers(-5, 300).map(str), st.integers(-120, 120), max_size=3),
    },
)  # fmt: skip


@given(st.dictionaries(NAMES | st.text(max_size=5), VALUES, max_size=5), GOOD, st.booleans())
def test_any_json_object_is_a_request_or_a_400(wild, good, ignore: bool):
    for kind in (ChatRequest, CompletionRequest):
        body = good | wild
        try:
            asked, ignored = validated(kind, dict(body), ignore_unknown=ignore)
        except ApiError as error:
            assert error.status == 400 and error.code.startswith(("invalid_", "un")) and error.message
            assert len(orjson.dumps(error.body)) < 8_000 and len(error.param or "") < 300
            continue
        assert asked.sampling(3).max_new_tokens == 3 and asked.model == body["model"]
        assert set(ignored) <= set(body) - set(kind.model_fields) and (ignore or not ignored)


@given(st.binary(max_size=60) | VALUES.map(orjson.dumps))
def test_any_bytes_are_an_object_or_a_400(raw: bytes):
    try:
        assert isinstance(parsed(raw), dict)
    except ApiError as error:
        assert (error.status, error.code) == (400, "invalid_json") and len(orjson.dumps(error.body)) < 1024


# ---- keys.py


def test_b20_the_time_tells_nothing_of_a_key(monkeypatch):
    """Not measured: a socket's noise hides more than a comparison takes. Whatever is sent, and wherever in the list the
    right key stands: every kept one is compared, in constant time.
    """
    keys, compared = Keys(["one", "two", "three"]), []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b))
    for said in (None, "", "Bearer", "Basic one", "Bearer no", "Bearer one", "Bearer three", "Bearer " + "x" * 9999):
        compared.clear()
        try:
            assert keys.check(said) == digest(said.removeprefix("Bearer "))
        except ApiError as error:
            assert error.status == 401
        assert compared == [(64, 64)] * 3, said


def test_without_keys_everybody_is_nobody():
    assert Keys([]).check("Bearer whatever") == Keys([]).check(None) == NOBODY


def test_a_file_of_keys(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("# people\n one \n\ntwo\n")
    assert ServeConfig(api_key="zero", api_keys_file=str(path)).keys() == ["zero", "one", "two"]
    path.write_bytes(b"\xff\xfe")
    for missing in (path, tmp_path / "none"):
        with pytest.raises(UserError, match="cannot be read"):
            ServeConfig(api_keys_file=str(missing)).keys()
    path.write_text("# nobody yet\n")
    with pytest.raises(UserError, match="holds no key"):
        ServeConfig(api_keys_file=str(path)).keys()
    with pytest.raises(UserError, match="is empty"):
        ServeConfig(api_key="").keys()
    monkeypatch.setenv("LLM_INFER_API_KEY", "")  # as where a secret was not filled in
    with pytest.raises(UserError, match="is empty"):
        ServeConfig().keys()
    monkeypatch.delenv("LLM_INFER_API_KEY")
    with pytest.raises(UserError, match="ASCII"):
        ServeConfig(api_key="schlüssel").keys()


# ---- life.py

NOW = 100.0


def life_of(*lines: Timeline) -> Life:
    life = Life(lambda: NOW, "req-1", start_s=lines[0].arrived if lines else NOW)
    life.requests = [Request(i, [1], Sampling(), line) for i, line in enumerate(lines)]
    return life


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (Timeline(90.0), {"queue": 10}),
        (Timeline(90.0, finished=97.0), {"queue": 7, "deliver": 3}),
        (Timeline(90.0, 91.0, [(91.0, 94.0, 8, 1), (94.5, 95.5, 1, 1)], [94.0, 95.5], 95.5),
         {"queue": 1, "prefill": 3, "between": 0.5, "decode": 1, "deliver": 4.5}),
        (Timeline(90.0, 91.0, [(91.0, 93.0, 8, 1), (94.0, 95.0, 8, 1)], [95.0]),
         {"queue": 1, "prefill": 3, "between": 6, "decode": 0, "deliver": 0}),
        (Timeline(90.0, 91.0, [(91.0, 93.0, 8, 1)], [], 98.0), {"queue": 1, "prefill": 2, "between": 5, "deliver": 2}),
    ],
)  # fmt: skip
def test_the_parts_of_a_time_by_hand(line: Timeline, parts: dict[str, float]):
    found = life_of(line).split()
    assert {name: found.get(name) for name in parts} == parts
    assert found["total"] == 10 and abs(found["unexplained"]) < 1e-9


@given(st.lists(st.floats(0, 5), min_size=3, max_size=21), st.integers(0, 9), st.booleans(), st.floats(0, 9))
def test_the_parts_add_up_and_none_is_negative(gaps, chunks: int, ended: bool, own_s: float):
    moments = list(itertools.accumulate([1.0, *gaps]))
    steps = [(start, stop, 1, 1) for start, stop in zip(moments[2::2], moments[3::2], strict=False)]
    tokens = [stop for _, stop, *_ in steps[chunks:]]
    line = Timeline(moments[0], moments[1], steps, tokens, (steps[-1][1] if steps else moments[1]) if ended else None)
    life = life_of(line)
    life.clock = lambda: moments[-1]
    life.start_s, life.parts = moments[0] - own_s, {"parse": own_s}
    found = life.split()
    total = found.pop("total")
    assert total == pytest.approx(moments[-1] - moments[0] + own_s) and sum(found.values()) == pytest.approx(total)
    assert abs(found["unexplained"]) < 1e-6 and min(found.values()) > -1e-6
    assert server_timing({"queue": 0.0015, "total": 2.0}) == "queue;dur=1.500, total;dur=2000.000"


def test_of_several_answers_the_last_one_to_end_makes_up_the_whole():
    early, late = Timeline(90.0, 90.0, [], [], 92.0), Timeline(90.0, 95.0, [], [], 99.0)
    assert life_of(early, late).split()["queue"] == 5
    assert life_of(early, replace(late, finished=None, admitted=None)).split()["queue"] == 10


# ---- protocol.py


class Talk:
    """An engine's end of one answer: bytes are its tokens."""

    def decode(self, ids) -> str:
        return bytes(token for token in ids if token < END).decode(errors="replace")


def joined(chunks: list[dict], chat: bool) -> tuple:
    choices = [chunk["choices"][0] for chunk in chunks]
    texts = [choice["delta"].get("content", "") if chat else choice["text"] for choice in choices]
    told = [one for choice in choices if choice["logprobs"] for one in next(iter(choice["logprobs"].values()))]
    return "".join(texts), told, [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


@given(st.text(max_size=12), st.lists(st.integers(1, 5)), st.sampled_from([(), ("b",), ("ab", "é")]), st.booleans())
def test_a_stream_joined_is_the_whole_answer(text: str, sizes: list[int], stop: tuple[str, ...], chat: bool):
    """Text, log probabilities and reason, wherever the pieces are cut."""
    answer = Answer(Talk(), Request(0, [1], Sampling(stop=stop), Timeline(0.0)), None)
    reply = Reply("id", "tiny", chat, "0", lambda token: (chr(token), bytes([token % 256])), logprobs=True)
    sizes, chunks, told = iter([*sizes, *[1] * 99]), [], 0
    waiting = [Choice(token, -0.5, ((token, -0.5),)) for token in [*text.encode(), END]]
    while not answer.done:
        size = next(sizes)
        answer.choices += waiting[:size]
        del waiting[:size]
        if stop:
            answer.decode_new()
        if not waiting or (stop and answer.writer.stopped_by):
            answer.request.status, answer.request.finish_reason = Status.DONE, "stop"
            answer.decode_new()
        fresh, new = answer.choices[told:], answer.new_text()
        if new or answer.done:
            chunks.append(reply.text(0, new, fresh))
            told += len(fresh)
    chunks.append(reply.ending(0, answer))
    whole = reply.whole([answer], usage(1, [answer], {}))
    choice = whole["choices"][0]
    content = choice["message"]["content"] if chat else choice["text"]
    probabilities = next(iter(choice["logprobs"].values()))
    assert joined(chunks, chat) == (content, probabilities, [choice["finish_reason"]])
    assert whole["usage"]["completion_tokens"] == len(probabilities) == len(answer.choices)
    assert {chunk["id"] for chunk in chunks} == {whole["id"]} and all(one not in content for one in stop)


# ---- sending.py


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.floats(-9, 9)))
def test_an_event_is_one_line_whatever_it_holds(data):
    raw = event(data)
    assert raw.startswith(b"data: ") and raw.endswith(b"\n\n") and raw.count(b"\n") == 2 and b"\r" not in raw
    assert json.loads(raw[6:]) == data


async def stays() -> dict:
    await asyncio.sleep(60)
    return {"type": "http.disconnect"}


async def leaves() -> dict:
    return {"type": "http.disconnect"}


def test_work_ends_with_its_client():
    steps = []

    async def work(length_s: float) -> str:
        try:
            await asyncio.sleep(length_s)
            return "done"
        finally:
            steps.append("cleaned up")

    async def failing() -> None:
        raise ApiError(503, "code", "why")

    async def all_of_them() -> None:
        assert await unless_left(stays, work(0)) == "done"
        with pytest.raises(ApiError):
            await unless_left(stays, failing())
        with pytest.raises(ClientLeft):
            await unless_left(leaves, work(60))
        assert steps == ["cleaned up"] * 2, "before it is told"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(all_of_them())


@pytest.mark.parametrize("blocked_at", [0, 1, 2, 9])
def test_events_end_their_job_wherever_the_client_leaves(blocked_at: int):
    """Also before anything of it was sent."""
    log, sent = [], []

    async def events():
        try:
            for i in range(3):
                yield event({"i": i})
        finally:
            log.append("closed")

    async def send(message: dict) -> None:
        if len(sent) == blocked_at:
            await asyncio.sleep(60)
        sent.append(message)

    async def receive() -> dict:
        while len(sent) < blocked_at:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def answer() -> None:
        made = Events(events(), {"x": "y"}, gone=lambda: log.append("gone"), ended=lambda: log.append("ended"))
        await made({"state": {}}, receive, send)

    asyncio.run(answer())
    assert log == (["closed", "ended"] if blocked_at == 9 else ["closed", "gone", "ended"])
    if blocked_at == 9:
        assert b"".join(message.get("body", b"") for message in sent).count(b"data: ") == 3
        assert (b"content-type", b"text/event-stream; charset=utf-8") in sent[0]["headers"]


@pytest.mark.parametrize("before", [0, 1])
def test_an_error_is_an_event_only_when_one_was_sent_before_it(before: int):
    log, sent, life = [], [], Life(lambda: 0.0, "req-1")

    async def events():
        for i in range(before):
            yield event({"i": i})
        raise ApiError(504, "deadline_exceeded", "Too late.", outcome="timeout")

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    made = Events(events(), {}, gone=lambda: log.append("gone"), ended=lambda: log.append("ended"))
    answer = made({"state": {"life": life}}, receive, send)
    if before:
        asyncio.run(answer)
        assert sent[-1]["body"].startswith(b'data: {"error":') and sent[-1]["more_body"] is False
        assert (life.outcome, life.error_code) == ("timeout", "deadline_exceeded")
    else:
        with pytest.raises(ApiError, match="Too late"):
            asyncio.run(answer)
        assert sent == [] and life.outcome == "ok", "it is the routes' business"
    assert log == ["ended"]


# ---- guard.py


@pytest.mark.parametrize("whole", [True, False])
def test_b60_who_leaves_while_he_waits_for_his_turn_has_left_and_made_no_mistake(whole: bool):
    ended, sent = [], []
    guard = Guard(
        None, clock=time.perf_counter, door=lambda *_: None, begun=lambda *_: None, ended=ended.append,
        refused=ended.append, max_body=100, body_timeout=1.0, cors_origin=None, kept=lambda: True,
    )  # fmt: skip
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "state": {"whole": whole}}
    guard.born(scope, {})

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    found = [(life.outcome, life.status, life.error_code) for life in ended]
    assert found == [("cancelled", 499, "client_left") if whole else ("client_error", 400, "incomplete_body")]
    assert bool(sent) is not whole
