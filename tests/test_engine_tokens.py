"""The engine with real arithmetic: byte for byte the tokens of transformers' generate(), alone and in any mix."""

import random

import pytest
import torch
from conftest import tiny_model
from test_transformer import CONFIGS, net_of, network_of

from config import UserError
from engine.engine import Engine
from engine.kv_blocks import Blocks
from engine.load import load
from engine.request import BadLogits, Sampling
from engine.runner import TorchRunner, TransformersRunner
from engine.scheduler import Scheduler
from engine.settings import EngineConfig
from model import Model, transformers_generate
from weights.place import Place

pytestmark = pytest.mark.slow

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 70)  # around the borders of blocks of 16
NEW = 20


@pytest.fixture(scope="module", params=["gpt2", "llama", "llama 3 positions", "mistral, a window", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest) -> Model:
    cpu = Place(torch.device("cpu"), torch.float32, "test")
    return Model(net_of(CONFIGS[request.param]), cpu, "sdpa", request.param, "test", "0", False, frozenset({96}))


@pytest.fixture(scope="module")
def asked() -> list[list[int]]:
    dice = random.Random(0)
    return [[dice.randrange(96) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def wanted(model, asked) -> list[list[int]]:
    generated = [
        transformers_generate(model, torch.tensor([p]), max_new_tokens=NEW, eos_ids=model.eos_ids) for p in asked
    ]
    return [rows[0].tolist() for rows in generated]


def engine_of(model: Model, body: str, *, blocks: int = 64, reuse: bool = True, **wishes) -> Engine:
    runner = TransformersRunner(model) if body == "transformers" else TorchRunner(network_of(model.net, body, blocks))
    wishes = {"max_running": 8, "max_tokens": 10_000} | wishes
    scheduler = Scheduler(Blocks(blocks, reuse=reuse and body != "transformers"), **wishes)
    return Engine(runner, scheduler, eos_ids=model.eos_ids, context=256, vocabulary=97)


BODIES = ["PyTorch", "native.c", "transformers"]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("chunk", [1, 3, 16, 10_000])
def test_tokens_are_those_of_transformers(model, asked, wanted, body, chunk):
    made = engine_of(model, body, max_tokens=chunk, max_running=min(chunk, 8))
    answers = made.generate(asked, Sampling(max_new_tokens=NEW))
    assert [answer.tokens for answer in answers] == wanted


@pytest.mark.parametrize("body", BODIES)
def test_also_when_memory_is_so_short_that_requests_start_over(model, asked, wanted, body):
    made = engine_of(model, body, blocks=9, max_tokens=24)
    answers = made.generate(asked, Sampling(max_new_tokens=NEW))
    assert [answer.tokens for answer in answers] == wanted
    assert made.scheduler.preemptions > 0


@pytest.mark.parametrize("body", ["PyTorch", "native.c"])
def test_also_with_a_prefix_that_was_computed_before_and_neighbours_that_leave(model, asked, wanted, body):
    made = engine_of(model, body)
    made.submit([*asked[-1], 5], Sampling(max_new_tokens=1)).result()
    leaving = [made.submit(prompt, Sampling(max_new_tokens=NEW)) for prompt in asked[:4]]
    answers = [made.submit(prompt, Sampling(max_new_tokens=NEW)) for prompt in asked]
    for answer in leaving:
        made.step()
        answer.cancel()
    assert [answer.result().tokens for answer in answers] == wanted
    assert answers[-1].request.reused == 64


@pytest.mark.parametrize("body", ["PyTorch", "native.c"])
def test_drawn_tokens_do_not_depend_on_the_neighbours(model, asked, body):
    wishes = [
        Sampling(max_new_tokens=NEW, temperature=0.8, top_p=0.95, seed=i, ignore_eos=True) for i in range(len(asked))
    ]
    together = engine_of(model, body, max_tokens=32).generate(asked, wishes)
    for prompt, wish, answer in zip(asked, wishes, together, strict=True):
        assert engine_of(model, body).submit(prompt, wish).result().tokens == answer.tokens


def test_damaged_weights_are_an_error_and_not_text():
    model = tiny_model("llama")
    with torch.no_grad():
        model.net.lm_head.weight[3] = float("nan")
    with pytest.raises(BadLogits):
        engine_of(model, "PyTorch").submit([1, 2], Sampling()).result()


def test_pytorchs_out_of_memory_is_a_memory_error(monkeypatch):
    made = engine_of(tiny_model("llama"), "PyTorch")
    forward, sizes = made.runner.network.forward, []

    def small_memory(step):
        sizes.append(len(step.parts))
        if len(step.parts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(step)

    monkeypatch.setattr(made.runner.network, "forward", small_memory)
    answers = made.generate([[1], [2], [3]], Sampling(max_new_tokens=1))
    assert [answer.request.error for answer in answers] == [None] * 3
    assert sizes == [3, 1, 2]


# ---- from a name to an engine


def test_a_folder_becomes_an_engine_with_either_arithmetic(checkpoint_folder):
    prompt = [5, 6, 7]
    answers = []
    for wishes in ({}, {"native": "off"}, {"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "float16"}):
        loaded = load(EngineConfig(**{"model": str(checkpoint_folder), "kv_memory": 0.01, "native": "wait"} | wishes))
        answers.append(loaded.engine.submit(prompt, Sampling(max_new_tokens=5)).result().tokens)
        assert loaded.about["kv_blocks"] * 16 * loaded.about["kv_bytes_per_token"] <= 0.01e9
    assert answers[0] == answers[1] == answers[2]


def test_another_architecture_runs_through_transformers_and_says_so(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, max_position_embeddings=64, eos_token_id=96)  # fmt: skip
    net = GPTNeoXForCausalLM(config).eval()
    net.save_pretrained(tmp_path)
    loaded = load(EngineConfig(model=str(tmp_path)))
    assert "transformers, one request at a time" in loaded.about["kernel"]
    answers = loaded.engine.generate([[1, 2, 3], [4, 5]], Sampling(max_new_tokens=6))
    for prompt, answer in zip([[1, 2, 3], [4, 5]], answers, strict=True):
        made = net.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert answer.tokens == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"max_running": 64, "max_tokens": 32}, "max-tokens 32"),
        ({"kv_memory": 1e-9}, "raise --kv-memory"),
        ({"kv_memory": 1e6}, "are free"),
    ],
    ids=str,
)
def test_budgets_that_cannot_work_are_refused(checkpoint_folder, wishes, says):
    with pytest.raises(UserError, match=says):
        load(EngineConfig(model=str(checkpoint_folder), **wishes))


def test_the_embedded_model_answers_as_transformers_does():
    """As it comes: weights in 4 and 8 bits, since this checkpoint's numbers are no finer; arithmetic in float32."""
    from model import load_pair

    try:
        model, tokenizer = load_pair(EngineConfig(model="smollm2", dtype="float32"))
    except UserError as why:
        pytest.skip(str(why))
    texts = ["Explain why batching improves GPU utilization.", "The capital of France is", "Once upon a time"]
    asked = [tokenizer.codec.encode(text) for text in texts]
    answers = load(EngineConfig(model="smollm2", kv_memory=0.2, native="wait")).engine.generate(
        asked, Sampling(max_new_tokens=16)
    )
    for prompt, answer in zip(asked, answers, strict=True):
        rows = transformers_generate(model, torch.tensor([prompt]), max_new_tokens=16, eos_ids=model.eos_ids)
        assert answer.tokens == rows[0].tolist()


# ---- numbers that are none


@pytest.mark.parametrize("body", ["PyTorch", "native.c"])
def test_a_request_whose_numbers_are_nan_spoils_neither_its_neighbour_nor_its_heirs(body):
    """Its blocks go to the next one, and what lies in the rest of a block is multiplied by zero: NaN would stay NaN."""
    model = Model(net_of(CONFIGS["llama"]), Place(torch.device("cpu"), torch.float32, "test"), "sdpa", "llama", "test",
                  "0", False, frozenset())  # fmt: skip
    wish, good = Sampling(max_new_tokens=3), [4, 5, 6]
    expected = transformers_generate(model, torch.tensor([good]), max_new_tokens=3)[0].tolist()
    with torch.no_grad():
        model.net.get_input_embeddings().weight[13] = torch.nan
    made = engine_of(model, body, blocks=4, reuse=False)
    bad, neighbour = made.generate([[13] * 20, good], wish)
    assert isinstance(bad.request.error, BadLogits)
    assert neighbour.tokens == expected
    for _ in range(4):
        assert made.submit(good, wish).result().tokens == expected


def test_too_little_memory_in_transformers_own_forward_fails_one_request_and_changes_nobodys_tokens():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    net, calls = GPTNeoXForCausalLM(config).eval(), []
    model = Model(
        net, Place(torch.device("cpu"), torch.float32, "test"), "sdpa", "neox", "test", "0", False, frozenset()
    )

    def some():
        made = engine_of(model, "transformers")
        return made.generate([[1, 2, 3], [4, 5], [6]], Sampling(max_new_tokens=6))

    wanted, forward = [answer.tokens for answer in some()], net.forward

    def small_memory(*arguments, **more):
        calls.append(1)
        if len(calls) == 8:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*arguments, **more)

    net.forward = small_memory
    first, second, third = some()
    assert isinstance(second.request.error, MemoryError)
    assert [first.tokens, third.tokens] == [wanted[0], wanted[2]]


@pytest.mark.parametrize("native", ["off", "wait"])
def test_tensors_that_disagree_with_the_config_are_a_sentence(checkpoint_folder, tmp_path, native):
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 5000}))
    with pytest.raises(UserError, match=r"by its config\.json"):
        load(EngineConfig(model=str(folder), native=native, kv_memory=0.01))


def test_the_card_says_how_keys_and_values_are_really_kept(checkpoint_folder):
    """PyTorch's float16 products on a CPU take float32 in between: the budget is counted in that."""
    for native, kept in (("wait", "float16"), ("off", "float32")):
        about = load(EngineConfig(model=str(checkpoint_folder), dtype="float16", native=native, kv_memory=0.01)).about
        assert about["cache"] == kept
        assert about["kv_blocks"] * 16 * about["kv_bytes_per_token"] <= 0.01e9
