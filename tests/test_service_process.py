"""serve.py as its users meet it: a process of its own, real sockets, real signals. Numbers are the fault matrix's."""

import json
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from process_kit import Process, joined, longer, pasted, raw_events, started, until, whole
from service_kit import Reply, chat_body, read_all, read_until

pytestmark = pytest.mark.slow

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTEXT = 100_000
SECRET = "sk-nobody-may-see-this"
PATIENT = {f"LLM_INFER_{name}": "1000" for name in ("QUEUE_TIMEOUT", "REQUEST_TIMEOUT")}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
LONG = {"max_tokens": 4000, "ignore_eos": True}  # seconds of work


@pytest.fixture(scope="module")
def folder(checkpoint_folder, tmp_path_factory):
    return longer(checkpoint_folder, tmp_path_factory.mktemp("long") / "tiny", CONTEXT)


@pytest.fixture(scope="module")
def house(folder, tmp_path_factory):
    """One for all tests that leave it running. What it is told, it is told by its environment."""
    place = tmp_path_factory.mktemp("house")
    said = {"API_KEY": SECRET, "MAX_RUNNING": "8", "LOG_FILE": str(place / "log"), "ISOLATE_KEYS": "1"}
    environment = {f"LLM_INFER_{name}": value for name, value in said.items()} | PATIENT
    with started(folder, place=place, **environment) as process:
        process.log_file = place / "log"
        yield process


# ---- starting


def test_the_first_screen_tells_all_and_its_last_line_works_in_a_shell(house):
    for told in ("tiny", f"http://127.0.0.1:{house.port}", "context 100,000", "8 slots, 16 places", "tokens/s",
                 "longest wait 1000 s"):  # fmt: skip
        assert told in house.screen
    assert SECRET not in house.screen
    assert pasted(house)["message"]["role"] == "assistant"


def test_a_model_that_cannot_chat_says_so_and_its_last_line_continues_a_text(folder, tmp_path):
    plain = shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("chat_template*"))
    told = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(json.dumps(told | {"chat_template": None}))
    with started(plain, place=tmp_path / "place") as process:
        assert "no chat template" in process.screen and "in a browser" not in process.screen
        assert "message" not in (choice := pasted(process)) and choice["finish_reason"] in ("stop", "length")
        reply = process.ask(CHAT, chat_body())
        assert (reply.status, reply.error["param"]) == (400, "messages")


def test_the_environment_sets_what_the_command_line_does_not_and_config_shows_it(house):
    shown = house.ask("/config")
    told = {"max_running": 8, "queue_timeout": 1000.0, "isolate_keys": True, "served_name": "tiny", "threads": 1}
    assert told.items() <= shown.json.items()
    assert shown.json["api_key"] == "set" and SECRET.encode() not in shown.body
    assert house.ask("/config", Authorization="Bearer wrong").status == 401


@pytest.fixture(scope="module")
def mistakes(folder, tmp_path_factory):
    """Starts that cannot succeed, side by side: each takes seconds."""
    taken = socket.create_server(("127.0.0.1", 0))
    place = tmp_path_factory.mktemp("mistakes")
    wishes = {
        "port": (("--port", "99999999"), {}),
        "variable": ((), {"LLM_INFER_MAX_RUNNING": "many"}),
        "flag": (("--prot", "8000"), {}),
        "taken": (("--port", str(taken.getsockname()[1])), {}),
        "keys": (("--api-keys-file", str(place / "none")), {}),
        "log": (("--log-file", str(place / "none" / "log")), {}),
    }
    found = {
        name: Process(folder, *given, place=place / name, **variables) for name, (given, variables) in wishes.items()
    }
    yield found
    taken.close()
    for process in found.values():
        process.close()


@pytest.mark.parametrize(
    ("name", "says"),
    [("port", "--port must be at most 65535"), ("variable", "LLM_INFER_MAX_RUNNING must be a whole number"),
     ("flag", "--prot"), ("taken", "cannot be had (Address already in use)"), ("keys", "--api-keys-file"),
     ("log", "--log-file")],
)  # fmt: skip
def test_a_wrong_wish_is_one_sentence_and_status_2(mistakes, name: str, says: str):
    assert mistakes[name].ended(60) == 2
    sentence = mistakes[name].stderr.strip().splitlines()
    assert len(sentence) == 1 and sentence[0].startswith("serve.py: ") and says in sentence[0]
    assert mistakes[name].popen.stdout.read() == ""


def test_help_names_every_option_and_the_variables(folder, tmp_path):
    process = Process(folder, "--help", place=tmp_path)
    page = process.popen.stdout.read()
    assert process.ended(10) == 0
    process.close()
    assert "--drain-timeout" in page and "LLM_INFER_PORT" in page and process.stderr == ""


# ---- answers


