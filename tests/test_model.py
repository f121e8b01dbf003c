"""The decode loop against transformers, padding against no padding, formulas against sums done by hand."""

import pytest
import torch
from conftest import tiny_model

from config import Config, UserError
from metrics import Stats
from model import (
    check_fits,
    decode_step,
    generate,
    generate_batch,
    ids_tensor,
    kv_cache_bytes,
    kv_cache_layers,
    load_model,
    prefill,
    resolve,
    transformers_generate,
)
from tokenizer import left_pad

pytestmark = pytest.mark.slow

LENGTHS = [1, 2, 15, 16, 17, 100]


def prompt_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 96, (1, length), generator=torch.Generator().manual_seed(seed + length))


def reference(model, ids, new_tokens, mask=None, eos=()):
    return transformers_generate(model, ids, mask, max_new_tokens=new_tokens, eos_ids=frozenset(eos)).tolist()


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_equal_those_of_generate(any_model, length):
    ids = prompt_of(length)
    assert generate(any_model, ids, max_new_tokens=40) == reference(any_model, ids, 40)


def test_the_tiny_models_do_not_answer_with_one_token_for_ever(any_model):
    """Else the test above could not fail: fresh random weights often repeat themselves at once."""
    assert all(len(set(generate(any_model, prompt_of(n), max_new_tokens=40)[0])) >= 8 for n in LENGTHS)


def test_a_batch_of_unequal_lengths_gives_each_row_the_tokens_it_gets_alone(any_model):
    rows = [prompt_of(n)[0].tolist() for n in LENGTHS]
    ids, mask = map(ids_tensor, left_pad(rows, pad_id=0))
    together = generate(any_model, ids, mask, max_new_tokens=20)
    alone = [generate(any_model, ids_tensor([row]), max_new_tokens=20)[0] for row in rows]
    assert together == alone == reference(any_model, ids, 20, mask)


@pytest.mark.parametrize("pads", [1, 7, 50])
def test_padding_on_the_left_leaves_the_logits_as_they_were(any_model, pads):
    """Without position ids that skip the padding, a padded row's logits drift: shown by the second comparison."""
    row = prompt_of(12)
    ids = torch.cat([torch.zeros(1, pads, dtype=torch.long), row], dim=1)
    mask = torch.cat([torch.zeros(1, pads, dtype=torch.long), torch.ones_like(row)], dim=1)
    with torch.inference_mode():
        plain = any_model.net(input_ids=row).logits[:, -1]
        padded = any_model.net(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
        ).logits[:, -1]
        unmasked = any_model.net(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-4)
    assert (unmasked - plain).abs().max() > 1e-2
    token, _ = prefill(any_model, ids, mask)
    assert token.item() == plain.argmax().item()


def test_a_row_ends_at_its_end_token_and_leaves_the_batch(any_model):
    rows = [prompt_of(n, seed=3)[0].tolist() for n in (3, 9, 14)]
    ids, mask = map(ids_tensor, left_pad(rows, pad_id=0))
    free = generate(any_model, ids, mask, max_new_tokens=24)
    end = free[0][5]  # a token that row 0 gives early serves as the end token
    stats: Stats = {}
    ours = generate(any_model, ids, mask, max_new_tokens=24, eos_ids=frozenset({end}), stats=stats)
    assert ours == [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in ours}) > 1 and len(stats["drop_rows"]) >= 1
    theirs = reference(any_model, ids, 24, mask, eos=[end])  # goes on with every row, and fills the ended ones with 0
    longest = max(map(len, ours))
    assert [row + [0] * (longest - len(row)) for row in ours] == theirs


def test_every_row_has_its_own_limit_and_the_steps_after_it_compute_nothing_for_it(any_model, monkeypatch):
    rows = [prompt_of(n)[0].tolist() for n in (4, 9, 6)]
    ids, mask = map(ids_tensor, left_pad(rows, pad_id=0))
    widths = []

    def counted(model, token, cache, mask=None):
        widths.append(len(token))
        return decode_step(model, token, cache, mask)

    monkeypatch.setattr("model.decode_step", counted)
    limits = [3, 7, 1]
    ours = generate(any_model, ids, mask, max_new_tokens=limits)
    assert ours == [reference(any_model, ids_tensor([r]), n)[0] for r, n in zip(rows, limits, strict=True)]
    assert widths == [2, 2, 1, 1, 1, 1]


def test_a_prompt_beyond_the_context_is_refused_and_its_neighbours_are_answered(any_model):
    prompts = [prompt_of(n)[0].tolist() for n in (5, 253, 11)]
    first, refused, last = generate_batch(any_model, prompts, max_new_tokens=4)
    assert isinstance(refused, UserError) and "The prompt has 253 tokens" in str(refused)
    assert [first, last] == [reference(any_model, ids_tensor([prompts[i]]), 4)[0] for i in (0, 2)]
    (alone,) = generate_batch(any_model, [prompts[1]], max_new_tokens=4)
    assert str(alone) == str(refused)


