"""Fault matrix B3: what is asked for, value by value. The numbers are the matrix's.

What becomes of texts on their way to the engine and back (31, 34, 40, 43 to 46, 50) is in test_service_text.py.
"""

import socket
import time

import pytest
from service_kit import CONTEXT, NAME, chat_body, served

CHAT, LEGACY = "/v1/chat/completions", "/v1/completions"
ABSENT = object()
HUGE = 1 << 20


@pytest.fixture(scope="module")
def here(checkpoint_folder):
    """One for all cases: that none of them leaves a trace is looked at in the end."""
    with served(checkpoint_folder, max_body=8 * HUGE, max_queued=32) as found:
        yield found


def asked(here, wishes: dict, path: str = CHAT):
    body = chat_body() if path == CHAT else {"model": NAME, "prompt": "hello", "max_tokens": 4}
    return here.ask(path, {name: value for name, value in (body | wishes).items() if value is not ABSENT})


def refused(here, wishes: dict, param: str | None, code: str = "invalid_value", path: str = CHAT) -> str:
    """The message of a 400 that the engine never heard of."""
    before = here.runner.steps
    reply = asked(here, wishes, path)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, code, param), reply.error["message"]
    assert reply.error["type"] == "invalid_request_error" and reply.headers["x-should-retry"] == "false"
    assert len(reply.body) <= 2048 and here.runner.steps == before
    return reply.error["message"]


# ---- messages


def user(content) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("messages", [ABSENT, None, [], {}, "hello", 3, [{"role": "user", "content": "x"}] * 2049])
def test_b28_no_messages(here, messages):
    refused(here, {"messages": messages}, "messages")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "king", "content": "x"}, "role"), ({"role": "tool", "content": "x"}, "role"),
        ({"role": "User", "content": "x"}, "role"), ({"role": None, "content": "x"}, "role"),
        ({"content": "x"}, "role"),
        ({"role": "user"}, "content"), ({"role": "user", "content": None}, "content"),
        ({"role": "user", "content": 3}, "content"), ({"role": "user", "content": []}, "content"),
        ({"role": "user", "content": "x", "name": "n" * 513}, "name"), ("hello", None), (None, None),
    ],
)  # fmt: skip
def test_b29_messages_that_are_none(here, message, field):
    """Named by their place, however many good ones are before them."""
    refused(
        here, {"messages": [{"role": "user", "content": "x"}, message]}, f"messages.1{f'.{field}' if field else ''}"
    )


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file", "refusal"])
def test_b30_other_parts_are_refused_and_nothing_is_fetched(here, kind: str):
    with socket.create_server(("127.0.0.1", 0)) as trap:
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/secret"
        parts = [{"type": "text", "text": url}, {"type": kind, kind: {"url": url, "data": url}}]
        refused(here, user(parts), "messages.0.content.1.type", "unsupported_content")
        assert asked(here, {"model": url}).status == 404
        trap.settimeout(0.05)
        with pytest.raises(TimeoutError):
            trap.accept()


def test_b30_a_text_part_needs_its_text_and_nothing_else(here):
    refused(here, user([{"type": "text"}]), "messages.0.content.0.text")
    strange = [{"type": "text", "text": "x", "colour": "red"}]
    refused(here, user(strange), "messages.0.content.0.colour", "unknown_parameter")
    refused(here, user([{"type": "text", "text": "x"}] * 65), "messages.0.content")


# ---- which model


@pytest.mark.parametrize(
    "name", ["gpt-4o", "", "TINY", "tiny ", "HuggingFaceTB/SmolLM2-135M", "../../etc", "random:distilgpt2", "x" * 512]
)
def test_b32_another_model_is_never_loaded(here, name: str, monkeypatch):
    for place in ("weights.find.find", "weights.hub.download", "engine.load.load"):
        monkeypatch.setattr(place, lambda *_a, **_k: pytest.fail("the service looked for a model"))
    for path in (CHAT, LEGACY):
        reply = asked(here, {"model": name}, path)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
    assert here.ask("/v1/models/nobody").error["code"] == "model_not_found"


