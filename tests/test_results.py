"""Kept answers: what they are found by, what is never kept, and that nobody can tell one from a computed one."""

import socket

import pytest
from process_kit import joined
from process_kit import whole as whole_of
from service_kit import chat_body, raw_request, read_until, served
from step_kit import figure, settled, text_of

from service.results import BESIDE, Results, Wishes
from service.schemas import ChatRequest, CompletionRequest

slow = pytest.mark.slow
USAGE = {"prompt_tokens": 3, "completion_tokens": 5}


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def results(most: int = 100_000, clock: Clock | None = None, **scope: str) -> Results:
    return Results(most, 60.0, {"hash": "abc"} | scope, clock or Clock())


def chat(**wishes) -> ChatRequest:
    messages = [{"role": "user", "content": "hello"}]
    return ChatRequest.model_validate({"model": "m", "temperature": 0, "messages": messages} | wishes)


# ---- by what an answer is found


def test_only_what_can_have_one_answer_has_a_name():
    kept = results()
    assert kept.name(chat(), "k", 5) and kept.name(chat(temperature=1, seed=3), "k", 5)
    assert kept.name(chat(temperature=1), "k", 5) is None and kept.name(chat(temperature=None), "k", 5) is None


@pytest.mark.parametrize(
    "wishes",
    [
        {"messages": [{"role": "system", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "hello!"}]},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "user", "content": ""}]},
        {"n": 2}, {"seed": 1}, {"stop": "x"}, {"logprobs": True}, {"top_p": 0.5}, {"logit_bias": {"5": 1}},
        {"temperature": 1e-6}, {"cache_salt": "mine"}, {"ignore_eos": True}, {"frequency_penalty": 1},
    ],
)  # fmt: skip
def test_whatever_decides_an_answer_is_in_its_name(wishes):
    assert results().name(chat(**wishes), "k", 5) != results().name(chat(), "k", 5)


@pytest.mark.parametrize(
    "wishes",
    [
        {"stream": True, "stream_options": {"include_usage": True}}, {"user": "me"}, {"metadata": {"a": "b"}}, {"n": 1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}, {"stop": []},
    ],
)  # fmt: skip
def test_what_decides_nothing_is_not(wishes):
    assert results().name(chat(**wishes), "k", 5) == results().name(chat(), "k", 5)


def test_another_key_another_model_another_length_and_another_endpoint_find_nothing():
    name = results().name(chat(), "k", 5)
    assert results().name(chat(), "other", 5) != name != results().name(chat(), "k", 6)
    assert results(hash="abd").name(chat(), "k", 5) != name
    text = CompletionRequest.model_validate({"model": "m", "temperature": 0, "prompt": "hello"})
    ids = CompletionRequest.model_validate({"model": "m", "temperature": 0, "prompt": [1, 2]})
    assert len({name, results().name(text, "k", 5), results().name(ids, "k", 5)}) == 3


def test_what_the_engine_will_refuse_has_no_name():
    assert results().name(chat(), "k", 2**40) is None


@pytest.mark.parametrize(
    "said, read, write",
    [(None, True, True), ("no-cache", False, True), ("max-age=0, No-Store", False, False), ("private", True, True)],
)
def test_cache_control_is_obeyed(said, read, write):
    assert Wishes.of(said) == Wishes(read, write)


# ---- how long, and how much


def test_an_answer_is_fresh_for_its_time_and_after_that_found_only_as_a_stale_one():
    clock = Clock()
    kept = results(clock=clock)
    kept.keep("a", [{"index": 0}], USAGE)
    clock.now_s += 60
    assert kept.find("a").choices == [{"index": 0}] and kept.find("b") is None
    clock.now_s += 1
    assert kept.find("a") is None and kept.find("a", stale=True).age_s == 61 and kept.find("b", stale=True) is None
    assert (kept.hits, kept.misses) == (2, 2)


def test_its_bytes_are_bounded_and_what_was_used_last_stays():
    size = len('{"choices":[],"prompt_tokens":3,"completion_tokens":5}') + BESIDE
    kept = results(3 * size)
    for name in "abc":
        kept.keep(name, [], USAGE)
    assert kept.bytes == 3 * size and kept.find("a")
    kept.keep("d", [], USAGE)
    assert kept.bytes == 3 * size and kept.find("a") and kept.find("b") is None
    kept.keep("e", [{"text": "x" * 3 * size}], USAGE)
    assert kept.find("e") is None and kept.find("d")


