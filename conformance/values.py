"""B3 seen from outside: what is asked for, value by value."""

import json
import socket
import time
from typing import Any

from conformance.judge import Verdict, each, otherwise, passed, refused, unsafe, unseen
from conformance.target import ABSENT, CHAT, LEGACY, Target
from conformance.wire import Reply

FINE_S = 15.0  # for what has to be refused or served "in bounded time"
MIB = 1 << 20
USER = {"role": "user", "content": "x"}


def served(reply: Reply) -> Verdict:
    """Is it answered? A refusal in order is safe."""
    return passed() if reply.status == 200 and not reply.broken_inside else refused(reply, 0)


def no_messages(target: Target) -> Verdict:
    return target.refusals([{"messages": messages} for messages in (ABSENT, None, [], "hello", {})])


def no_message(target: Target) -> Verdict:
    wrong = {
        "a role that is none": {"role": "king", "content": "x"}, "no role": {"content": "x"},
        "no content": {"role": "user"}, "content null": {"role": "user", "content": None},
        "content 3": {"role": "user", "content": 3}, "a text for a message": "hello",
    }  # fmt: skip
    return each((what, lambda one=one: refused(target.peek(messages=[USER, one]), 400)) for what, one in wrong.items())


def parts(target: Target) -> Verdict:
    """The image's address is ours: whoever fetches it is seen."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/secret.png"
        picture = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}]
        sound = [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]
        text = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        found = each([
            ("an image", lambda: refused(target.peek(picture), 400)),
            ("sound", lambda: refused(target.peek(sound), 400)),
            ("parts of text", lambda: served(target.chat(text))),
        ])  # fmt: skip
        trap.settimeout(0.2)
        try:
            trap.accept()[0].close()
        except TimeoutError:
            return found
    return unsafe("it fetches an address that a client names")


def other_model(target: Target) -> Verdict:
    return target.refusals([{"model": name} for name in ("gpt-4o", "../../etc", "")], 404)


def temperatures(target: Target) -> Verdict:
    found = target.refusals([{"temperature": value} for value in (-1, 3, "0.5", True)])
    default = served(target.chat(temperature=None))
    return found if default.kind == "pass" else default


def next_to_nothing(target: Target) -> Verdict:
    wish = {"max_tokens": 16}
    likeliest, reply = target.chat(temperature=0, **wish), target.chat(temperature=1e-12, **wish)
    if reply.status != 200:
        return refused(reply, 400)
    return passed() if reply.text == likeliest.text else otherwise("another text than at temperature 0")


def ranges(target: Target) -> Verdict:
    wrong: list[dict[str, Any]] = [{"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"top_k": 1.5}, {"min_p": 2},
             {"frequency_penalty": 10}, {"presence_penalty": -10}]  # fmt: skip
    return target.refusals(wrong)


def lengths(target: Target) -> Verdict:
    wrong: list[dict[str, Any]] = [{"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 10**12}, {"max_tokens": "4"},
             {"max_tokens": 4, "max_completion_tokens": 5}]  # fmt: skip
    return target.refusals(wrong)


def too_long(target: Target) -> Verdict:
    """A tenth more words than the context has tokens."""
    if target.context is None:
        return unseen("its context is not known: /v1/models tells no max_model_len")
    begin = time.monotonic()
    reply = target.chat("word " * int(target.context * 1.1), patience_s=60)
    verdict = refused(reply, 400)
    message = (reply.error or {}).get("message", "")
    if verdict.kind == "pass" and not any(character.isdigit() for character in message):
        return otherwise("400 without the numbers")
    if reply.status == 200:
        return otherwise(
            f"200 after {time.monotonic() - begin:.0f} s: it computes past its context, or cuts in silence"
        )
    return verdict


def mebibytes(target: Target) -> Verdict:
    def ask(piece: str) -> Verdict:
        text = piece * (MIB // len(piece.encode()))
        raw = json.dumps(target.chat_body(text), ensure_ascii=False).encode()
        reply = target.ask(CHAT, raw, patience_s=FINE_S)
        return passed() if reply.status in (200, 400, 413) else refused(reply, 400)

    pieces = (("spaces", " "), ("one letter", "a"), ("joined emoji", "👨\u200d👩\u200d👧"))
    return each((what, lambda piece=piece: ask(piece)) for what, piece in pieces)


def stops(target: Target) -> Verdict:
    return target.refusals([{"stop": one} for one in (list("abcde"), "", "x" * 102_400, 3, [3])])


def cut(target: Target) -> Verdict:
    """At a place of its own text, in one piece and in a stream."""
    wish = {"temperature": 0, "max_tokens": 24}
    text = target.chat("Tell me a story.", **wish).text
    stop = text[13:17]
    if len(text) < 20:
        return unseen("its answers are too short")
    wanted = text[: text.index(stop)]
    whole = target.chat("Tell me a story.", **wish, stop=[stop])
    stream = target.chat("Tell me a story.", **wish, stop=[stop], stream=True)
    for what, reply in (("a whole answer", whole), ("a stream", stream)):
        if reply.status != 200:
            return refused(reply, 400)
        if reply.text.rstrip() != wanted.rstrip():
            return otherwise(f"{what} says {reply.text[-24:]!r} where it should end with {wanted[-12:]!r}")
    return passed()


def too_many(target: Target) -> Verdict:
    many = target.refusals([{"n": 129}, {"n": 0}, {"logprobs": True, "top_logprobs": 10_000}, {"top_logprobs": "x"}])
    legacy = refused(
        target.ask(LEGACY, {"model": target.model, "prompt": "x", "max_tokens": 1, "logprobs": 10_000}), 400
    )
    return many if many.kind != "pass" or legacy.kind == "pass" else legacy


def biases(target: Target) -> Verdict:
    wrong = ({"99999999": 1}, {"x": 1}, {"1": 1000}, {"1": "much"}, {str(i): 1 for i in range(10_000)})
    return target.refusals([{"logit_bias": one} for one in wrong])


def seeds(target: Target) -> Verdict:
    wish = {"temperature": 1.0, "max_tokens": 16}
    first, again, other = (target.chat("Tell me a story.", **wish, seed=seed) for seed in (7, 7, 8))
    if first.status != 200:
        return refused(first, 0)
    if first.text != again.text:
        return otherwise("the same seed gives another text")
    if first.text == other.text:
        return otherwise("the seed changes nothing")
    return target.refusals([{"seed": seed} for seed in (-1, 2**63, "1", 1.5)])


def surrogates(target: Target) -> Verdict:
    def ask(where: str) -> Verdict:
        text = json.dumps(target.chat_body("here", stop=["there"])).replace(where, r"\ud800")
        return refused(target.ask(CHAT, text.encode()), 400)

    return each((what, lambda where=where: ask(where)) for what, where in (("text", "here"), ("stop", "there")))


def characters(target: Target) -> Verdict:
    odd = ("a\x00b", "\x1b[31m\x7f", "שלום \u202eevil\u202c", "a\u200bb\ufeff", "👩\u200d👩\u200d👧🏽", "e\u0301\u0300")

    def ask(text: str) -> Verdict:
        whole, stream = (target.chat(text, temperature=0, max_tokens=12, stream=stream) for stream in (False, True))
        if (verdict := served(whole)).kind != "pass":
            return verdict
        return passed() if whole.text == stream.text else otherwise("a stream says another text")

    return each((ascii(text), lambda text=text: ask(text)) for text in odd)


def typed_tokens(target: Target) -> Verdict:
    """Letters cost a token or more each few; the special token costs one, and ends the user's turn."""
    typed = "<|im_end|>"
    counts = [target.chat(text).usage.get("prompt_tokens") for text in ("x", f"x{typed * 8}")]
    if None in counts:
        return unseen("it tells no usage")
    more = counts[1] - counts[0]
    if more > 16:
        return passed()
    return otherwise(f"{typed} eight times costs {more} tokens: a user can end his own turn and speak as another")


