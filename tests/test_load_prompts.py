"""Request bodies: exact lengths, nothing that a prefix cache could have seen, and exactly the reuse that was asked."""

from itertools import islice
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from config import UserError
from load.prompts import Prompts, from_file
from load.texts import TOKENS_PER_WORD, words
from weights.find import find


def sentencepiece(folder):
    """Words of single letters, ▁ for a space, and a beginning that is added to every text, as Llama 2 has it."""
    names = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz0123456789.", "▁a"]
    core = tokenizers.Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=[pytest.param("embedded", marks=pytest.mark.slow), "bytes", "sentencepiece"])
def folder(request, checkpoint_folder, tmp_path_factory):
    if request.param == "bytes":
        return checkpoint_folder
    if request.param == "sentencepiece":
        return sentencepiece(tmp_path_factory.mktemp("pieces"))
    return embedded()


def embedded():
    try:
        return find("smollm2").folder
    except UserError:
        pytest.skip("the embedded model is not installed")


def lengths(folder, special: bool):
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: core.encode(text, add_special_tokens=special).ids


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 7, 16, 33, 128, 513])
def test_a_prompt_has_exactly_the_tokens_asked(folder, tokens: int):
    prompts = Prompts("completions", "m", 0, folder)
    ids = lengths(folder, special=True)
    for body in prompts.of(SimpleNamespace(prompt_tokens=tokens, new_tokens=4), 10):
        assert len(ids(body["prompt"])) == tokens
    assert prompts.exact


def test_in_a_chat_the_text_has_them_and_no_special_token_is_counted(folder):
    body = Prompts("chat", "m", 0, folder).body(40, 4)
    assert [one["role"] for one in body["messages"]] == ["user"]
    assert len(lengths(folder, special=False)(body["messages"][0]["content"])) == 40


def test_token_ids_are_of_plain_text_and_as_many_as_asked(folder):
    prompts = Prompts("completions", "m", 0, folder, ids=True)
    first, second = (prompts.body(50, 4)["prompt"] for _ in range(2))
    assert len(first) == len(second) == 50 and first[:8] != second[:8]
    special = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_added_tokens_decoder()
    assert all(type(one) is int and one not in special for one in first + second)


def test_a_tokenizer_that_adds_a_beginning_cannot_have_a_prompt_of_one_token(tmp_path):
    with pytest.raises(UserError, match="adds 1 to every text"):
        Prompts("completions", "m", 0, sentencepiece(tmp_path)).body(1, 4)


@pytest.mark.slow  # to unpack the model, where no test before has done it
def test_without_a_tokenizer_lengths_are_about_right_and_do_not_call_themselves_exact():
    prompts = Prompts("completions", "m", 0)
    assert not prompts.exact
    core = tokenizers.Tokenizer.from_file(str(embedded() / "tokenizer.json"))
    for tokens in (32, 256):
        found = [len(core.encode(prompts.body(tokens, 4)["prompt"]).ids) for _ in range(20)]
        assert sum(found) / 20 == pytest.approx(tokens, rel=0.15)


@pytest.mark.slow  # the same
def test_the_tokens_of_a_word_are_those_of_the_embedded_model():
    text = " ".join(islice(words("0"), 2000))
    core = tokenizers.Tokenizer.from_file(str(embedded() / "tokenizer.json"))
    assert len(core.encode(text).ids) / 2000 == pytest.approx(TOKENS_PER_WORD, rel=0.1)


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_a_new_run_asks_other_prompts_and_has_the_same_hash(folder, kind: str):
    """So no prefix cache of the last run helps the next, and the records can still be compared."""
    one, other = Prompts(kind, "m", 0, folder), Prompts(kind, "m", 0, folder)
    assert one.hash == other.hash and len(one.hash) == 12 and set(one.hash) <= set("0123456789abcdef")
    assert one.body(64, 4) != other.body(64, 4)


def test_what_changes_the_prompts_changes_the_hash(tmp_path):
    file = tmp_path / "prompts"
    file.write_text("Hello.\n")
    made = [Prompts("completions", "m", 0), Prompts("completions", "m", 1), Prompts("chat", "m", 0),
            Prompts("completions", "m", 0, sentencepiece(tmp_path)), Prompts("completions", "m", 0, eos=True),
            Prompts("completions", "m", 0, tmp_path, ids=True), Prompts("completions", "m", 0, file=file)]  # fmt: skip
    assert len({one.hash for one in made}) == len(made)
    before = made[0].hash
    made[0].body(9, 9)
    assert made[0].hash == before == Prompts("completions", "other name", 0, nonce="x").hash


def test_requests_of_one_run_begin_differently_and_a_given_nonce_repeats_them():
    prompts = Prompts("completions", "m", 0, nonce="again")
    asked = [prompts.body(64, 4)["prompt"] for _ in range(200)]
    assert len({one[:8] for one in asked}) == 200
    again = Prompts("completions", "m", 0, nonce="again")
    assert [again.body(64, 4)["prompt"] for _ in range(200)] == asked
    assert Prompts("completions", "m", 0, nonce="").body(64, 4) == Prompts("completions", "m", 0, nonce="").body(64, 4)


def test_a_body_asks_for_a_stream_with_usage_and_an_answer_of_fixed_length():
    body = Prompts("chat", "m", 0).body(8, 16)
    assert {key: value for key, value in body.items() if key != "messages"} == {
        "model": "m", "max_tokens": 16, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }  # fmt: skip
    plain = Prompts("completions", "m", 0, eos=True, stream=False).body(8, 16)
    assert set(plain) == {"model", "prompt", "max_tokens", "temperature", "stream"} and plain["stream"] is False


