"""Where a step's time goes: the counts of FLOPs and bytes against the model's own, and the program."""

import json

import pytest
from conftest import tiny_model
from test_transformer import needs_compiler

from config import UserError
from engine.kv_blocks import BLOCK
from engine.shape import shape_of
from experiments import step_anatomy
from experiments.step_anatomy import decode_step, prompt_step, work
from weights.tensors import from_net

pytestmark = pytest.mark.slow

PRODUCTS = ("q, k, v", "out", "up", "down", "head")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flops_are_those_of_the_model_but_for_the_last_layers_unwanted_rows(family):
    model = tiny_model(family)
    shape = shape_of(from_net(model.net).config)
    counted = work(shape, prompt_step(50), dict.fromkeys(PRODUCTS, 0), 4)
    spared = 49 * sum(counted[name][0] / (50 * (shape.layers - 1) + 1) for name in ("out", "up", "down"))
    assert sum(flops for flops, _ in counted.values()) + spared == model.flops(50, 0)


def test_a_decode_step_reads_the_weights_once_and_each_cache():
    model = tiny_model("llama")
    shape = shape_of(from_net(model.net).config)
    one, eight = (work(shape, decode_step(rows, 30), dict.fromkeys(PRODUCTS, 7), 4) for rows in (1, 8))
    for phase in PRODUCTS:
        assert one[phase][1] == eight[phase][1] == 7
    assert eight["attention"][1] == 8 * one["attention"][1] == 8 * 31 * shape.kv_numbers_per_token() * 4
    step = decode_step(3, BLOCK)
    assert len({block for part in step.parts for block in part.blocks}) == 6  # nobody shares


def test_the_program_names_every_phase(tmp_path, capsys):
    needs_compiler()
    file = tmp_path / "run.jsonl"
    arguments = ["--model", "random:distilgpt2", "--rows", "1,3", "--prompts", "20", "--context", "40", "--runs", "3"]
    assert step_anatomy.main([*arguments, "--kv-memory", "0.1", "--json", str(file)]) == 0
    page = capsys.readouterr().out
    for word in ("3 sequences decode at 40 tokens", "A prompt of 20 tokens", "attention", "head", "taken"):
        assert word in page
    record = json.loads(file.read_text())
    for step in record["steps"].values():
        assert all(len(samples) == 3 and min(samples) >= 0 for samples in step["seconds"].values())
        assert sum(map(max, step["seconds"].values())) > 0


@pytest.mark.parametrize(
    ("wishes", "says"),
    [(["--native", "off"], "native off"), (["--context", "5000"], "blocks"), (["--rows", "0"], "at least 1")],
    ids=str,
)
def test_what_cannot_be_taken_apart_is_a_sentence(checkpoint_folder, wishes, says):
    arguments = ["--model", str(checkpoint_folder), "--kv-memory", "0.001", "--json", "-", "--prompts", "16"]
    with pytest.raises(UserError, match=says):
        step_anatomy.main([*arguments, "--context", "20", "--rows", "1", *wishes])
