"""What is learned of a server from outside: its counters by whatever name, its process, its GPU's memory."""

import http.server
import json
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from config import UserError
from load import server


@contextmanager
def answering(pages: dict[str, tuple[int, bytes]]):
    """A server with these pages: path -> (status, body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = pages.get(self.path, (404, b"{}"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as there:
        thread = threading.Thread(target=there.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{there.server_address[1]}"
        there.shutdown()
        thread.join()


OURS = b"""# TYPE llmserve_requests_running gauge
llmserve_requests_running 3
# TYPE llmserve_prompt_tokens counter
llmserve_prompt_tokens_total{cached="true"} 40
llmserve_prompt_tokens_total{cached="false"} 60
"""
VLLM = b"""vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} NaN
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 7.0
"""


@pytest.mark.parametrize(
    ("page", "found"),
    [
        (OURS, {"running": 3.0, "prompt_tokens": 100.0, "cache_hits": 40.0}),
        (VLLM, {"running": 5.0, "kv_usage": 0.0, "cache_hits": 7.0}),
        (b"llamacpp:requests_processing 1\n", {"running": 1.0}),
        (b"something_else 1\n", None), (b"not { metrics", None), (b"\xff\xfe", None), (b"", None),
    ],
)  # fmt: skip
def test_counters_are_found_by_whatever_name(page: bytes, found: dict | None):
    with answering({"/metrics": (200, page)}) as url:
        assert server.metrics(url, {}) == found


@pytest.mark.parametrize(
    ("status", "body", "names"),
    [
        (200, {"data": [{"id": "m"}, {"id": "n"}]}, ["m", "n"]), (200, {"data": []}, None), (404, {}, None),
        (200, {"data": [{"id": "a\x1b[31m"}]}, ["a?[31m"]),
    ],
)  # fmt: skip
def test_names_of_models(status: int, body: dict, names: list[str] | None):
    with answering({"/v1/models": (status, json.dumps(body).encode())}) as url:
        assert server.models(url, {}) == names


@pytest.mark.parametrize(
    ("status", "body", "says"), [(401, b"", "--api-key"), (500, b"", "its log"), (200, b"<html>", "No OpenAI")]
)
def test_a_server_that_does_not_answer_so_is_one_sentence(status: int, body: bytes, says: str):
    with answering({"/v1/models": (status, body)}) as url, pytest.raises(UserError, match=says):
        server.models(url, {})


def test_another_server_is_another_server():
    with answering({"/capacity": (200, b"[1]"), "/config": (200, b"{}")}) as url:
        assert server.about(url, {}) == {"kind": "another server", "about": {}}


class NVMLError(Exception):
    pass


def refused(*_):
    raise NVMLError


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch):
    """Two GPUs; process 7 holds memory on both, another one too, and of one nothing is told."""
    running = {0: [(7, 100), (8, 50)], 1: [(7, 20), (9, None)]}
    fake = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetComputeRunningProcesses=lambda i: [
            SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in running[i]
        ],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.mark.usefixtures("nvml")
def test_gpu_memory_is_that_of_the_servers_processes_on_all_gpus():
    assert server.gpu_bytes({7}) == 120 and server.gpu_bytes({7, 8, 9}) == 170 and server.gpu_bytes({1}) == 0


def test_without_a_driver_and_where_it_refuses_there_is_none(nvml, monkeypatch: pytest.MonkeyPatch):
    for name in ("nvmlDeviceGetComputeRunningProcesses", "nvmlInit"):
        monkeypatch.setattr(nvml, name, refused)
        assert server.gpu_bytes({7}) == 0
