"""The other side of the comparison: a process that speaks benchmarks/peers/line.py, and one that does not."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks import engine_peers
from benchmarks.engine_peers import Peer, compared
from config import ROOT, PromptConfig, UserError

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from line import serve
def generate(prompts, new):
    print("chatter that is nobody's answer")
    return [[len(prompt)] * new for prompt in prompts]
serve(lambda: ("1.0", generate))
"""
ECHO = [sys.executable, "-c", PROGRAM.format(folder=str(ROOT / "benchmarks" / "peers"))]


@pytest.fixture
def peer():
    made = Peer("echo", ECHO, seconds=60)
    yield made
    made.close()


def state(peer: Peer) -> str:
    return Path(f"/proc/{peer.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_peer_answers_and_rests(peer):
    assert peer.version == "1.0"
    assert peer([[7, 7], [7]], 3) == [[2, 2, 2], [1, 1, 1]]
    if sys.platform == "linux":
        os.waitid(os.P_PID, peer.process.pid, os.WSTOPPED | os.WNOWAIT)
        assert state(peer) == "T"  # stopped: its threads cannot spin beside another's
    assert peer([[1]], 1) == [[1]]


@pytest.mark.parametrize(
    ("program", "says"), [("raise SystemExit(3)", "status 3"), ("import time; time.sleep(60)", "nothing for")]
)
def test_one_that_never_answers_is_a_sentence(program, says):
    with pytest.raises(UserError, match=says):
        Peer("mute", [sys.executable, "-c", program], seconds=0.5 if "sleep" in program else 60)


def test_one_that_dies_in_between_is_a_sentence(peer):
    os.killpg(peer.process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="does not answer"):
        peer([[1]], 1)


def test_what_is_not_installed_is_said_and_fails_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_peers, "PEERS", tmp_path)
    monkeypatch.setattr(engine_peers, "compared", lambda *_: [])
    found = engine_peers.claims(PromptConfig(model="random:distilgpt2", threads=1))
    assert {claim.what for claim in found} == {f"the engine against vLLM, {form}" for form in ("bfloat16", "float32")}
    assert all(claim.word == "left out" and "make peers" in claim.measured for claim in found)


def test_a_format_that_the_processor_lacks_is_left_out(monkeypatch):
    here = [sys.executable]
    monkeypatch.setattr(engine_peers.native, "cpu_flags", lambda: "flags : avx2 fma")
    assert "no bfloat16" in engine_peers.cannot("vLLM, bfloat16", here)
    assert engine_peers.cannot("vLLM, float32", here) is None
    monkeypatch.setattr(engine_peers.native, "cpu_flags", lambda: "flags : avx2 avx512_bf16")
    assert engine_peers.cannot("vLLM, bfloat16", here) is None


def test_equal_texts_are_counted_for_each_and_slower_is_said():
    def sleeper(per_token_s: float, token: int):
        def ask(prompts, new):
            time.sleep(per_token_s * new)
            return [[token] * new for _ in prompts]

        return ask

    found = compared(
        PromptConfig(quick=True), {"this engine": sleeper(0.0002, 1), "other": sleeper(0.004, 2)}, sleeper(0, 1),
        lambda text: list(range(len(text))),
    )  # fmt: skip
    decode = next(claim for claim in found if claim.what == "decode, one request, against other")
    assert decode.holds and "in 32 and 0 of 32" in decode.measured