# ---- reuse


@pytest.mark.parametrize("ids", [False, True])
def test_a_shared_prefix_is_the_same_ids_in_all_and_the_rest_is_not(folder, ids: bool):
    shared = Prompts("completions", "m", 0, folder, ids=ids).shared_prefix(80, 0.75)
    encode = (lambda prompt: prompt) if ids else lengths(folder, special=True)
    asked = [encode(shared.body(4)["prompt"]) for _ in range(10)]
    assert {len(one) for one in asked} == {80} and shared.prefix_tokens == 60
    assert len({tuple(one[:60]) for one in asked}) == 1
    assert len({tuple(one[60:70]) for one in asked}) == 10


def test_another_run_shares_no_prefix_with_this_one():
    first, second = (Prompts("chat", "m", 0).shared_prefix(80, 0.5) for _ in range(2))
    assert first.prefix[:8] != second.prefix[:8]
    assert first.body(4)["messages"][0]["content"].startswith(first.prefix + " ")


@pytest.mark.parametrize(("tokens", "share"), [(80, 0.0), (80, 1.0), (80, -1.0), (80, float("nan")), (2, 0.1)])
def test_what_is_no_share_is_refused(tokens: int, share: float):
    with pytest.raises(UserError, match=r"shared part|no prefix"):
        Prompts("chat", "m", 0).shared_prefix(tokens, share)


def test_a_conversation_sends_the_answers_back():
    one, other = Prompts("chat", "m", 0).conversations(2, turns=3, prompt_tokens=20, new_tokens=4)
    first = one.opening()
    second = one.reply("Because.")
    third = one.reply("Indeed.")
    assert [(m["role"], m["content"]) for m in third["messages"][1::2]] == [
        ("assistant", "Because."), ("assistant", "Indeed."),
    ]  # fmt: skip
    assert first["messages"] == second["messages"][:1] and second["messages"] == third["messages"][:3]
    assert one.reply("Bye.") is None
    assert other.opening()["messages"] != first["messages"]


def test_a_conversation_of_completions_is_one_growing_text():
    talk = Prompts("completions", "m", 0).conversations(1, 2, 20, 4)[0]
    first = talk.opening()["prompt"]
    assert talk.reply("Because.")["prompt"].startswith(f"{first}\nBecause.\n")
    with pytest.raises(ValueError, match="has begun"):
        talk.opening()


# ---- files


def test_prompts_of_a_file_are_asked_in_turn_each_with_a_mark_of_its_own(tmp_path):
    file = tmp_path / "prompts"
    file.write_text("First.\n\nSecond.\n")
    prompts = Prompts("completions", "m", 0, file=file)
    asked = [prompts.body(None, 4)["prompt"] for _ in range(3)]
    assert [one[8:] for one in asked] == [" First.", " Second.", " First."] and len({one[:8] for one in asked}) == 3
    assert not prompts.exact


def test_json_lines_hold_a_prompt_or_messages_whose_first_gets_the_mark(tmp_path):
    file = tmp_path / "prompts"
    file.write_text('{"prompt": "Hi"}\n{"messages": [{"role": "system", "content": "Be."}, '
                    '{"role": "user", "content": "Hi"}]}\n')  # fmt: skip
    prompts = Prompts("chat", "m", 0, file=file)
    first, second = (prompts.body(None, 4)["messages"] for _ in range(2))
    assert [(one["role"], one["content"][8:]) for one in first] == [("user", " Hi")]
    assert [one["role"] for one in second] == ["system", "user"]
    assert second[0]["content"].endswith(" Be.") and second[1]["content"] == "Hi"


@pytest.mark.parametrize(("text", "said"), [
    ("", "holds no prompts"),
    ("\n \n", "holds no prompts"),
    ('{"prompt": "a"}\nb', "line 2 is no JSON"),
    ('{"prompt": ""}', "line 1: prompt must be a text"),
    ('{"prompt": 3}', "line 1: prompt must be a text"),
    ('{"text": "a"}', "line 1 must have either prompt or messages"),
    ('{"prompt": "a", "messages": []}', "line 1 must have either"),
    ('{"messages": []}', "line 1: messages must be a list"),
    ('{"messages": [{"role": "user"}]}', "line 1: messages must be a list"),
])  # fmt: skip
def test_a_mistake_in_a_file_of_prompts_is_told_in_one_sentence(tmp_path, text: str, said: str):
    file = tmp_path / "prompts"
    file.write_text(text)
    with pytest.raises(UserError, match=said) as found:
        from_file(file, "chat")
    assert str(file) in str(found.value) and str(found.value).endswith(".")


def test_other_mistakes_are_told_too(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "talk").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    for said, make in {
        "only chat takes": lambda: from_file(tmp_path / "talk", "completions"),
        "cannot be read": lambda: Prompts("chat", "m", 0, tmp_path / "absent"),
        "is no tokenizer": lambda: Prompts("chat", "m", 0, tmp_path),
        "not for 'talk'": lambda: Prompts("talk", "m", 0),
        "need the model's tokenizer": lambda: Prompts("completions", "m", 0, ids=True),
        "at least 1 token": lambda: Prompts("chat", "m", 0).body(None, 4),
        "at least one turn": lambda: Prompts("chat", "m", 0).conversations(1, 0, 4, 4),
        "leave one of the two out": lambda: Prompts("chat", "m", 0, file=tmp_path / "talk").shared_prefix(9, 0.5),
        "made of synthetic text": lambda: Prompts("chat", "m", 0, file=tmp_path / "talk").conversations(1, 2, 4, 4),
    }.items():
        with pytest.raises(UserError, match=said):
            make()