def test_rows_of_equal_length_need_no_mask(any_model, monkeypatch):
    masks = []
    monkeypatch.setattr("model.prefill", lambda model, ids, mask=None: masks.append(mask) or prefill(model, ids, mask))
    generate_batch(any_model, [[1, 2, 3], [4, 5, 6]], max_new_tokens=2)
    generate_batch(any_model, [[1, 2, 3], [4, 5]], max_new_tokens=2)
    assert masks[0] is None and masks[1].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_generate_times_one_prefill_and_every_further_token(any_model):
    stats: Stats = {}
    new = generate(any_model, prompt_of(5), max_new_tokens=7, stats=stats)
    assert len(new[0]) == 7
    assert (len(stats["prefill"]), len(stats["decode"])) == (1, 6)


def test_one_new_token_needs_no_decode_step(any_model):
    stats: Stats = {}
    assert generate(any_model, prompt_of(5), max_new_tokens=1, stats=stats) == [
        [reference(any_model, prompt_of(5), 1)[0][0]]
    ]
    assert "decode" not in stats


def test_the_cache_holds_what_the_formula_says(any_model):
    layers, _, kv_heads, head_dim = any_model.heads
    token, cache = prefill(any_model, prompt_of(10))
    assert kv_cache_bytes(cache) == 10 * any_model.kv_bytes_per_token()
    assert (len(kv_cache_layers(cache)), kv_cache_layers(cache)[0][0].shape) == (layers, (1, kv_heads, 10, head_dim))
    _, cache = decode_step(any_model, token, cache)
    assert kv_cache_bytes(cache) == 11 * any_model.kv_bytes_per_token()


def test_bytes_and_flops_of_a_small_gpt2_equal_the_sum_done_by_hand():
    """Two layers of width 32: qkv 32x96, projection 32x32, MLP 32x128 and 128x32; head and token table are one."""
    model = tiny_model("gpt2")
    matrices = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    biases_and_norms = 2 * (96 + 32 + 128 + 32 + 4 * 32) + 2 * 32
    tables = 97 * 32 + 256 * 32
    assert model.weight_bytes() == 4 * (matrices + biases_and_norms + tables)
    assert model.kv_bytes_per_token() == 2 * 2 * 4 * 8 * 4
    # One token after 10 cached ones: all weights but the position table, one row of it, and ten tokens' keys, values.
    assert model.read_bytes(1, 10) == 4 * (matrices + biases_and_norms + 97 * 32 + 32) + 10 * 512
    # Three tokens into an empty cache: they look at 1 + 2 + 3 tokens; one position's logits.
    assert model.flops(3, 0) == 2 * matrices * 3 + 2 * 97 * 32 + 4 * 2 * 4 * 8 * 6


def test_grouped_queries_shrink_the_cache_and_an_untied_table_is_not_read():
    model = tiny_model("llama")
    assert model.heads == (2, 4, 2, 8)
    assert model.kv_bytes_per_token() == 2 * 2 * 2 * 8 * 4
    table = 97 * 32 * 4
    assert model.read_bytes(1, 0) == model.weight_bytes() - table + 32 * 4


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(any_model):
    check_fits(any_model, 250, 6)
    with pytest.raises(UserError, match=r"The prompt has 250 tokens and 7 new ones are asked for.*context of 256"):
        check_fits(any_model, 250, 7)


def test_auto_means_float32_on_a_cpu_and_gives_its_reason():
    place = resolve(Config(device="cpu"))
    assert (place.device.type, place.dtype_name) == ("cpu", "float32")
    assert place.dtype_reason.startswith("auto: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused_by_name():
    with pytest.raises(UserError, match="--device cuda was asked for and is not available here"):
        resolve(Config(device="cuda"))


def test_a_dtype_that_the_device_cannot_multiply_is_refused(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError('"addmm" not implemented for Half')

    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(UserError, match="--dtype float16 does not work on cpu here"):
        resolve(Config(device="cpu", dtype="float16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_formats_run_too_and_hold_half_the_bytes(dtype):
    model = tiny_model("llama")
    place = resolve(Config(device="cpu", dtype=dtype))
    model.net.to(place.dtype)
    assert sum(p.numel() * 2 for p in model.net.parameters()) == model.weight_bytes()
    assert len(generate(model, prompt_of(9), max_new_tokens=3)[0]) == 3


def test_a_checkpoint_that_asks_for_penalties_is_still_compared_with_plain_greedy(any_model, monkeypatch):
    """generate() heeds repetition_penalty from generation_config even without sampling: the tokens seemed to differ."""
    ids = prompt_of(15)
    plain = reference(any_model, ids, 20)
    monkeypatch.setattr(any_model.net.generation_config, "repetition_penalty", 5.0)
    assert reference(any_model, ids, 20) == plain == generate(any_model, ids, max_new_tokens=20)


def test_a_network_without_attention_has_no_cache_to_look_at(tmp_path):
    from transformers import MambaConfig

    from weights.find import find

    shape = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    shape.save_pretrained(tmp_path)
    config = Config(device="cpu", attention="eager")
    with pytest.raises(UserError, match="no KV cache"):
        load_model(find(f"random:{tmp_path}"), config, resolve(config))
