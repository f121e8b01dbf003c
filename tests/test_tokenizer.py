"""Text to ids and back, padding, chat templates, and text that arrives piece by piece."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import UserError
from tokenizer import BytesCodec, Tokenizer, left_pad, load_tokenizer

BYTES = Tokenizer(BytesCodec(), pad_id=0, name="bytes")


def test_padding_stands_on_the_left_and_the_mask_marks_the_rest():
    assert left_pad([[5], [6, 7, 8]], pad_id=0) == ([[0, 0, 5], [6, 7, 8]], [[0, 0, 1], [1, 1, 1]])


@given(st.lists(st.lists(st.integers(1, 9), min_size=1), min_size=1))
def test_a_padded_row_unmasked_is_the_row(rows):
    ids, mask = left_pad(rows, pad_id=0)
    assert len({len(row) for row in ids}) == 1
    assert [[i for i, m in zip(a, b, strict=True) if m] for a, b in zip(ids, mask, strict=True)] == rows


@given(st.text())
def test_pieces_joined_are_the_text_and_no_piece_ends_inside_a_character(text):
    """A character of several bytes spans tokens; decoded one by one they would print as question marks."""
    ids = BYTES.encode(text)
    pieces = BYTES.pieces(ids)
    assert "".join(pieces) == BYTES.decode(ids) == text
    assert len(pieces) == len(ids)


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    assert BYTES.pieces([0xE4, 0xBD]) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_checkpoints_tokenizer_is_loaded_with_a_pad_token_and_its_chat_template(checkpoint_folder):
    tokenizer = load_tokenizer(checkpoint_folder)
    assert tokenizer.pad_id == 256  # it has none of its own: its end token stands in
    assert tokenizer.template == "chat"
    assert tokenizer.decode(tokenizer.encode("hi")) == "[user] hi[assistant] "
    raw = load_tokenizer(checkpoint_folder, template="raw")
    assert raw.decode(raw.encode("héllo  wörld .")) == "héllo  wörld ."


def test_a_template_that_is_asked_for_and_missing_is_refused():
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(None, template="chat")


def test_a_borrowed_tokenizer_too_large_for_the_vocabulary_gives_way_to_bytes(checkpoint_folder):
    assert load_tokenizer(checkpoint_folder, vocabulary=300).name != "bytes"
    assert load_tokenizer(checkpoint_folder, vocabulary=256).name == "bytes"
    assert load_tokenizer(None, vocabulary=256).name == "bytes"


def test_a_folder_without_a_tokenizer_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no usable tokenizer") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)
