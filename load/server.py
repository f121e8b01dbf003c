"""What a server says of itself, and what its process uses, from outside: models, metrics, CPU time and memory."""

import contextlib
import http.client
import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import psutil
from prometheus_client.parser import text_string_to_metric_families

from config import UserError

# One name for what servers call differently; the first that is there counts.
NAMES = {
    "running": ("llmserve_requests_running", "vllm:num_requests_running", "llamacpp:requests_processing"),
    "waiting": ("llmserve_requests_waiting", "vllm:num_requests_waiting", "llamacpp:requests_deferred"),
    "kv_usage": ("llmserve_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc", "llamacpp:kv_cache_usage_ratio"),
    "prompt_tokens": ("llmserve_prompt_tokens_total", "vllm:prompt_tokens_total", "llamacpp:prompt_tokens_total"),
    "new_tokens": (
        "llmserve_generated_tokens_total", "vllm:generation_tokens_total", "llamacpp:tokens_predicted_total",
    ),
    "cache_hits": ("llmserve_prompt_tokens_total{cached=true}", "vllm:prefix_cache_hits_total"),
}  # fmt: skip
PATIENCE_S = 5.0
EVERY_S = 1.0  # between two looks while it is measured


def get(url: str, path: str, headers: Mapping[str, str]) -> bytes | None:
    """What it answers with status 200; None otherwise, also when nobody is there."""
    try:
        asked = urllib.request.Request(url.rstrip("/") + path, headers=dict(headers))
        with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
            return answer.read()
    except (OSError, ValueError, http.client.HTTPException):
        return None


def models(url: str, headers: Mapping[str, str]) -> list[str] | None:
    """The names of its models; None when it has no such list. UserError when nobody is there or it lets nobody in."""
    address = url.rstrip("/") + "/v1/models"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, headers=dict(headers)), timeout=PATIENCE_S
        ) as answer:
            return [plain(str(one["id"])) for one in json.load(answer)["data"]] or None
    except urllib.error.HTTPError as error:
        if error.code in (404, 405, 501):
            return None
        remedy = "give its key with --api-key" if error.code in (401, 403) else "look at its log"
        raise UserError(f"{address} answered {error.code}: {remedy}, or check --url.") from error
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        raise UserError(
            f"No OpenAI-compatible server answers at {address} ({why}): start one with `python3 serve.py`, or let "
            "--start do it, or check --url."
        ) from error


def plain(name: str) -> str:
    """A name that a terminal shows and does not obey."""
    return "".join(c if c.isprintable() else "?" for c in name)


def about(url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """kind, and where it tells, about: its model and its settings, and what it can do. Of others only that they are."""
    raw = get(url, "/capacity", headers)
    try:
        capacity = json.loads(raw or b"")
        told = {"model": capacity.pop("model"), "settings": json.loads(get(url, "/config", headers) or b"{}")}
        return {"kind": "llm-infer-baseline", "about": told, "capacity": capacity}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"kind": "another server", "about": {}}


def metrics(url: str, headers: Mapping[str, str]) -> dict[str, float] | None:
    """Our names -> values, of those that it has. None: it has no metrics."""
    raw = get(url, "/metrics", headers)
    try:
        families = list(text_string_to_metric_families((raw or b"").decode()))
    except ValueError:
        return None
    values: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
        for name in {sample.name, f"{sample.name}{{{labels}}}"}:
            values[name] = values.get(name, 0.0) + (0.0 if math.isnan(sample.value) else sample.value)
    found = {ours: next((values[one] for one in theirs if one in values), None) for ours, theirs in NAMES.items()}
    return {name: value for name, value in found.items() if value is not None} or None


class Watched:
    """with Watched(url, headers) as seen: its metrics before, during and after, and what its process used.

    CPU time and memory are those of the process that listens at a local address, with its children; None elsewhere.
    GPU memory is what NVML books on these processes; None where it books none.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.url, self.headers, self.process = url, headers, listener(url)
        self.during: list[dict[str, float]] = []
        self.peak = self.gpu_peak = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.loop, name="watching the server", daemon=True)

    def __enter__(self) -> "Watched":
        self.before, self.before_s, self.start_s = metrics(self.url, self.headers), self.cpu_s(), time.perf_counter()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.after, after_s = metrics(self.url, self.headers), self.cpu_s()
        known = None not in (self.before_s, after_s)
        self.used = {"cpu_s": after_s - self.before_s, "rss_peak_bytes": self.peak or None,
                     "gpu_peak_bytes": self.gpu_peak or None} if known else None  # fmt: skip

    def loop(self) -> None:
        while not self.stop.wait(EVERY_S):
            found = metrics(self.url, self.headers) if self.before else None
            if found:
                self.during.append(found | {"at": time.perf_counter() - self.start_s})
            family = self.family()
            with contextlib.suppress(psutil.Error):  # it may end while it is looked at
                self.peak = max(self.peak, sum(one.memory_info().rss for one in family))
            self.gpu_peak = max(self.gpu_peak, gpu_bytes({one.pid for one in family}))

    def cpu_s(self) -> float | None:
        try:
            times = [one.cpu_times() for one in self.family()]
        except psutil.Error:
            return None
        return sum(one.user + one.system for one in times) if times else None

    def family(self) -> list[psutil.Process]:
        if self.process is None:
            return []
        try:
            return [one for one in (self.process, *self.process.children(recursive=True)) if one.is_running()]
        except psutil.Error:
            return []


def gpu_bytes(pids: set[int]) -> int:
    """Memory that these processes hold on all NVIDIA GPUs; 0 without a driver, and where it does not say whose."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            found = [one for gpu in gpus for one in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return 0
    return sum(one.usedGpuMemory or 0 for one in found if one.pid in pids)


def listener(url: str) -> psutil.Process | None:
    place = urlsplit(url)
    if place.hostname not in ("127.0.0.1", "localhost", "::1"):
        return None
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid:
                return psutil.Process(one.pid)
    except (psutil.Error, OSError):  # another user's process
        pass
    return None
