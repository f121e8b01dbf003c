"""Hub loading against a stand-in hub on loopback: what a user sees when the hub answers, stalls, refuses or breaks off.

The stand-in speaks the four requests that huggingface_hub makes for a checkpoint: the model's record, its list of
files, and HEAD and GET of one file. It can fail in each way that a real network does, and it counts who knocked.
"""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants  # here, so that its log handler is not bound to one test's captured stderr
from huggingface_hub.utils import close_session

from config import MODEL_NAME, ROOT, UserError
from weights import find as finder
from weights import hub
from weights.find import Checkpoint, find

pytestmark = pytest.mark.slow

REPO = "stand-in/tiny"
PATIENCE_S = 1.0  # in place of ANSWER_WITHIN_S where a test waits it out; enough for loopback on a busy machine
FAR_TOO_LONG_S = 4.0  # for what takes PATIENCE_S or less; wide, because test machines are busy
COMMIT = hashlib.sha1(b"the only commit of every repository here").hexdigest()
WEIGHTS = "model.safetensors"
Files = dict[str, bytes]


# ---- the stand-in


class StandIn:
    """A hub on 127.0.0.1. Its attributes are its moods; tests set them, and read the requests that came in."""

    def __init__(self, repos: dict[str, Files]) -> None:
        self.repos = repos
        self.requests: list[str] = []  # "METHOD path", telemetry left out
        self.silent = False  # takes the connection and never says a word
        self.falls_silent = False  # answers the first request, and no other
        self.down = False  # answers 503
        self.refusal: tuple[int, str] = (404, "RepoNotFound")  # for models it does not have; the hub has several ways
        self.gated_record = False  # 403 already for the model's record
        self.gated_files = False  # the record is public, the files are not: what the real hub does
        self.breaks_in: str | None = None  # the file whose sending ends halfway
        self.weights_take_s = 0.0  # the weights come in slices over this time
        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def fetched(self) -> list[str]:
        """The files that were sent, by name."""
        return [line.rsplit("/", 1)[1] for line in self.requests if line.startswith("GET") and "/resolve/" in line]

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def handler_of(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: one request per connection, so no idle thread outlives a test
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path == "/api/agent-harnesses":  # huggingface_hub's telemetry, once per process at a moment of its own
                return self.answer(404)
            stand_in.requests.append(f"{self.command} {path}")
            if stand_in.silent or (stand_in.falls_silent and len(stand_in.requests) > 1):
                stand_in.released.wait(30)
                return None
            if stand_in.down:
                return self.answer(503)
            if found := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/[^/]+)?", path):
                return self.answer_api(found[1], listing=found[2] == "tree")
            if found := re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", path):
                return self.answer_file(found[1], found[2])
            return self.answer(400)

        do_HEAD = do_GET

        def answer_api(self, repo: str, listing: bool) -> None:
            if repo not in stand_in.repos:
                status, code = stand_in.refusal
                return self.answer(status, {"X-Error-Code": code})
            if stand_in.gated_record:
                return self.answer(403, {"X-Error-Code": "GatedRepo"})
            files = stand_in.repos[repo]
            tree = [{"type": "file", "path": n, "size": len(b), "oid": digest(b)} for n, b in files.items()]
            record = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(200, body=json.dumps(tree if listing else record).encode())

        def answer_file(self, repo: str, name: str) -> None:
            if stand_in.gated_files:
                self.answer(403, {"X-Error-Code": "GatedRepo"})
                return
            body = stand_in.repos[repo][name]
            self.answer(200, {"ETag": f'"{digest(body)}"', "X-Repo-Commit": COMMIT}, body, name)

        def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", name: str = "") -> None:
            self.send_response(status)
            for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if name == stand_in.breaks_in:
                self.wfile.write(body[: len(body) // 2])
                return
            slices = 10 if name == WEIGHTS and stand_in.weights_take_s else 1
            step = -(-len(body) // slices) or 1
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(stand_in.weights_take_s / slices if name == WEIGHTS else 0)

        def log_message(self, *_: object) -> None:
            """Quiet: stderr is what some tests look at."""

    return Handler


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


# ---- fixtures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A Llama of two layers with its tokenizer, as the files of a hub repository, and one that nobody asked for."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2, "hub": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=16, max_position_embeddings=64)).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {**files, "pytorch_model.bin": b"the same weights once more, as a pickle"}


@pytest.fixture
def point_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Directs huggingface_hub to a hub; with caches of this test alone, and nothing of the user's own settings.

    It reads its environment once, when it is imported, so its constants are set instead. The environment itself is
    tried out in a process of its own, below.
    """
    for name in [n for n in os.environ if n.upper().endswith("_PROXY") or n.startswith(("HF_TOKEN", "HUGGING_FACE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")  # a proxy from the system's settings would swallow 127.0.0.1
    monkeypatch.setenv("LLM_INFER_CACHE", str(tmp_path / "kit"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def point(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    threads = set(threading.enumerate())
    close_session()
    yield point
    for thread in set(threading.enumerate()) - threads:  # a knock that was given up still waits for its answer
        thread.join(10)
    close_session()


@pytest.fixture
def stand_in(point_at: Callable[[str], None], checkpoint: Files) -> Iterator[StandIn]:
    server = StandIn({REPO: checkpoint, MODEL_NAME: checkpoint})
    point_at(server.url)
    yield server
    server.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ANSWER_WITHIN_S", PATIENCE_S)
    monkeypatch.setattr(hub, "SILENCE_S", PATIENCE_S)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Checkpoint:
    """In place of the embedded model, whose conversion takes 20 s and which may not be installed."""
    checkpoint = Checkpoint("Embedded", "a test", tmp_path)
    monkeypatch.setattr(finder, "embedded", lambda: checkpoint)
    return checkpoint


def refusal_of(name: str | None) -> str:
    """What find() says when it gives up, which must be one readable line."""
    with pytest.raises(UserError) as caught:
        find(name)
    text = str(caught.value)
    assert "\n" not in text, f"more than one line: {text}"
    assert text.endswith("."), f"no sentence: {text}"
    assert "Traceback" not in text
    assert len(text) < 500
    return text


def seconds(started: float) -> float:
    return time.monotonic() - started


# ---- the hub answers


def test_a_named_model_is_downloaded_once_and_loads(stand_in: StandIn) -> None:
    """The ordinary case: the folder that find() returns is what transformers needs, and the second run is offline."""
    import torch

    from tokenizer import load_tokenizer
    from weights.load import load_net

    found = find(REPO)
    assert (found.name, found.timing_only) == (REPO, False)
    assert COMMIT[:12] in found.origin, "records must tell which revision was measured"
    net, weights_hash = load_net(found, torch.device("cpu"), torch.float32, "sdpa", seed=0)
    assert net.config.num_hidden_layers == 2
    assert re.fullmatch("[0-9a-f]{12}", weights_hash)
    assert load_tokenizer(found.folder).encode("hello hub") == [2, 3]

    stand_in.requests.clear()
    assert find(REPO) == found
    assert stand_in.requests == []


def test_the_default_model_comes_from_a_hub_that_answers(stand_in: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    """The fallback must never replace a model that could be had: numbers of two models are not comparable."""
    found = find(None)
    assert found.name == MODEL_NAME
    assert capsys.readouterr().err == ""
    stand_in.down = True
    assert find(None) == found, "a downloaded model needs no hub"


def test_only_the_files_that_are_loaded_are_downloaded(stand_in: StandIn) -> None:
    """Popular models repeat their weights in five formats; fetching them all would be gigabytes for nothing."""
    find(REPO)
    assert WEIGHTS in stand_in.fetched()
    assert "pytorch_model.bin" not in stand_in.fetched()
    assert len(stand_in.fetched()) == len(set(stand_in.fetched()))


@pytest.mark.usefixtures("impatient")
def test_a_slow_download_that_runs_is_not_cut(stand_in: StandIn) -> None:
    """The time limit is for the first answer only. A slow line that delivers must be left alone."""
    stand_in.weights_take_s = 1.5 * PATIENCE_S
    started = time.monotonic()
    found = find(REPO)
    assert seconds(started) > PATIENCE_S
    assert found.folder is not None
    assert (found.folder / WEIGHTS).read_bytes() == stand_in.repos[REPO][WEIGHTS]


def test_a_model_without_safetensors_is_refused(stand_in: StandIn, checkpoint: Files) -> None:
    """Pickled weights can run code and are not loaded; the user must hear that, not "config.json missing"."""
    stand_in.repos["stand-in/pickled"] = {n: b for n, b in checkpoint.items() if n != WEIGHTS}
    text = refusal_of("stand-in/pickled")
    assert "stand-in/pickled" in text
    assert "safetensors" in text


@pytest.mark.parametrize("refusal", [(404, "RepoNotFound"), (401, "RepoNotFound")])
def test_an_unknown_model_is_called_unknown(stand_in: StandIn, refusal: tuple[int, str]) -> None:
    """A typing mistake must not be taken for a network problem. The hub answers 401 or 404, by who is asking."""
    stand_in.refusal = refusal
    text = refusal_of("stand-in/no-such-model")
    assert "stand-in/no-such-model" in text
    assert "check the name" in text
    assert "could not be reached" not in text


def test_a_name_that_no_hub_could_know_is_refused_without_a_request(stand_in: StandIn) -> None:
    """A name with a blank in it is a mistake at the keyboard; there is nothing to ask the hub."""
    assert "check the name" in refusal_of("no such name!")
    assert stand_in.requests == []


@pytest.mark.parametrize("gate", ["gated_record", "gated_files"])
def test_a_gated_model_asks_for_consent(stand_in: StandIn, gate: str) -> None:
    """The user can put this right, by accepting terms. The real hub shows such a model's record and keeps its files."""
    setattr(stand_in, gate, True)
    text = refusal_of(REPO)
    assert REPO in text
    assert "consent" in text
    assert "terms" in text
    assert "could not be reached" not in text


# ---- the hub does not answer


def test_the_first_answer_may_take_five_seconds() -> None:
    """Tests that wait shorten this limit; here is the one that users get."""
    assert hub.ANSWER_WITHIN_S == 5.0
    assert hub.REMEMBER_FAILURE_S == 3600.0


@pytest.mark.usefixtures("impatient")
def test_a_silent_hub_is_given_up_soon_for_a_named_model(stand_in: StandIn) -> None:
    """huggingface_hub alone would wait for minutes. A named model never falls back: its name is in the record."""
    stand_in.silent = True
    started = time.monotonic()
    text = refusal_of(REPO)
    assert seconds(started) < FAR_TOO_LONG_S
    assert REPO in text
    assert "could not be reached" in text
    assert "smollm2" in text, "it must say what can be given instead"


@pytest.mark.usefixtures("impatient")
def test_a_silent_hub_costs_the_default_model_one_wait_and_one_warning(
    stand_in: StandIn, embedded: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five seconds per run would be too much where there is no network; another model without a word would be a lie."""
    stand_in.silent = True
    started = time.monotonic()
    assert find(None) is embedded
    assert seconds(started) < FAR_TOO_LONG_S
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert warning.startswith("warning: ")
    assert MODEL_NAME in warning
    assert embedded.name in warning

    knocks = len(stand_in.requests)
    assert knocks == 1
    assert find(None) is embedded
    assert len(stand_in.requests) == knocks, "within the hour nobody knocks again"
    assert capsys.readouterr().err == warning, "every run that fell back says so"


def test_a_refused_connection_is_given_up_at_once(
    point_at: Callable[[str], None], embedded: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commonest network failure behind a firewall, and one that needs no waiting at all."""
    with socket.socket() as never_listens:  # bound, so that no one else gets the port in the meantime
        never_listens.bind(("127.0.0.1", 0))
        point_at(f"http://127.0.0.1:{never_listens.getsockname()[1]}")
        started = time.monotonic()
        text = refusal_of(REPO)
        assert find(None) is embedded
        assert seconds(started) < FAR_TOO_LONG_S
    assert "could not be reached" in text
    assert "refused" in text
    assert capsys.readouterr().err.count("\n") == 1


def test_without_hub_and_embedded_model_the_user_hears_of_both(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last resort is a sentence with the command that helps, not the failure of the fallback."""
    stand_in.down = True
    monkeypatch.setattr(finder, "EMBEDDED_PACKAGE", "a-package-that-nobody-has-installed")
    text = refusal_of(None)
    assert MODEL_NAME in text
    assert "make run" in text
    assert "random:distilgpt2" in text


# ---- the hub breaks off


def test_half_a_file_is_not_taken_for_a_model(stand_in: StandIn) -> None:
    """A truncated weight file that passed for whole would fail in every later run, long after the network recovered."""
    stand_in.breaks_in = WEIGHTS
    started = time.monotonic()
    text = refusal_of(REPO)
    assert seconds(started) < 20, "huggingface_hub tries five times more, a second apart, and no longer"
    assert REPO in text
    assert "download" in text
    assert hub.cached(REPO) is None

    stand_in.breaks_in = None
    stand_in.requests.clear()
    found = find(REPO)
    assert found.folder is not None
    assert (found.folder / WEIGHTS).read_bytes() == stand_in.repos[REPO][WEIGHTS]
    assert "config.json" not in stand_in.fetched(), "what had arrived whole is kept"


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_falls_silent_after_its_first_answer_is_given_up(stand_in: StandIn) -> None:
    """huggingface_hub asks for the list of files without a time limit; the program would hang until it is killed."""
    stand_in.falls_silent = True
    started = time.monotonic()
    text = refusal_of(REPO)
    assert seconds(started) < FAR_TOO_LONG_S
    assert REPO in text
    assert "could not be reached" in text


@pytest.mark.parametrize("lost", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_download_that_lacks_a_file_is_completed(stand_in: StandIn, lost: str) -> None:
    """A killed download leaves some files. Without its tokenizer, too, a model is not whole."""
    folder = find(REPO).folder
    assert folder is not None
    (folder / lost).resolve().unlink()
    (folder / lost).unlink()
    assert hub.cached(REPO) is None
    stand_in.requests.clear()
    assert find(REPO).folder == folder
    assert stand_in.fetched() == [lost]


def test_a_model_in_parts_is_whole_only_with_every_part(tmp_path: Path) -> None:
    """Large models lie in several files, named by an index; one missing part is found before the minutes of loading."""
    parts = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (tmp_path / parts["a.weight"]).touch()
    assert not hub.has_weights(tmp_path)
    (tmp_path / parts["b.weight"]).touch()
    assert hub.has_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("half an ind")
    assert not hub.has_weights(tmp_path)


# ---- offline on purpose


def test_offline_mode_asks_nobody_and_is_not_remembered(
    stand_in: StandIn, embedded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE is a wish, not a failure: the next run without it must find the hub at once."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal_of(REPO)
    assert find(None) is embedded
    assert stand_in.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert find(None).name == MODEL_NAME


def test_offline_mode_still_finds_what_was_downloaded(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to run on a machine without a network is to download first."""
    found = find(REPO)
    stand_in.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find(REPO) == found
    assert stand_in.requests == []


def test_the_environment_chooses_the_hub_its_cache_and_offline_mode(stand_in: StandIn, tmp_path: Path) -> None:
    """Users set HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, which only a new process reads. Looking for a model must not
    load PyTorch, either: that takes seconds, and a wrong name should be refused at once."""
    code = (
        "import sys; from weights.find import find; from config import UserError\n"
        f"try: print(find({REPO!r}).folder)\n"
        "except UserError as error: print('UserError', error)\n"
        "print('torch' in sys.modules)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    env = {**clean, "HF_ENDPOINT": stand_in.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}

    def lines(**more: str) -> list[str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env | more, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    refused, torch_loaded = lines(HF_HUB_OFFLINE="1")
    assert refused.startswith("UserError")
    assert "HF_HUB_OFFLINE" in refused
    assert torch_loaded == "False"
    assert stand_in.requests == []

    folder, torch_loaded = lines()
    assert Path(folder).is_relative_to(tmp_path / "home")
    assert hub.has_weights(Path(folder))
    assert torch_loaded == "False"


# ---- a failure is remembered


def test_a_failure_is_forgotten_after_an_hour(
    stand_in: StandIn, embedded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that came back must be noticed without a flag or a file to delete."""
    now = time.time()
    monkeypatch.setattr(hub, "time", SimpleNamespace(time=lambda: now))
    stand_in.down = True
    find(None)
    knocks = len(stand_in.requests)
    assert knocks > 0
    stand_in.down = False
    now += hub.REMEMBER_FAILURE_S - 1
    assert find(None) is embedded
    assert len(stand_in.requests) == knocks
    now += 2
    assert find(None).name == MODEL_NAME


def test_a_failure_of_another_hub_does_not_count(
    stand_in: StandIn, embedded: Checkpoint, checkpoint: Files, point_at: Callable[[str], None]
) -> None:
    """Setting HF_ENDPOINT to a mirror is how users help themselves when a hub is down; it must work at once."""
    stand_in.down = True
    assert find(None) is embedded
    mirror = StandIn({MODEL_NAME: checkpoint})
    try:
        point_at(mirror.url)
        assert find(None).name == MODEL_NAME
        assert mirror.requests
    finally:
        mirror.close()


def test_a_remembered_failure_does_not_keep_a_named_model_away(stand_in: StandIn, embedded: Checkpoint) -> None:
    """Who names a model wants it now, and waits the five seconds if need be. From then on it is the default again."""
    stand_in.down = True
    assert find(None) is embedded
    stand_in.down = False
    assert find(MODEL_NAME).name == MODEL_NAME
    assert find(None).name == MODEL_NAME


@pytest.mark.parametrize("note", ["", "[]", "null", '{"hub": 1}', '{"at": "noon", "why": "", "hub": ""}'])
def test_a_damaged_note_of_a_failure_is_no_failure(stand_in: StandIn, note: str) -> None:
    """The note lies in a cache folder, where anything may happen to it; it may cost a knock, never a run."""
    hub.failure_note().write_text(note)
    assert hub.failed_lately() is None
    assert find(None).name == MODEL_NAME
    assert stand_in.fetched()
