"""Fixtures that many tests share. Nothing needs a network; models are tiny and random, their arithmetic is real."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# How long an example takes is the machine's business.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Converted models and ceilings go to a folder of this test run, and no test asks a model hub by accident."""
    os.environ["LLM_INFER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def browser():
    """Of a module, not of the session: while it is open, no other test of this thread can have an event loop."""
    from browser import ARGUMENTS, CHROMIUM

    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome is installed here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture
def stand():
    """stand(answer) is a stand-in for a server; all of them end with the test."""
    from stand_kit import Stand

    made = []

    def make(*arguments) -> Stand:
        made.append(Stand(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def tiny_config(family: str, **sizes: int):
    from transformers import GPT2Config, LlamaConfig

    if family == "gpt2":
        small = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
        return GPT2Config(vocab_size=97, bos_token_id=0, eos_token_id=96, **small | sizes)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    return LlamaConfig(vocab_size=97, bos_token_id=0, eos_token_id=96, **small | sizes)


def tiny_model(family: str, **sizes: int):
    """A Model with two random layers and a context of 256 tokens. GPT-2: tied head, learned positions; Llama: GQA."""
    import torch
    from transformers import AutoModelForCausalLM

    from model import Model, Place

    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(tiny_config(family, **sizes)).eval()
    # Fresh GPT-2 weights answer the same token for ever. Larger ones make every step depend on its context.
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim >= 2:
                p.mul_(30)
    place = Place(torch.device("cpu"), torch.float32, "test")
    return Model(net, place, "sdpa", f"tiny {family}", "test", "0" * 12, False, frozenset({96}))


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def any_model(request: pytest.FixtureRequest):
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint on disk: tiny Llama weights, and a tokenizer of one token per byte with a chat template."""
    from weights import tiny

    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")