# ---- in the service


@pytest.fixture
def here(checkpoint_folder):
    with served(checkpoint_folder, result_cache_bytes=1 << 20, max_running=2, max_queued=1) as found:
        yield found


def whole_stream(ask, **wishes):
    return joined(ask(stream=True, stream_options={"include_usage": True}, **wishes).events)


def counts(answer) -> dict[str, int]:
    return {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}


@slow
@pytest.mark.parametrize("kept_by_stream", [False, True])
@pytest.mark.parametrize("chat", [True, False])
def test_streams_and_whole_answers_from_the_cache_are_those_that_were_computed(here, chat: bool, kept_by_stream: bool):
    ask = here.chat if chat else here.complete
    wishes = {"temperature": 0, "n": 2, "max_tokens": 9} | (
        {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    )
    first = whole_stream(ask, **wishes) if kept_by_stream else whole_of(ask(**wishes).json)
    computed = here.bridge.count("computed")
    again, stream = ask(**wishes), whole_stream(ask, **wishes)
    assert again.headers["x-cache"] == "hit" and again.headers["age"] == "0"
    assert whole_of(again.json)["choices"] == stream["choices"] == first["choices"]
    assert counts(again.json) == counts(stream) == counts(first)
    assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] == counts(first)["prompt_tokens"]
    parts = dict(again.json["usage"]["timing"])
    total = parts.pop("total")
    assert "cache" in parts and abs(sum(parts.values()) - total) < 1e-4
    assert here.bridge.count("computed") == computed, "nothing was computed for them"
    line = settled(here)[-1]
    assert line["cache"] == "hit" and line["completion_tokens"] == 18 and line["outcome"] == "ok"
    lookups = {result: figure(here, "result_cache_lookups_total", result=result) for result in ("hit", "miss")}
    assert lookups == {"hit": 2, "miss": 2} and figure(here, "result_cache_bytes") > 2 * BESIDE


@slow
def test_a_client_may_pass_the_cache_by(here):
    ask = {"temperature": 0}
    assert here.chat(**ask).headers["x-cache"] == "miss"
    assert here.chat(**ask, headers={"Cache_Control": "no-cache"}).headers["x-cache"] == "miss"
    assert "x-cache" not in here.chat(**ask, headers={"Cache_Control": "no-store"}).headers
    assert here.chat(**ask).headers["x-cache"] == "hit"
    assert "x-cache" not in here.chat(temperature=1).headers
    assert "x-cache" not in here.chat("another", **ask, headers={"Cache_Control": "no-store"}).headers
    assert here.chat("another", **ask).headers["x-cache"] == "miss"


@slow
def test_without_the_setting_nothing_is_kept(checkpoint_folder):
    with served(checkpoint_folder) as here:
        assert all("x-cache" not in here.chat(temperature=0).headers for _ in range(2))


@slow
def test_a_hit_takes_no_place_and_is_drawn_from_the_keys_limits(checkpoint_folder):
    with served(
        checkpoint_folder, result_cache_bytes=1 << 20, max_running=1, max_queued=1, requests_per_minute=6, api_key="k"
    ) as here:
        key = {"Authorization": "Bearer k"}
        assert here.chat(temperature=0, headers=key).headers["x-cache"] == "miss"
        here.runner.hold()
        inside = [here.later(here.chat, f"number {i}", headers=key) for i in range(2)]
        here.until(lambda: len(here.jobs) == 2)
        assert here.chat("other", temperature=0, headers=key).status == 503
        hit = here.chat(temperature=0, headers=key)
        assert hit.headers["x-cache"] == "hit" and hit.headers["x-ratelimit-remaining-requests"] == "1"
        assert here.chat(temperature=0).status == 401
        assert here.chat(temperature=0, headers=key).status == 200
        assert here.chat(temperature=0, headers=key).status == 429
        here.runner.go()
        assert [one.result().status for one in inside] == [200, 200]
        for bucket in here.house.serving.limits.buckets.values():
            bucket.level = bucket.most  # for the last probe


