"""How native.c keeps weights: the smallest form that holds the very numbers, and not one bit of a logit changes."""

import platform
from ctypes import c_long, c_void_p

import pytest
import torch
from test_transformer import CONFIGS, close, expected, needs_compiler, net_of, tokens

from engine import native
from engine.shape import shape_of
from engine.step import Part, Step
from weights.tensors import from_net

pytestmark = pytest.mark.slow

SET = 32
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 17 / 16, "int4": 10 / 16}


def rounded(weight: torch.Tensor, form: str) -> torch.Tensor:
    """The nearest numbers of a form, as float32: Q8_0 and Q4_1 as llama.cpp defines them."""
    if form in ("float16", "bfloat16"):
        return weight.to(getattr(torch, form)).float()
    if form == "float32":
        return weight
    sets = weight.reshape(-1, SET)
    if form == "int8":
        scale = (sets.abs().amax(1, keepdim=True) / 127).half().float()
        return ((sets / scale).round().clamp(-127, 127) * scale).view_as(weight)
    least, most = (f(1, keepdim=True).half().float() for f in (sets.amin, sets.amax))
    scale = ((most - least) / 15).half().float()
    return (((sets - least) / scale).round().clamp(0, 15) * scale + least).view_as(weight)


def holds(weight: torch.Tensor, form: str) -> bool:
    needs_compiler()
    c, size, number = native.library(), tuple(map(c_long, weight.shape)), native.FORMS.index(form)
    kept = torch.empty(c.kept_bytes(*size, number), dtype=torch.uint8)
    found = [
        c.pack(c_void_p(weight.data_ptr()), *size, number, c_long(exactly), c_void_p(kept.data_ptr()))
        for exactly in (1, 0)
    ]
    assert found[0] == found[1]
    return bool(found[0])


@pytest.mark.parametrize("form", native.FORMS)
@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (17, 96), (40, 160)], ids=str)
def test_a_form_holds_its_own_numbers_and_no_others(form, shape):
    weight = rounded(torch.randn(shape, generator=torch.Generator().manual_seed(1)), form).contiguous()
    assert holds(weight, form)
    if form == "float32":
        return
    place = weight.flatten().abs().argmax()  # the smallest change there is, in the last number that a form would miss
    weight.view(-1)[place] = torch.nextafter(weight.view(-1)[place], torch.tensor(torch.inf))
    assert not holds(weight, form)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_sets_are_whole_or_not_at_all(form):
    assert holds(torch.zeros(3, 64), form)
    assert not holds(torch.zeros(3, 48), form)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_what_is_not_finite_fits_no_scale(form, value):
    weight = torch.zeros(2, 64)
    weight[1, 40] = value
    assert not holds(weight, form)


def network(net, form: str) -> native.NativeTransformer:
    needs_compiler()
    tensors = from_net(net)
    return native.NativeTransformer(shape_of(tensors.config), tensors, form, torch.float32, blocks=12, threads=2)


def with_weights(name: str, change) -> torch.nn.Module:
    net = net_of(CONFIGS[name])
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if parameter.ndim > 1:  # GPT-2's matrices lie the other way round: their sets go down its columns
                turned = name == "gpt2" and "wte" not in key and "wpe" not in key
                matrix = parameter.T.contiguous() if turned else parameter
                kept = change(key, matrix)
                parameter.copy_(kept.T if turned else kept)
    return net


def in_form(form: str):
    """Every matrix rounded to it that can be."""
    return lambda _, matrix: rounded(matrix, form) if matrix.shape[1] % SET == 0 else matrix


@pytest.mark.parametrize("form", native.FORMS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, tied", "llama, biases"])
def test_exact_finds_the_form_and_changes_no_bit(name, form):
    net = with_weights(name, in_form(form))
    exact, plain = network(net, native.EXACT), network(net, "float32")
    assert form in exact.bytes_by_form and set(exact.bytes_by_form) <= {form, "float32"}
    phases, wide = exact.bytes_by_phase(), plain.bytes_by_phase()
    assert phases["q, k, v"] == wide["q, k, v"] * BYTES[form] / 4
    assert sum(exact.bytes_by_form.values()) < exact.weight_bytes  # norms, biases and tables come on top
    prompt = tokens(61)
    for rows in (1, 2, 7, 61):
        step = Step(prompt[:rows], [Part(0, rows, rows, [3, 5, 7, 9])], list(range(rows)))
        assert torch.equal(exact.forward(step), plain.forward(step)), rows


def test_matrices_that_work_together_may_be_kept_differently():
    """The gate in 4 bits, the way up in float32: they are computed side by side."""
    net = with_weights("llama", lambda key, matrix: rounded(matrix, "int4") if "gate" in key else matrix)
    exact, plain = network(net, native.EXACT), network(net, "float32")
    assert set(exact.bytes_by_form) == {"int4", "float32"}
    for rows in (1, 5):
        step = Step(tokens(rows), [Part(0, rows, rows, [0])], [rows - 1])
        assert torch.equal(exact.forward(step), plain.forward(step))


@pytest.mark.parametrize("form", native.FORMS)
def test_a_token_alone_and_in_a_crowd_gets_the_same_bits(form):
    """One row takes another way through the weights than several do: the order of its sums is the same."""
    net = with_weights("llama", in_form(form))
    one = network(net, form if form in ("float32", "float16") else native.EXACT)
    alone = one.forward(Step([5], [Part(0, 1, 1, [0])], [0]))
    for rows in (2, 6, 11):
        crowd = Step([5] * rows, [Part(i, 1, 1, [i]) for i in range(rows)], list(range(rows)))
        assert torch.equal(one.forward(crowd), alone.expand(rows, -1))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are names of x86 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_other_processors(processor, monkeypatch, tmp_path):
    """4, 8 and 16 numbers at a time: each is other code. Where it cannot run here, that it compiles is all we know."""
    needs_compiler()
    monkeypatch.setenv("LLM_INFER_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", [f"-march={processor}" if "march" in flag else flag for flag in native.FLAGS])
    native.library.cache_clear()
    try:
        native.build(native.compiled())
        needs = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}[processor]
        if needs not in native.cpu_flags().split():
            pytest.skip(f"compiled, but there is no {needs} here to run it")
        for form in native.FORMS:
            net = with_weights("llama", in_form(form))
            prompt = tokens(40)
            found = network(net, native.EXACT).forward(Step(prompt, [Part(0, 40, 40, [3, 5, 7])], list(range(40))))
            close(found, expected(net, prompt))
    finally:
        native.library.cache_clear()