def schemas(target: Target) -> Verdict:
    def ask(schema: Any) -> Verdict:
        wish = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        raw = json.dumps(target.chat_body(response_format=wish)).encode()
        return refused(target.ask(CHAT, raw, patience_s=FINE_S), 400, 413)

    wide = {"type": "object", "properties": {f"field{i}": {"type": "string"} for i in range(20_000)}}
    wrong = (("no type", {"type": "nonsense"}), ("no schema", 3), ("about 1 MiB", wide))
    return each((what, lambda schema=schema: ask(schema)) for what, schema in wrong)


def tools(target: Target) -> Verdict:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    return target.refusals([{"tools": [{"type": "function"}]}, {"tools": [tool], "tool_choice": "maybe"}, {"tools": 3}])


def unknown_field(target: Target) -> Verdict:
    reply = target.chat(colour="red")
    if reply.status == 200:
        named = "colour" in reply.headers.get("x-ignored-params", "")
        return passed("ignored, and named") if named else otherwise("ignored in silence")
    return refused(reply, 400)


def empty_prompt(target: Target) -> Verdict:
    def ask(path: str, body: dict[str, Any]) -> Verdict:
        reply = target.ask(path, body)
        return passed() if reply.status == 200 else refused(reply, 400)

    plain = {"model": target.model, "prompt": "", "max_tokens": 2}
    return each([("a chat", lambda: ask(CHAT, target.chat_body(""))), ("a completion", lambda: ask(LEGACY, plain))])


PROBES = {
    28: no_messages, 29: no_message, 30: parts, 32: other_model, 33: temperatures, 34: next_to_nothing, 35: ranges,
    36: lengths, 39: stops, 40: cut, 41: too_many, 42: biases, 43: seeds, 44: surrogates, 45: characters,
    46: typed_tokens, 47: schemas, 48: tools, 49: unknown_field, 50: empty_prompt, 37: too_long, 38: mebibytes,
}  # fmt: skip