@slow
def test_errors_cancelled_answers_and_those_cut_by_the_ladder_are_not_kept(checkpoint_folder):
    with served(checkpoint_folder, result_cache_bytes=1 << 20, degrade_max_tokens=3) as here:
        one, here.runner.one = here.runner.one, lambda _part: RuntimeError("broken")
        assert here.chat("broken", temperature=0).status == 500
        here.runner.one = one
        assert here.chat("broken", temperature=0).headers["x-cache"] == "miss"
        here.runner.hold()
        leaving = here.send_chat("leaving", temperature=0, stream=True, max_tokens=50)
        here.until(lambda: here.jobs)
        leaving.close()
        here.until(lambda: not here.house.serving.jobs)
        here.runner.go()
        assert here.chat("leaving", temperature=0, max_tokens=50).headers["x-cache"] == "miss"
        here.house.serving.feel = lambda: here.house.serving.relief.ladder.feel(1.0)
        capped = here.chat("capped", temperature=0, max_tokens=9)
        assert capped.headers["x-degraded"] == "max_tokens=3" and capped.headers["x-cache"] == "miss"
        del here.house.serving.feel
        here.house.serving.relief.ladder.tight = False
        whole = here.chat("capped", temperature=0, max_tokens=9)
        assert whole.headers["x-cache"] == "miss" and len(text_of(whole)) == 9


@slow
def test_an_answer_that_ended_by_itself_below_the_cap_is_kept(checkpoint_folder):
    """It is what it would have been without one."""
    with served(checkpoint_folder, result_cache_bytes=1 << 20, degrade_max_tokens=30) as here:
        here.house.serving.feel = lambda: here.house.serving.relief.ladder.feel(1.0)
        first = here.chat("short", temperature=0, max_tokens=90, stop="abcdefghijklmnopqrstuvwxyz"[0])
        again = here.chat("short", temperature=0, max_tokens=90, stop="a")
        ended = first.json["choices"][0]["finish_reason"]
        assert again.headers["x-cache"] == ("hit" if ended == "stop" else "miss")
        here.house.serving.relief.ladder.tight = False
        del here.house.serving.feel


@slow
def test_a_stale_answer_is_better_than_none_for_who_accepts_it(checkpoint_folder):
    with served(checkpoint_folder, result_cache_bytes=1 << 20, result_cache_ttl=0.1) as here:
        first = text_of(here.chat(temperature=0))
        results = here.house.serving.relief.results
        here.until(lambda: results.clock() - max(at_s for at_s, _ in dict(results.kept).values()) > 0.1)
        one, here.runner.one = here.runner.one, lambda _part: RuntimeError("broken")
        while here.chat(f"broken {here.received}").status == 500:
            pass
        here.runner.one = one
        stale = here.chat(temperature=0)
        assert text_of(stale) == first and stale.headers["x-degraded"] == "cached"
        for headers in ({"X_Allow_Degraded": "none"}, {"Cache_Control": "no-cache"}):
            assert here.chat(temperature=0, headers=headers).error["code"] == "circuit_open"
        assert here.chat("unknown", temperature=0).error["code"] == "circuit_open"
        assert figure(here, "degraded_requests_total", rung="cached") == 1
        assert here.ask("/health/ready").status == 503, "kept answers are for a few only"
        here.house.serving.relief.engine.force(None)


@slow
def test_b61_a_client_that_leaves_while_a_kept_answer_is_sent_leaves_nothing_behind(checkpoint_folder):
    with served(checkpoint_folder, result_cache_bytes=64 << 20) as here:
        here.house.serving.relief.results.kept.clear()  # of the probe
        assert here.chat(temperature=0).headers["x-cache"] == "miss"
        (name,) = here.house.serving.relief.results.kept
        kept = here.house.serving.relief.results.find(name)
        kept.choices[0]["message"]["content"] = "x" * (32 << 20)  # no socket takes that at once
        here.house.serving.relief.results.keep(name, kept.choices, USAGE)
        neighbour = text_of(here.chat("neighbour", max_tokens=8))
        for stream in (True, False):
            with socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect(("127.0.0.1", here.port))
                connection.sendall(raw_request("/v1/chat/completions", chat_body(temperature=0, stream=stream)))
                assert b"x-cache: hit" in read_until(connection, b"xxxx")
        assert text_of(here.chat("neighbour", max_tokens=8)) == neighbour
        lines = [line for line in settled(here) if line.get("cache") == "hit"]
        streamed = next(line for line in lines if line["stream"])
        assert len(lines) == 2 and (streamed["outcome"], streamed["status"]) == ("cancelled", 499)
        assert not here.house.serving.jobs and here.admission.at_door == 0
