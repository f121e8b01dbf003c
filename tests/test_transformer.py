"""The compact transformer and its twin in C: every architecture's logits against transformers', whatever the layout."""

import time

import pytest
import torch
import transformers

from engine import native
from engine.linear import Linear, PackedFloat16, fastest
from engine.shape import Unsupported, rope_angles, shape_of
from engine.step import Part, Step
from engine.transformer import Transformer
from weights.tensors import from_net, from_safetensors

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 96,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=97, n_positions=256, n_embd=64, n_layer=3, n_head=4, eos_token_id=96),
    "llama": transformers.LlamaConfig(**SMALL),
    "llama, tied": transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama 3 positions": transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama, one KV head": transformers.LlamaConfig(**SMALL | {"num_key_value_heads": 1}),
    "llama, biases": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral, a window": transformers.MistralConfig(**SMALL, sliding_window=20, head_dim=32),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=32),
}
PLACES = {50: [3, 5, 7, 9], 7: [1]}  # scattered blocks, out of order where it matters: 3, 5, 7, 9 and 1


def net_of(config):
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in net.parameters():  # fresh weights hardly depend on their input; biases are zero
            parameter.mul_(8) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.fixture(scope="module", params=CONFIGS)
def net(request: pytest.FixtureRequest):
    return net_of(CONFIGS[request.param])


@pytest.fixture(scope="module", params=["PyTorch", "native.c"])
def network(request: pytest.FixtureRequest, net):
    return network_of(net, request.param)


def network_of(net, body: str, blocks: int = 12):
    tensors = from_net(net)
    shape = shape_of(tensors.config)
    cpu = torch.device("cpu")
    if body == "native.c":
        needs_compiler()
        return native.NativeTransformer(shape, tensors, "float32", torch.float32, blocks=blocks, threads=2)
    make = lambda weight, bias: Linear(weight, bias, torch.float32)  # noqa: E731
    return Transformer(shape, tensors, make, device=cpu, dtype=torch.float32, blocks=blocks, size=16)


def needs_compiler() -> None:
    try:
        native.library()
    except native.NotAvailable as why:
        pytest.skip(str(why))


def expected(net, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return net(torch.tensor([tokens])).logits[0]


def tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


def test_two_prompts_side_by_side_and_a_token_after_each(net, network):
    long, short = tokens(50), tokens(7, 2)
    step = Step(long + short, [Part(0, 50, 50, PLACES[50]), Part(50, 7, 7, PLACES[7])], [49, 56])
    close(network.forward(step), torch.stack([expected(net, long)[-1], expected(net, short)[-1]]))
    step = Step([4, 5], [Part(0, 1, 51, PLACES[50]), Part(1, 1, 8, PLACES[7])], [0, 1])
    close(network.forward(step), torch.stack([expected(net, [*long, 4])[-1], expected(net, [*short, 5])[-1]]))


@pytest.mark.parametrize("pieces", [(1, 49), (16, 16, 18), (15, 1, 17, 17), (33, 17)], ids=str)
def test_a_prompt_in_pieces_beside_somebody_who_decodes(net, network, pieces):
    long, short = tokens(50), tokens(20, 3)
    network.forward(Step(short[:10], [Part(0, 10, 10, [2, 4])], []))
    done = 0
    for i, count in enumerate(pieces):
        one = short[10 + i]
        parts = [Part(0, 1, 11 + i, [2, 4]), Part(1, count, done + count, PLACES[50])]
        logits = network.forward(Step([one, *long[done : done + count]], parts, [0, count]))
        done += count
        close(logits, torch.stack([expected(net, short[: 11 + i])[-1], expected(net, long[:done])[-1]]))


def test_logits_of_every_row_when_every_row_is_wanted(net, network):
    prompt = tokens(37, 4)
    close(network.forward(Step(prompt, [Part(0, 37, 37, [0, 8, 6])], list(range(37)))), expected(net, prompt))


def test_a_step_that_wants_no_logits_gives_none(network):
    assert network.forward(Step(tokens(5), [Part(0, 5, 5, [0])], [])).shape == (0, 97)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 11, 12, 13, 59, 60, 61, 121])
def test_the_number_of_rows_changes_no_logit(rows):
    """native.c computes rows in tiles of up to six: each size of a tile is other code."""
    net = net_of(CONFIGS["qwen3"])
    prompt = tokens(rows, 5)
    logits = network_of(net, "native.c").forward(Step(prompt, [Part(0, rows, rows, list(range(8)))], list(range(rows))))
    close(logits, expected(net, prompt))