def both_ways(house: Process, path: str, body: dict) -> tuple[dict, dict]:
    one, pieces = house.ask(path, body), house.ask(path, body | WITH_USAGE)
    assert (one.status, pieces.status) == (200, 200), one.body
    answers = whole(one.json), joined(pieces.events)
    for answer in answers:
        answer["usage"] = {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    return answers


def test_a_stream_joined_is_the_whole_answer(house):
    settings = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "n": 2}, {"seed": 3, "top_p": 0.5, "ignore_eos": True}]
    texts = ["hello", "Ünïcödé 你好 🙂", "a\x00b\u200b", "x" * 70]
    for text, more, lines in product(texts, settings, (False, True)):
        chat = chat_body(text, max_tokens=20, **more) | ({"logprobs": True, "top_logprobs": 2} if lines else {})
        plain = {"model": "tiny", "prompt": text, "max_tokens": 20, **more} | ({"logprobs": 2} if lines else {})
        for path, body in ((CHAT, chat), (COMPLETIONS, plain)):
            one, pieces = both_ways(house, path, body)
            assert one == pieces, body
            assert len(one["choices"]) == more.get("n", 1)
            counted = sum(len(choice["tokens"]) for choice in one["choices"].values())
            assert counted == (one["usage"]["completion_tokens"] if lines else 0)


def test_b40_a_stop_string_cuts_both_at_the_same_place(house):
    for seed in range(12):
        body = chat_body("stop", max_tokens=40, seed=seed, ignore_eos=True)
        text = house.ask(CHAT, body).json["choices"][0]["message"]["content"]
        stop = text[9:12]
        one, pieces = both_ways(house, CHAT, body | {"stop": [stop, "never"]})
        assert one == pieces
        assert one["choices"][0] == {"text": text[: text.index(stop)], "tokens": [], "reason": "stop"}


