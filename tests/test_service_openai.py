"""Fault matrix B67: OpenAI's own client understands the service. Its two latest major versions, and both its ways."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import ROOT
from filelock import FileLock
from service_kit import Served, served
from step_kit import settled

pytestmark = pytest.mark.slow

OLD = "2.54.0"  # the last of its kind
OLD_HOME = ROOT / ".venv-openai2"
HELLO: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
STREAM: Any = HELLO | {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def here(checkpoint_folder):
    with served(checkpoint_folder) as found:
        yield found


def client_of(here: Served, kind: Any = openai.OpenAI, **wishes: Any) -> Any:
    """Without retries, unless a test is about them."""
    return kind(**{"base_url": f"http://127.0.0.1:{here.port}/v1", "api_key": "any", "max_retries": 0} | wishes)


# ---- answers


def test_b67_a_chat_is_a_typed_object_with_its_id_and_usage_that_adds_up(here):
    with client_of(here) as client:
        found = client.chat.completions.create(**HELLO, logprobs=True, top_logprobs=2, n=2, seed=5)
    assert isinstance(found, openai.types.chat.ChatCompletion) and found.object == "chat.completion"
    assert [choice.index for choice in found.choices] == [0, 1]
    for choice in found.choices:
        assert (choice.message.role, choice.finish_reason, choice.message.refusal) == ("assistant", "length", None)
        assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
        assert [bytes(token.bytes) for token in choice.logprobs.content] == [
            letter.encode() for letter in choice.message.content
        ]
        assert all(token.top_logprobs[0].logprob == token.logprob for token in choice.logprobs.content)
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    usage = found.usage
    assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert found._request_id == settled(here)[-1]["request_id"] and found.id.endswith(found._request_id[4:])
    assert here.ask(f"/debug/requests/{found._request_id}").json["completion_tokens"] == 12


def test_b67_a_stream_is_the_same_answer_in_pieces(here):
    with client_of(here) as client:
        whole = client.chat.completions.create(**HELLO)
        chunks = list(client.chat.completions.create(**STREAM, logprobs=True))
        without = list(client.chat.completions.create(**HELLO, stream=True))
    assert all(isinstance(chunk, openai.types.chat.ChatCompletionChunk) for chunk in chunks)
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    told = [token.token for chunk in chunks[1:-2] for token in chunk.choices[0].logprobs.content]
    assert "".join(told) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in without) and without[-1].choices[0].finish_reason == "length"


def test_b67_completions_of_text_and_of_token_ids(here):
    with client_of(here) as client:
        found = client.completions.create(model="tiny", prompt=[64, 65, 66], max_tokens=5, logprobs=1, temperature=0)
        text = client.completions.create(model="tiny", prompt="abc", max_tokens=5, temperature=0)
        pieces = list(client.completions.create(model="tiny", prompt="abc", max_tokens=5, temperature=0, stream=True))
    assert isinstance(found, openai.types.Completion) and found.usage.prompt_tokens == 3
    assert found.choices[0].text == text.choices[0].text == "".join(piece.choices[0].text for piece in pieces)
    assert "".join(found.choices[0].logprobs.tokens) == found.choices[0].text
    assert found.choices[0].logprobs.token_logprobs == [-0.1] * 5


def test_b67_models(here):
    with client_of(here) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")


def test_b67_the_asynchronous_client_many_at_once(here):
    async def all_of_them() -> tuple[list[Any], str]:
        async with client_of(here, openai.AsyncOpenAI) as client:
            answers = await asyncio.gather(*(client.chat.completions.create(**HELLO) for _ in range(6)))
            stream = await client.chat.completions.create(**STREAM)
            return answers, "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    answers, streamed = asyncio.run(all_of_them())
    assert {answer.choices[0].message.content for answer in answers} == {streamed}
    assert len({answer._request_id for answer in answers}) == 6


# ---- errors


def test_b67_what_is_wrong_is_an_exception_of_its_own_kind(here):
    with client_of(here) as client:
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(**HELLO | {"temperature": 1.5, "top_p": 7})
        assert (wrong.value.code, wrong.value.param, wrong.value.type) == (
            "invalid_value", "top_p", "invalid_request_error")  # fmt: skip
        assert wrong.value.request_id and "top_p" in wrong.value.message
        with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
            client.chat.completions.create(**HELLO | {"model": "gpt-9"})
        here.runner.faults[1] = RuntimeError("broken")
        with pytest.raises(openai.InternalServerError) as broken:
            client.chat.completions.create(**HELLO)
        assert (broken.value.status_code, broken.value.code) == (500, "engine_error")


def test_b67_keys_and_quotas(checkpoint_folder):
    with served(checkpoint_folder, api_key="sk-right", requests_per_minute=2) as here:
        with client_of(here) as client, pytest.raises(openai.AuthenticationError) as wrong:
            client.chat.completions.create(**HELLO)
        assert wrong.value.code == "invalid_api_key"
        with client_of(here, api_key="sk-right") as client:
            raw = client.chat.completions.with_raw_response.create(**HELLO)
            assert raw.headers["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(openai.RateLimitError) as over:
                client.chat.completions.create(**HELLO)
        assert over.value.code == "rate_limit_exceeded" and over.value.response.headers["x-should-retry"] == "true"
        here.house.serving.limits.buckets.clear()  # for the probe at the end


def test_b67_b68_a_stream_that_breaks_raises_after_what_was_said(here):
    here.runner.hold()
    with client_of(here) as client:
        here.runner.allow(2)  # before: a stream begins with its first token
        stream, said = client.chat.completions.create(**STREAM), []
        with pytest.raises(openai.APIError) as broken:
            for chunk in stream:
                said.append(chunk)
                if chunk.choices[0].delta.content:
                    here.runner.faults[1] = RuntimeError("broken")
                    here.runner.go()
    assert broken.value.code == "engine_error" and len(said) > 1
    assert all(chunk.choices[0].finish_reason is None for chunk in said)


# ---- retries and patience


def fill(here: Served) -> None:
    """Take every place there is, and hold the engine."""
    here.runner.hold()
    for _ in range(here.admission.limits.places):
        here.later(here.chat, max_tokens=4)
    here.until(lambda: here.admission.answers == here.admission.limits.places)


def test_b67_a_full_house_is_tried_again_as_late_as_it_said_and_then_served(checkpoint_folder):
    with served(checkpoint_folder, max_running=1, max_queued=1) as here:
        fill(here)
        here.admission.jitter = lambda: 4.0  # of half a second: later than the client would come back by itself
        before, begin = here.received, time.monotonic()
        with client_of(here, max_retries=2) as client, pytest.raises(openai.InternalServerError) as full:
            client.chat.completions.create(**HELLO)
        assert (full.value.status_code, full.value.code) == (503, "server_overloaded")
        assert here.received == before + 3
        assert time.monotonic() - begin >= 4.0
        here.admission.jitter = lambda: 0.2
        with client_of(here, max_retries=2) as client:
            late = here.later(client.chat.completions.create, **HELLO)
            here.until(lambda: here.received == before + 4)
            here.runner.go()
            assert late.result().choices[0].finish_reason == "length"
        line = settled(here)[-1]
        assert line["retry"] and here.received == before + 5


def test_b67_what_cannot_help_is_not_tried_again(here):
    here.runner.hold()
    with client_of(here, max_retries=2) as client:
        before = here.received
        with pytest.raises(openai.InternalServerError) as late:
            client.chat.completions.create(**HELLO, extra_headers={"x-request-deadline-ms": "200"})
        assert late.value.status_code == 504 and late.value.code == "deadline_exceeded"
        assert late.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**HELLO | {"max_tokens": 0})
    assert here.received == before + 2


def test_b67_the_clients_own_timeout_is_its_deadline_here(here):
    with client_of(here) as client:
        client.chat.completions.create(**HELLO, timeout=7.5)
        client.chat.completions.create(**HELLO)
        list(client.chat.completions.create(**STREAM, timeout=7.5))
    assert [line["deadline"] for line in settled(here)[-3:]] == [7.5, 300, 300]


def test_b67_heartbeats_keep_a_silent_stream_alive_and_without_them_the_client_gives_up(checkpoint_folder):
    with served(checkpoint_folder, heartbeat=0.1) as here:
        here.runner.hold()
        with client_of(here, timeout=1.5) as client:
            stream = here.later(lambda: list(client.chat.completions.create(**STREAM)))
            time.sleep(3.0)
            here.runner.go()
            assert stream.result()[-1].usage.completion_tokens == 6
    with served(checkpoint_folder) as here:
        here.runner.hold()
        with client_of(here, timeout=0.4) as client, pytest.raises(openai.APITimeoutError):
            list(client.chat.completions.create(**STREAM))
        here.until(lambda: here.outcomes().get("cancelled") == 1)
        here.runner.go()


# ---- the version before


@pytest.fixture(scope="session")
def old_python() -> Path:
    """An interpreter with version 2 of the client, which cannot live beside version 3."""
    python, stamp = OLD_HOME / "bin" / "python", OLD_HOME / ".version"
    with FileLock(f"{OLD_HOME}.lock"):
        if not stamp.exists() or stamp.read_text() != OLD:
            made = [sys.executable, "-m", "venv", "--clear", str(OLD_HOME)]
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"openai=={OLD}"]
            for command in (made, install):
                ran = subprocess.run(command, capture_output=True, text=True)
                assert ran.returncode == 0, f"{' '.join(command)}: {ran.stderr}"
            stamp.write_text(OLD)
    return python


def test_b67_version_2_of_the_client_understands_it_too(here, old_python):
    program = [str(old_python), str(Path(__file__).with_name("openai_old.py")), f"http://127.0.0.1:{here.port}"]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    ours = here.chat(max_tokens=6, temperature=0).json
    text = ours["choices"][0]["message"]["content"]
    assert found["version"] == OLD and found["models"] == ["tiny"]
    assert found["text"] == found["streamed"] == found["async"]["text"] == found["async"]["streamed"] == text
    assert found["request_id"].startswith("req-") and found["completion_tokens"] == 3
    for usage in (found["usage"], found["streamed_usage"]):
        assert usage["completion_tokens"] == 6
        assert usage["total_tokens"] == usage["prompt_tokens"] + 6 == ours["usage"]["total_tokens"]
    assert found["error"] == {"status": 400, "code": "invalid_value", "param": "temperature"}
