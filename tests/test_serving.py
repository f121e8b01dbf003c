"""The serving experiments: all ways give the same tokens, and the tables say what the moments support."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from config import UserError
from experiments import continuous_batching, scheduling
from experiments.endpoint import Endpoint
from experiments.ways import Load, OneByOne, OurEngine, StaticBatches, TransformersContinuous
from lab import scheduling_tables, serving_plots, serving_tables
from lab.serving_figures import (
    compared,
    e2e_s,
    itl_s,
    same_answers,
    split_s,
    step_overheads_s,
    tpot_s,
    ttft_s,
    unaccounted_s,
    waste,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(checkpoint_folder):
    from engine.load import load
    from engine.settings import EngineConfig
    from model import load_pair

    config = EngineConfig(model=str(checkpoint_folder), kv_memory=0.01, dtype="float32", native="wait")
    model, tokenizer = load_pair(config, "raw")
    return model, tokenizer, load(config)


@pytest.fixture(scope="module")
def load() -> Load:
    prompts = [[i + 1] * (5 + 7 * i) for i in range(5)]
    return Load(prompts, [4, 9, 2, 6, 3], [0.0, 0.0, 0.0, 0.01, 0.01])


def test_all_ways_give_the_same_tokens_and_every_moment_of_them(parts, load):
    model, tokenizer, loaded = parts
    ways = [
        OneByOne(model),
        StaticBatches(model, tokenizer.pad_id, 2, 5.0),
        TransformersContinuous(model, 64),
        OurEngine(loaded.new_engine, "static", static=2),
        OurEngine(loaded.new_engine),
    ]
    trials = [way.run(load) for way in ways]
    for way, trial in zip(ways, trials, strict=True):
        assert trial["answers"] == trials[0]["answers"], way.name
        assert [len(tokens) for tokens in trial["token_s"]] == load.new_tokens, way.name
        assert all(tokens == sorted(tokens) for tokens in trial["token_s"])
        assert all(latency > 0 for latency in e2e_s(trial))
        assert waste(trial) >= 0, way.name
    assert [waste(trial) for trial in (trials[0], *trials[3:])] == [0, 0, 0]
    assert waste(trials[1]) > 0  # padding
    static, continuous = trials[3:]
    # In batches of two, the third request begins when both before it are done; continuously, before that.
    began = lambda trial, i: trial["timelines"][i]["slices"][0][0]  # noqa: E731
    assert began(static, 2) >= max(static["done_s"][:2]) - 1e-3
    assert began(continuous, 2) < max(continuous["done_s"][:2])


def test_the_parts_of_a_request_add_up_to_what_its_asker_saw(parts, load):
    trial = OurEngine(parts[2].new_engine).run(load)
    for i in range(len(load.prompts)):
        assert abs(unaccounted_s(trial, i)) < 5e-3
        assert all(part > -1e-4 for part in split_s(trial, i).values())
    assert len(step_overheads_s(trial)) == trial["stats"]["steps"]


# ---- figures worked out by hand


def made_trial(way: str, number: int, scale: float, streamed: bool = True) -> dict:
    """Two requests: due at 0 and 1; tokens at 2, 4, 6 and 3, 5 (times scale)."""
    tokens = [[2.0 * scale, 4.0 * scale, 6.0 * scale], [1 + 2.0 * scale, 1 + 4.0 * scale]]
    return {
        "way": way, "round": number, "due_s": [0.0, 1.0], "began_s": [0.5, 1.5], "token_s": tokens,
        "done_s": [t[-1] for t in tokens], "new_tokens": 5, "answers": ["a", "b"], "computed_positions": 20,
        "useful_positions": 15, "streamed": streamed,
        "timelines": [
            {
                "arrived_s": 0.0,
                "slices": [[0.5, 2.0 * scale, 4], [2.0 * scale, 4.0 * scale, 1], [4.0 * scale, 6.0 * scale, 1]],
            },
            {"arrived_s": 1.0, "slices": [[1.5, 1 + 2.0 * scale, 4], [1 + 2.0 * scale, 1 + 4.0 * scale, 1]]},
        ],
        "steps": [[0.0, 0.001, 1.0, 1.002, 5, 2]],
    }  # fmt: skip


def made_record(rounds: int = 6) -> dict:
    trials = [made_trial("slow", n, 2 + 0.01 * n, streamed=False) for n in range(rounds)]
    trials += [made_trial("this engine", n, 1) for n in range(rounds)]
    return {
        "id": "made", "ways": ["slow", "this engine"], "ours": "this engine", "trials": trials,
        "model": {"name": "m", "device": "cpu"},
        "config": {"arrival": "burst", "prompt_tokens": 4, "max_new_tokens": 3},
    }  # fmt: skip


def test_times_by_their_definitions():
    trial = made_trial("x", 0, 1)
    assert (ttft_s(trial), e2e_s(trial)) == ([2.0, 2.0], [6.0, 4.0])
    assert (tpot_s(trial), itl_s(trial)) == ([2.0, 2.0], [2.0, 2.0, 2.0])
    assert tpot_s(trial | {"streamed": False}) == []
    assert waste(trial) == 0.25
    assert split_s(trial, 0) == {"sent late": 0, "queue": 0.5, "prefill": 1.5, "decode": 4.0, "between steps": 0}
    assert step_overheads_s(trial) == pytest.approx([0.003])


def test_the_verdict_pairs_rounds_and_the_sentences_follow_it():
    record = made_record()
    assert compared(record, "this engine", "slow", "time for all").word == "FASTER"
    said = " ".join(serving_tables.sentences(record))
    assert "2.0" in said and "FASTER" in said
    assert "All ways gave the same tokens" in said
    assert "Conservation of time holds" in said
    record["trials"][-1]["answers"] = ["a", "x"]
    assert same_answers(record, record["trials"][-6:]) == 11
    assert "this engine (1 other answers)" in " ".join(serving_tables.sentences(record))
    few = made_record(2)
    assert "no verdict" in serving_tables.sentences(few)[0]


def test_the_tables_name_every_way_and_the_figure_is_drawn(tmp_path):
    record = made_record()
    text = "\n".join(serving_tables.sections(record))
    assert all(word in text for word in ("slow", "this engine", "12 of 12", "between steps", "p95"))
    assert "made-timelines" in serving_plots.draw(record, tmp_path)
    assert (tmp_path / "made-timelines.png").stat().st_size > 10_000


def test_broken_conservation_is_said():
    record = made_record()
    record["trials"][-1]["done_s"][0] += 0.1  # the asker had the answer later than any part explains
    assert "BROKEN" in serving_tables.sentences(record)[-1]


# ---- the programs


def test_continuous_batching_from_the_command_line(checkpoint_folder, tmp_path, capsys):
    file = tmp_path / "run.jsonl"
    arguments = ["--model", str(checkpoint_folder), "--requests", "3", "--prompt-tokens", "12", "--max-new-tokens", "4"]
    arguments += ["--rounds", "1", "--kv-memory", "0.01", "--max-tokens", "64", "--json", str(file)]
    assert continuous_batching.main(arguments) == 0
    page = capsys.readouterr().out
    assert "transformers, continuous" in page
    assert "All ways gave the same tokens to all 3 requests" in page
    record = json.loads(file.read_text())
    assert len(record["trials"]) == len(record["ways"]) == 5


@pytest.mark.parametrize("program", ["continuous_batching", "scheduling"])
def test_what_was_measured_before_ctrl_c_is_kept(program, checkpoint_folder, tmp_path, monkeypatch, capsys):
    runs = []

    def interrupted(way, _load):
        runs.extend([way.name] * (way.name != "chats alone"))
        if len(runs) == 8:  # after the warm-up, in the first round
            raise KeyboardInterrupt
        return made_trial(way.name, 0, 1)

    for kind in (OneByOne, StaticBatches, TransformersContinuous, OurEngine):
        monkeypatch.setattr(kind, "run", interrupted)
    file = tmp_path / "run.jsonl"
    arguments = ["--model", str(checkpoint_folder), "--kv-memory", "0.01", "--max-tokens", "64", "--json", str(file)]
    arguments += {"continuous_batching": ["--prompt-tokens", "12", "--max-new-tokens", "4"],
                  "scheduling": ["--long-prompt", "64", "--budgets", "16,32", "--running", "1,4"]}[program]  # fmt: skip
    assert {"continuous_batching": continuous_batching, "scheduling": scheduling}[program].main(arguments) == 130
    record = json.loads(file.read_text())
    assert record["partial"]
    assert len(record["trials"]) == 2
    assert "nothing to compare" in capsys.readouterr().out


@pytest.mark.parametrize("endpoint", ["http://x", "x=ftp://y", "x=http://127.0.0.1:1"])
def test_an_endpoint_that_is_none_is_a_sentence(endpoint):
    config = continuous_batching.ContinuousConfig(endpoint=endpoint)
    with pytest.raises(UserError, match="--endpoint"):
        continuous_batching.endpoints(config, str)


def test_scheduling_from_the_command_line(checkpoint_folder, tmp_path, capsys):
    file = tmp_path / "run.jsonl"
    arguments = ["--model", str(checkpoint_folder), "--chats", "3", "--long-prompt", "64", "--budgets", "8,32"]
    arguments += ["--running", "1,4", "--requests", "4", "--max-new-tokens", "8", "--rounds", "2", "--max-tokens", "64"]
    assert scheduling.main([*arguments, "--kv-memory", "0.01", "--json", str(file)]) == 0
    page = capsys.readouterr().out
    assert "No setting changed anybody's tokens" in page
    record = json.loads(file.read_text())
    assert record["ways"] == ["budget 8", "budget 32", "whole prompts", "running 1", "running 4"]
    whole = next(trial for trial in record["trials"] if trial["way"] == "whole prompts")
    pieces = next(trial for trial in record["trials"] if trial["way"] == "budget 8")
    assert len(whole["timelines"][-1]["slices"]) < len(pieces["timelines"][-1]["slices"])
    assert (
        scheduling_tables.disturbed(whole)
        == ("keeps every chat waiting" in page)
        == ("no verdict on budgets" not in page)
    )
    late = whole | {"token_s": [[1e-6, 2e-6]] * 3 + whole["token_s"][3:]}
    assert not scheduling_tables.disturbed(late)
    assert "no verdict" in scheduling_tables.about_budgets(record | {"trials": [late | {"way": "whole prompts"}]})[0]


def test_scheduling_refuses_what_cannot_work(checkpoint_folder):
    with pytest.raises(UserError, match="above --chats"):
        scheduling.SchedulingConfig(budgets="4", chats=8)
    with pytest.raises(UserError, match="context of 128"):
        scheduling.main(["--model", str(checkpoint_folder), "--long-prompt", "500", "--json", "-"])


# ---- a server that is not ours


class StandIn(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply(json.dumps({"data": [{"id": "some-model"}]}).encode())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "some-model"
        if asked["prompt"] == "!":
            return self.reply(b"data: {broken\n\n")
        chunks = [{"choices": [{"text": f"{asked['prompt']}{i} "}]} for i in range(asked["max_tokens"] - 1)]
        usage = {"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}}  # the last chunk held two tokens
        events = [*map(json.dumps, [{"choices": [{"text": ""}]}, *chunks, usage]), "[DONE]"]
        return self.reply("".join(f"data: {event}\n\n" for event in events).encode())

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Endpoint("other", f"http://127.0.0.1:{server.server_port}/", lambda ids: "".join(map(chr, ids)))
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_timed_by_its_chunks_and_counted_by_its_usage(other):
    trial = other.run(Load([[97], [98, 99]], [4, 3], [0.0, 0.01]))
    assert [len(tokens) for tokens in trial["token_s"]] == [3, 2]
    assert trial["new_tokens"] == 7
    assert trial["token_s"][1][0] >= 0.01
    assert waste(trial) is None


def test_answers_whose_tokens_are_not_known_are_compared_with_nobodys():
    record = made_record()
    record["ways"].append("other")
    record["trials"] += [made_trial("other", n, 1) | {"answers": None} for n in range(6)]
    assert same_answers(record, record["trials"][-6:]) is None
    assert "All ways whose tokens are known gave the same" in " ".join(serving_tables.sentences(record))
    assert serving_tables.sections(record)


def test_an_endpoint_that_breaks_off_is_a_sentence(other):
    with pytest.raises(UserError, match="other left 1 of 2 requests without an answer"):
        other.run(Load([[33], [98]], [4, 3], [0.0, 0.0]))
