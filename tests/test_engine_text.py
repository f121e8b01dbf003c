"""Text while it grows: the pieces joined are the whole, and a stop string is cut exactly, wherever tokens end."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text import Text


def decode(ids) -> str:
    """One token per byte, as byte-level tokenizers decode."""
    return bytes(ids).decode(errors="replace")


def grown(data: bytes, stop=()) -> tuple[list[str], Text]:
    text, pieces = Text(decode, stop), []
    for byte in data:
        pieces.append(added(text, byte))
        if text.stopped_by is not None:
            break
    text.end()
    return [*pieces, text.take()], text


def added(text: Text, token: int) -> str:
    text.add(token)
    return text.take()


@given(st.binary(max_size=200))
def test_the_pieces_of_any_bytes_joined_are_their_text(data):
    pieces, text = grown(data)
    assert "".join(pieces) == text.text == data.decode(errors="replace")


@given(st.text(max_size=120))
def test_no_piece_shows_half_a_character(written):
    pieces, _ = grown(written.encode())
    assert "".join(pieces) == written
    assert all(piece in written for piece in pieces)


@given(st.text("abé€🙂", max_size=60), st.lists(st.text("abé€🙂", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_exactly_before_the_first_stop_string(written, stops):
    pieces, text = grown(written.encode(), tuple(stops))
    # The slow, obvious version: after every byte, look for the stop string that begins first.
    for end in range(len(written.encode()) + 1):
        so_far = written.encode()[:end].decode(errors="ignore")
        places = [(so_far.find(stop), stop) for stop in stops if stop in so_far]
        if places:
            assert (text.text, text.stopped_by) == (so_far[: min(places)[0]], min(places)[1])
            break
    else:
        assert (text.text, text.stopped_by) == (written, None)
    assert "".join(pieces) == text.text


def test_what_may_become_a_stop_string_waits_and_is_shown_when_it_did_not():
    text = Text(decode, ("END",))
    assert [added(text, byte) for byte in b"aENbEN"] == ["a", "", "", "ENb", "", ""]
    text.end()
    assert text.take() == "EN"


def test_a_long_answer_is_not_decoded_anew_for_each_token():
    lengths = []

    def watched(ids) -> str:
        lengths.append(len(ids))
        return decode(ids)

    text = Text(watched)
    for _ in range(1000):
        text.add(97)
    assert max(lengths) <= 16
    assert text.text == "a" * 1000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow  # to unpack the model, where no test before has done it
def test_the_embedded_tokenizer_too(seed):
    from config import UserError
    from tokenizer import load_tokenizer
    from weights.find import find

    try:
        tokenizer = load_tokenizer(find("smollm2").folder)
    except UserError as why:
        pytest.skip(str(why))
    dice = random.Random(seed)
    ids = [dice.randrange(49152) for _ in range(300)] + tokenizer.encode("Grüße, 你好, 🙂 and <|im_end|> more")
    text = Text(tokenizer.decode)
    pieces = [added(text, token) for token in ids]
    text.end()
    assert "".join(pieces) + text.take() == text.text == tokenizer.decode(ids)


# ---- tokenizers with a token for each byte of what they have no token for (Llama 2, Mistral 0.1)


def byte_fallback():
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {letter: 256 + i for i, letter in enumerate("Gre, !")}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


@given(st.text("Gre, !ü你🙂ß", max_size=60))
def test_characters_that_come_byte_by_byte_are_whole(written):
    """Their decoder shows a whole character that stands beside an unfinished one as unfinished too."""
    made = byte_fallback()
    text, pieces = Text(lambda ids: made.decode(list(ids))), []
    for token in made.encode(written).ids:
        pieces.append(added(text, token))
    text.end()
    assert "".join([*pieces, text.take()]) == text.text == written


def test_a_reader_in_another_thread_never_sees_a_stop_string():
    """Between two instructions of the writer, whichever they are."""
    import sys
    import threading

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            text, shown = Text(decode, ("END",)), []
            writer = threading.Thread(target=lambda text=text: [text.add(byte) for byte in b"xxxENDEN"])
            writer.start()
            while writer.is_alive():
                shown.append(text.take())
            text.end()
            assert "".join([*shown, text.take()]) == "xxx"
    finally:
        sys.setswitchinterval(before)


def test_bytes_that_never_become_a_character_do_not_make_it_slow():
    """Each token half a character: shown once it is clear that nothing will come of it, and not decoded again."""
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return bytes(ids).decode("utf-8", "replace")

    text = Text(decode)
    pieces = []
    for _ in range(2000):
        text.add(0xE4)
        pieces.append(text.take())
    text.add(ord("a"))
    text.end()
    pieces.append(text.take())
    assert "".join(pieces) == text.text == bytes([0xE4] * 2000).decode("utf-8", "replace") + "a"
    assert max(decoded) < 100