def test_greedy_text_is_what_transformers_generates(house, checkpoint_folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net, tokenizer = (kind.from_pretrained(checkpoint_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for text in ("hello", "What is a KV cache?", "1 2 3 4 5", "Größe"):
        said = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        ids = torch.tensor([tokenizer(said, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            theirs = net.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
        ours = house.ask(CHAT, chat_body(text, max_tokens=30, temperature=0)).json
        assert ours["usage"]["prompt_tokens"] == ids.shape[1]
        assert ours["choices"][0]["message"]["content"] == tokenizer.decode(theirs, skip_special_tokens=True)


def test_b61_neighbours_that_leave_change_nobodys_bytes(house):
    wishes = [chat_body(f"I stay {i}", max_tokens=300, seed=i, ignore_eos=True, **WITH_USAGE) for i in range(4)]
    alone = [joined(house.ask(CHAT, wish).events)["choices"] for wish in wishes]
    before = house.figure("llmserve_requests_total", outcome="cancelled")
    with ThreadPoolExecutor(4) as pool:
        staying = [pool.submit(house.ask, CHAT, wish) for wish in wishes]
        for i in range(12):
            with house.open(CHAT, chat_body(f"I leave {i}", **LONG, stream=i % 3 > 0)) as leaving:
                if i % 3 == 1:
                    read_until(leaving, b'"content":"')
                else:
                    time.sleep(0.01)
    assert [joined(one.result().events)["choices"] for one in staying] == alone
    until(lambda: house.figure("llmserve_requests_total", outcome="cancelled") == before + 12)
    assert house.figure("llmserve_requests_running") == house.figure("llmserve_kv_cache_usage_ratio") == 0
    assert house.figure("llmserve_wasted_tokens_total", reason="disconnect") > 0
    assert (found := house.ask("/health").json)["status"] == "ok", found


@pytest.mark.parametrize("stream", [False, True])
def test_b67_http_1_0_gets_no_chunks_and_the_end_is_the_end(house, stream: bool):
    with house.open(CHAT, chat_body("old", temperature=0, stream=stream), version="1.0") as connection:
        raw = read_all(connection)
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b" 200 " in head and b"transfer-encoding" not in head.lower() and b"connection: close" in head.lower()
    ours = raw_events(raw) if stream else json.loads(body)
    found = joined(ours) if stream else whole(ours)
    again = whole(house.ask(CHAT, chat_body("old", temperature=0)).json)
    assert found["choices"] == again["choices"]


def test_thousands_of_tokens_are_tokenised_while_others_are_answered(house):
    too_long = {"model": "tiny", "prompt": "word " * 95_000, "max_tokens": 1}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(house.ask, COMPLETIONS, too_long)
        took_s = []
        while not asked.done():
            begin = time.perf_counter()
            assert house.ask("/health/live").status == 200
            took_s.append(time.perf_counter() - begin)
    refused = asked.result()
    assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
    assert "475000 tokens" in refused.error["message"], "it was tokenised"
    assert len(took_s) > 50 and sorted(took_s)[int(len(took_s) * 0.9)] < 0.1, took_s
    fits = house.ask(COMPLETIONS, too_long | {"prompt": "word " * 1000, "max_tokens": 3})
    assert (fits.status, fits.json["usage"]["prompt_tokens"]) == (200, 5000)


# ---- what can be seen


def usage_of(reply: Reply) -> dict:
    return reply.json["usage"] if "json" in reply.headers["content-type"] else reply.events[-2]["usage"]


def test_the_parts_of_every_request_of_a_burst_add_up(house):
    def one(i: int) -> tuple[float, Reply]:
        begin = time.perf_counter()
        body = chat_body(f"{i}" * 20 * i, max_tokens=20 + i, **(WITH_USAGE if i % 2 else {}))
        return (reply := house.ask(CHAT, body)) and (time.perf_counter() - begin, reply)

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(one, range(20)))
    for wall_s, reply in found:
        parts = dict(usage_of(reply)["timing"])
        total = parts.pop("total")
        parts.pop("unexplained")
        assert all(part >= 0 for part in parts.values()), parts
        assert sum(parts.values()) == pytest.approx(total, abs=max(2e-3, 0.02 * total)), parts
        assert {"queue", "prefill", "decode", "tokenize"} <= parts.keys() and total <= wall_s
        header = dict(re.findall(r"(\w+);dur=([\d.]+)", reply.headers["server-timing"]))
        header = {name: float(ms) for name, ms in header.items()}
        told = sum(ms for name, ms in header.items() if name not in ("total", "unexplained"))
        assert told == pytest.approx(header["total"], abs=max(2, 0.02 * header["total"])), header


def test_a_requests_timeline_can_be_asked_for_afterwards(house):
    asked = chat_body("a secret word", max_tokens=12, ignore_eos=True)
    usage = usage_of(house.ask(CHAT, asked, x_request_id="slow-one.1"))
    reply = until(lambda: (found := house.ask("/debug/requests/slow-one.1")).status == 200 and found)
    line = reply.json["timelines"][0]
    assert 0 <= line["arrived"] <= line["admitted"] <= line["tokens"][0] and line["tokens"][-1] <= line["finished"]
    assert line["tokens"] == sorted(line["tokens"]) and len(line["tokens"]) == 12
    computed = sum(tokens for _, _, tokens, _ in line["steps"])
    assert computed == usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] + 11
    assert reply.json["outcome"] == "ok" and b"secret word" not in reply.body
    assert house.ask("/debug/requests").json["requests"][0]["id"] == "slow-one.1"
    assert house.ask("/debug/requests/nobody").status == 404


def test_the_metrics_are_prometheus_own_and_name_nobody(house):
    house.ask(CHAT, chat_body(), x_request_id="my-own-id-77")
    page, families = house.ask("/metrics").body.decode(), house.metrics()
    ours = [family for family in families.values() if family.name.startswith("llmserve_")]
    assert len(ours) >= 25 and "process_resident_memory_bytes" in families
    for family in ours:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name) and family.documentation
        assert all(one.value >= 0 for one in family.samples), family.name
        if family.type == "histogram":
            buckets = [one.value for one in family.samples if one.name.endswith("_bucket")]
            count = next(one.value for one in family.samples if one.name.endswith("_count"))
            assert len(buckets) > 10 and buckets == sorted(buckets) and buckets[-1] == count, family.name
    longest = {
        float(one.labels["le"]) for one in families["llmserve_time_to_first_token_seconds"].samples if one.labels
    }
    assert {20.0, 40.0, 80.0, 160.0, 320.0} <= longest
    labels = {name for family in ours for one in family.samples for name in one.labels}
    build = families["llmserve_build_info"].samples[0].labels
    ways = {"state", "to", "rung", "result"}  # of breakers, the ladder, the cache
    assert labels - set(build) == {"endpoint", "outcome", "le", "cached", "law", "kind", "reason"} | ways
    assert build["name"] and build["kernel"]
    assert SECRET not in page and "my-own-id-77" not in page and "req-" not in page


def test_the_log_has_one_line_for_every_request_and_no_text_of_anybodys(house):
    before = len(house.log_file.read_text().splitlines())
    house.ask(CHAT, chat_body("unmistakable words"), x_request_id="mine")
    house.ask(CHAT, chat_body("unmistakable words", temperature=9))
    house.ask("/health")
    house.ask("/nothing")
    until(lambda: len(house.log_file.read_text().splitlines()) >= before + 3)
    text = house.log_file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    ids = [line["request_id"] for line in lines]
    assert len(ids) == len(set(ids)) and {line["event"] for line in lines} == {"request"}
    good, bad, lost = lines[before:]
    assert (good["outcome"], good["status"], good["client_request_id"]) == ("ok", 200, "mine")
    assert (bad["outcome"], bad["error_code"], lost["status"]) == ("client_error", "invalid_value", 404)
    assert good["completion_tokens"] <= 4 and good["t_total"] > 0 and len(good["key_hash8"]) == 8
    assert "unmistakable" not in text and SECRET not in text