def test_native_logits_do_not_depend_on_the_neighbours():
    """Not one bit: each output is one sum in one order, whoever shares the tile."""
    net = net_of(CONFIGS["llama"])
    network = network_of(net, "native.c")
    alone = network.forward(Step(tokens(9), [Part(0, 9, 9, [0])], [8]))
    crowd = [Part(9 * i, 9, 9, [i]) for i in range(7)]
    together = network.forward(Step([t for i in range(7) for t in tokens(9, 10 + i)][:54] + tokens(9), crowd, [62]))
    assert torch.equal(alone, together)


@pytest.mark.parametrize("form", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_short_formats_stay_within_their_rounding(name, form):
    net = net_of(CONFIGS[name])
    tensors, prompt = from_net(net), tokens(50)
    shape, cpu = shape_of(tensors.config), torch.device("cpu")
    kernel, make = fastest(form, cpu, torch.randn(80, 64))
    dtype = torch.float32 if form == "float16" else torch.bfloat16
    networks = [Transformer(shape, tensors, make, device=cpu, dtype=dtype, blocks=4, size=16)]
    if form == "float16":
        needs_compiler()
        networks.append(native.NativeTransformer(shape, tensors, form, torch.float16, blocks=4, threads=2))
    wanted = expected(net, prompt)[-1:]
    for network in networks:
        found = network.forward(Step(prompt, [Part(0, 50, 50, [0, 1, 2, 3])], [49]))
        error = float((found - wanted).abs().max() / wanted.abs().max())
        assert error < {"float16": 0.01, "bfloat16": 0.08}[form], (kernel, error)


def test_packed_float16_rounds_weights_only():
    weight, x = torch.randn(33, 20), 1000 + torch.randn(3, 20)
    found = PackedFloat16(weight, torch.ones(33))(x)
    torch.testing.assert_close(found, x @ weight.half().float().T + 1, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rms_norm_eps": None},
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(change):
    config = {**CONFIGS["llama"].to_dict(), **change}
    if config["rms_norm_eps"] is None:
        del config["rms_norm_eps"]
    with pytest.raises(Unsupported):
        shape_of(config)


@pytest.mark.parametrize("name", ["llama", "llama 3 positions", "qwen3"])
def test_angles_are_those_of_transformers_to_the_last_bit_but_one(name):
    """At position 30,000 a difference in the last bits of an angle is one of 30,000 times that."""
    config = CONFIGS[name]
    net = net_of(config)
    theirs = net.model.rotary_emb.inv_freq
    torch.testing.assert_close(torch.tensor(shape_of(config.to_dict()).rope), theirs, rtol=1.3e-7, atol=0)
    assert theirs.dtype == torch.float32


def test_rope_scaled_linearly_turns_slower():
    plain, scaled = (rope_angles({"rope_theta": 1e4, **more}, 8) for more in ({}, {"type": "linear", "factor": 4.0}))
    assert scaled == tuple(angle / 4 for angle in plain)  # a power of two: exactly


def test_a_folder_gives_the_same_logits_as_the_network_in_memory(checkpoint_folder):
    net = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_folder)
    prompt, tensors, cpu = tokens(20), from_safetensors(checkpoint_folder), torch.device("cpu")
    make = lambda weight, bias: Linear(weight, bias, torch.float32)  # noqa: E731
    network = Transformer(shape_of(tensors.config), tensors, make, device=cpu, dtype=torch.float32, blocks=2, size=16)
    close(network.forward(Step(prompt, [Part(0, 20, 20, [0, 1])], [19])), expected(net, prompt)[-1:])


def test_nobody_waits_for_the_compiler(monkeypatch, tmp_path):
    """The first start compiles beside its work, in a process of its own; the next one finds the library."""
    needs_compiler()
    monkeypatch.setenv("LLM_INFER_CACHE", str(tmp_path))
    assert "being compiled" in native.compile_beside()
    assert not native.compiled().exists()
    deadline = time.monotonic() + 200
    while not native.compiled().exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert native.compile_beside() is None


def test_a_compiler_that_failed_is_not_promised_again(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_INFER_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(native.NotAvailable):
        native.build(native.compiled())
    assert "false failed" in native.compile_beside()


def test_a_compiler_that_fails_and_one_that_is_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(native.NotAvailable, match="false failed"):
        native.build(tmp_path / "x.so")
    monkeypatch.setattr(native.shutil, "which", lambda _: None)
    with pytest.raises(native.NotAvailable, match="no C compiler"):
        native.compiled()
