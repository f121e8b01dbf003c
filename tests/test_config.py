"""One record of choices makes the command line; mistakes are refused in one sentence."""

import os
import threading
from dataclasses import replace

import pytest

from config import Config, PromptConfig, UserError, check_packages
from experiments.mistakes import MistakesConfig
from infer import InferConfig
from lab import console


def test_the_command_line_outranks_the_environment_and_that_outranks_the_default(monkeypatch):
    assert Config.from_cli("doc", []).model is None
    monkeypatch.setenv("LLM_INFER_MODEL", "from-env")
    assert Config.from_cli("doc", []).model == "from-env"
    assert Config.from_cli("doc", ["--model", "given"]).model == "given"


def test_quick_changes_only_what_was_not_given():
    assert (InferConfig.from_cli("doc", ["--quick"]).runs, InferConfig.from_cli("doc", []).runs) == (3, 6)
    assert InferConfig.from_cli("doc", ["--quick", "--runs", "9"]).runs == 9


def test_every_field_is_a_flag_and_the_help_explains_each(capsys):
    with pytest.raises(SystemExit) as left:
        InferConfig.from_cli("The question.", ["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert "The question." in text
    for flag in (
        "--model",
        "--chat",
        "--raw",
        "--runs",
        "--quick",
        "--note",
        "--trace",
        "--attention",
        "LLM_INFER_DTYPE",
    ):
        assert flag in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--runs", "0"], "--runs must be at least 1, and is 0."),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, and is 0."),
        (
            ["--dtype", "int7"],
            "--dtype (or LLM_INFER_DTYPE) must be one of auto, float32, bfloat16, float16, and is 'int7'.",
        ),
        (["--seed", str(2**64)], f"--seed must be at most {2**63 - 1}, and is {2**64}."),
        (["--prompt", "  "], "The prompt is empty: give --prompt TEXT or --prompt-file FILE with at least one word."),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file exclude each other: give one of them."),
    ],
)
def test_values_that_make_no_sense_are_refused_in_one_sentence(argv, says):
    with pytest.raises(UserError) as refused:
        InferConfig.from_cli("doc", argv)
    assert str(refused.value) == says


@pytest.mark.parametrize("argv", [["--run", "3"], ["--runs", "many"], ["--chat", "--raw"], ["--nonsense"]])
def test_unknown_abbreviated_and_contradicting_flags_leave_with_one_line_and_status_2(argv, capsys):
    """--run is no short form of --runs: a typo must not run with a default."""
    with pytest.raises(SystemExit) as left:
        InferConfig.from_cli("doc", argv)
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_positional_choice_is_required(capsys):
    with pytest.raises(SystemExit) as left:
        MistakesConfig.from_cli("doc", [])
    assert left.value.code == 2
    assert "required: mistake" in capsys.readouterr().err


def test_a_prompt_file_that_is_missing_or_no_text_is_one_sentence(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("absent", "binary"):
        with pytest.raises(UserError, match=r"cannot be read|no UTF-8 text"):
            PromptConfig.from_cli("doc", ["--prompt-file", str(tmp_path / name)])


def test_an_empty_prompt_file_is_an_empty_prompt(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="prompt is empty"):
        PromptConfig.from_cli("doc", ["--prompt-file", str(tmp_path / "empty")])


def test_a_prompt_file_may_be_a_pipe_and_is_read_once(tmp_path):
    """It was read at every use, so that a pipe gave its text to the first and an empty prompt to the clock."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("from a pipe",))
    writer.start()
    config = PromptConfig.from_cli("doc", ["--prompt-file", str(pipe)])
    writer.join()
    assert config.prompt == "from a pipe"
    assert replace(config, max_new_tokens=3).prompt == "from a pipe"


def test_a_prompt_of_broken_bytes_is_refused():
    with pytest.raises(UserError, match="no UTF-8 text"):
        PromptConfig.from_cli("doc", ["--prompt", "a\udcff"])


def test_a_python_without_the_packages_is_told_so_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("config.PACKAGES", ("json", "no_such_package"))
    with pytest.raises(SystemExit) as left:
        check_packages()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "lacks no_such_package: type `make run`" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status"), [(UserError("Say this."), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (None, 0)]
)
def test_scripts_leave_with_the_status_that_shells_expect(raised, status, capsys):
    def main() -> int:
        if raised:
            raise raised
        return 0

    with pytest.raises(SystemExit) as left:
        console.run(main)
    assert left.value.code == status
    assert "Traceback" not in capsys.readouterr().err


def test_a_programming_error_is_not_hidden():
    """Only mistakes of the user become sentences: a bug must show where it is."""
    with pytest.raises(ZeroDivisionError):
        console.run(lambda: 1 // 0)