@pytest.mark.parametrize("name", [ABSENT, None, 3, "x" * 513])
def test_b32_no_name(here, name):
    refused(here, {"model": name}, "model")


# ---- numbers: (the matrix's number, what is asked, the field that is named, what the message says)

LIMITS = [
    (33, {"temperature": -1}, "temperature", "0"), (33, {"temperature": 3}, "temperature", "2"),
    (33, {"temperature": "0.5"}, "temperature", "number"), (33, {"temperature": True}, "temperature", "number"),
    (35, {"top_p": 0}, "top_p", "0"), (35, {"top_p": 1.1}, "top_p", "1"), (35, {"top_k": 0}, "top_k", "1"),
    (35, {"top_k": -1}, "top_k", "1"), (35, {"top_k": 1.5}, "top_k", "integer"), (35, {"top_k": 2**31}, "top_k", ""),
    (35, {"frequency_penalty": 10}, "frequency_penalty", "2"), (35, {"min_p": 2}, "min_p", "1"),
    (35, {"presence_penalty": -10}, "presence_penalty", "-2"), (35, {"min_p": -0.1}, "min_p", "0"),
    (35, {"repetition_penalty": 0}, "repetition_penalty", "0"),
    (36, {"max_tokens": 0}, "max_tokens", "1"), (36, {"max_tokens": -1}, "max_tokens", "1"),
    (36, {"max_completion_tokens": 0}, "max_completion_tokens", "1"), (36, {"max_tokens": 1.0}, "max_tokens", ""),
    (36, {"max_tokens": 1e12}, "max_tokens", "integer"), (36, {"max_tokens": 2**64}, "max_tokens", "integer"),
    (36, {"max_tokens": 4, "max_completion_tokens": 5}, None, "differ"),
    (39, {"stop": list("abcde")}, "stop", "4"), (39, {"stop": ""}, "stop", "1"),
    (39, {"stop": ["a", ""]}, "stop.1", "1"),
    (39, {"stop": "x" * 102_400}, "stop", "1024"), (39, {"stop": ["x" * 102_400]}, "stop.0", "1024"),
    (39, {"stop": 3}, "stop", "string"), (39, {"stop": [3]}, "stop.0", "string"), (39, {"stop": {}}, "stop", "string"),
    (41, {"n": 9}, "n", "8"), (41, {"n": 0}, "n", "1"), (41, {"n": True}, "n", "integer"),
    (41, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"), (41, {"top_logprobs": 2}, None, "logprobs"),
    (41, {"logprobs": 1}, "logprobs", "boolean"),
    (42, {"logit_bias": {"257": 1}}, "logit_bias", "256"), (42, {"logit_bias": {"-1": 1}}, "logit_bias", "-1"),
    (42, {"logit_bias": {"x": 1}}, "logit_bias", "x"), (42, {"logit_bias": {"²": 1}}, "logit_bias", "²"),
    (42, {"logit_bias": {"9" * 10: 1}}, "logit_bias", "999"), (42, {"logit_bias": {"1": 101}}, "logit_bias", "100"),
    (42, {"logit_bias": {"1": None}}, "logit_bias", ""), (42, {"logit_bias": [1]}, "logit_bias", ""),
    (42, {"logit_bias": {str(i): 1 for i in range(10_000)}}, "logit_bias", "300"),
    (43, {"seed": -1}, "seed", "0"), (43, {"seed": 2**63}, "seed", ""), (43, {"seed": "1"}, "seed", "integer"),
    (43, {"seed": 1.5}, "seed", "integer"), (43, {"seed": 2**63 - 1, "n": 2}, "seed", "seed"),
    (49, {"stream": "yes"}, "stream", "bool"), (49, {"stream_options": {}}, None, "stream"),
    (49, {"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage", "bool"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "wishes", "param", "says"), LIMITS)
def test_b33_35_36_39_41_42_43_values_out_of_range(here, number: int, wishes: dict, param: str | None, says: str):
    assert says in refused(here, wishes, param), number


def test_b41_the_other_endpoint_has_the_same_limits(here):
    refused(here, {"logprobs": 21}, "logprobs", path=LEGACY)
    refused(here, {"logprobs": True}, "logprobs", path=LEGACY)
    refused(here, {"prompt": ["one", "two"]}, "prompt.0", path=LEGACY)
    refused(here, {"prompt": [1, -3]}, "prompt.1", path=LEGACY)
    refused(here, {"prompt": []}, "prompt", path=LEGACY)
    refused(here, {"prompt": [1, 257], "logit_bias": {"1": 1}}, "prompt", path=LEGACY)
    refused(here, {"prompt": ABSENT}, "prompt", path=LEGACY)


FINE = [
    {"temperature": None}, {"temperature": 0}, {"temperature": 2}, {"temperature": 1e-12}, {"temperature": 5e-324},
    {"top_p": 1}, {"top_p": 1e-9}, {"min_p": 0}, {"min_p": 1}, {"frequency_penalty": -2}, {"presence_penalty": 2},
    {"top_k": 1}, {"top_k": 2**31 - 1}, {"max_tokens": None}, {"max_tokens": 4, "max_completion_tokens": 4},
    {"stop": list("1234")}, {"stop": []}, {"stop": None}, {"stop": "x" * 1024}, {"n": 8}, {"n": None},
    {"seed": 0}, {"seed": 2**63 - 1}, {"seed": 2**63 - 8, "n": 8}, {"logit_bias": {"256": -100, "0": 100}},
    {"logit_bias": {}}, {"logprobs": True, "top_logprobs": 20}, {"logprobs": False, "top_logprobs": 0},
    {"response_format": {"type": "text"}}, {"tools": None}, {"user": "u", "metadata": {"a": "b"}, "store": False},
]  # fmt: skip


@pytest.mark.parametrize("wishes", FINE, ids=str)
def test_b33_to_43_the_limits_themselves_are_within(here, wishes: dict):
    reply = asked(here, wishes)
    assert reply.status == 200, reply.body
    assert len(reply.json["choices"]) == (wishes.get("n") or 1)


@pytest.mark.parametrize(
    ("number", "wishes", "param"),
    [
        (41, {"best_of": 2}, "best_of"), (41, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (47, {"response_format": {"type": "json_object"}}, "response_format"),
        (47, {"response_format": {"type": "json_schema", "json_schema": {"$ref": "#"}}}, "response_format"),
        (47, {"response_format": {"type": "text", "x": "y" * HUGE}}, "response_format"),
        (48, {"tools": []}, "tools"), (48, {"tools": [{"type": "function"}]}, "tools"),
        (48, {"tool_choice": "maybe"}, "tool_choice"), (48, {"functions": []}, "functions"),
    ],
)  # fmt: skip
def test_b41_47_48_what_is_known_and_not_offered(here, number: int, wishes: dict, param: str):
    before = time.monotonic()
    for path in (CHAT, LEGACY):
        assert param in refused(here, wishes, param, "unsupported_parameter", path)
    assert time.monotonic() - before < 1, number


def test_b48_tool_calls_in_a_message(here):
    message = {"role": "assistant", "content": "x", "tool_calls": []}
    refused(here, {"messages": [message]}, "messages.0.tool_calls", "unsupported_parameter")


# ---- how much


@pytest.mark.parametrize(
    ("wishes", "numbers"),
    [
        ({"max_tokens": 10**12}, ["10" + "0" * 11, str(CONTEXT)]), ({"max_tokens": CONTEXT}, [str(CONTEXT)]),
        ({"max_tokens": 490}, ["24", "490", "512"]), (user("x" * 600), ["619", "4", "512"]),
        (user("x" * 5_000), ["512", "4"]), ({"messages": [{"role": "user", "content": "x"}] * 100}, ["812", "512"]),
    ],
)  # fmt: skip
def test_b36_37_more_than_the_context_holds(here, wishes: dict, numbers: list[str]):
    name = "messages" if "messages" in wishes or wishes["max_tokens"] < CONTEXT else "max_tokens"
    message = refused(here, wishes, name, "context_length_exceeded")
    assert all(number in message for number in numbers), message


def test_b37_exactly_the_context_fits(here):
    prompt = asked(here, {}).json["usage"]["prompt_tokens"]
    reply = asked(here, {"max_tokens": CONTEXT - prompt, "ignore_eos": True})
    assert reply.json["usage"]["total_tokens"] == CONTEXT
    refused(here, {"max_tokens": CONTEXT - prompt + 1}, "messages", "context_length_exceeded")


def test_b37_the_service_answers_while_a_prompt_is_tokenised(here, monkeypatch):
    """The tokenizer has threads of its own; that it lets go of Python's lock there is in test_service_prompts.py."""
    prompts, encode = here.house.serving.prompts, here.house.serving.prompts.encode
    monkeypatch.setattr(prompts, "encode", lambda wish: time.sleep(0.6) or encode(wish))
    slow = here.later(here.chat, "a long one")
    here.until(lambda: here.house.serving.jobs)
    waits = []
    while not slow.done:
        before = time.monotonic()
        assert here.ask("/health/live").status == 200
        waits.append(time.monotonic() - before)
    assert slow.result().status == 200
    assert len(waits) > 3 and max(waits) < 0.3


@pytest.mark.parametrize("piece", ["a", " ", "\n", "👨\u200d👩\u200d👧", "\u0301"], ids=ascii)
def test_b38_a_mebibyte_of_one_thing(here, piece: str):
    """Refused without asking the tokenizer, whose time for it nobody knows."""
    text = piece * (HUGE // len(piece.encode()))
    for wishes, path, name in ((user(text), CHAT, "messages"), ({"prompt": text}, LEGACY, "prompt")):
        before = time.monotonic()
        refused(here, wishes, name, "context_length_exceeded", path)
        assert time.monotonic() - before < 1
    assert asked(here, user(piece * 8)).status == 200


# ---- fields


def test_b49_an_unknown_field_is_named(here):
    for name in ("colour", "Temperature", "🙂", "a\r\nX-Evil: 1", ""):
        assert "no field" in refused(here, {name: 1}, name or None, "unknown_parameter")
    refused(here, {"x" * 9999: 1}, "x" * 64, "unknown_parameter")
    message = {"role": "user", "content": "x", "colour": "red"}
    refused(here, {"messages": [message]}, "messages.0.colour", "unknown_parameter")
    refused(here, {"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour", "unknown_parameter")


def test_b49_told_to_ignore_it_names_what_it_ignored(checkpoint_folder):
    """In a header that a client's words cannot end, and that they cannot make endless."""
    with served(checkpoint_folder, ignore_unknown=True) as here:
        for names, told in (
            (["colour"], "colour"), (["a", "b c"], "a,b%20c"), (["é🙂"], "%C3%A9%F0%9F%99%82"),
            (["a\r\nX-Evil: 1"], "a%0D%0AX-Evil%3A%201"), (["x" * 9999], "x" * 64), ([""], ""),
        ):  # fmt: skip
            for stream in (False, True):
                reply = asked(here, dict.fromkeys(names, 1) | {"stream": stream})
                assert (reply.status, reply.headers["x-ignored-params"]) == (200, told)
                assert "x-evil" not in reply.headers
        many = asked(here, {f"field{i}": 1 for i in range(5_000)})
        assert many.status == 200 and len(many.headers["x-ignored-params"]) < 2_000
        assert "x-ignored-params" not in asked(here, {}).headers
        refused(here, {"tools": [1]}, "tools", "unsupported_parameter")
