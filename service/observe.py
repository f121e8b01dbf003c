"""What can be seen from outside: metrics for Prometheus, a log line for every request, the last lives in memory."""

import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TextIO

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector
from prometheus_client.gc_collector import GCCollector

from service.breaker import State
from service.ladder import Rung

PREFIX = "llmserve"
ENDPOINTS = {
    "/v1/chat/completions": "chat", "/v1/completions": "completions", "/v1/models": "models", "/metrics": "metrics",
    "/health": "health", "/health/live": "health", "/health/ready": "health", "/capacity": "capacity",
    "/config": "config", "/": "page",
}  # fmt: skip
# As OpenTelemetry has them for time to the first token and for a whole request, with longer ones for CPUs.
FIRST_TOKEN_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    320,
)
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
WHOLE_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 160, 320)
STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
OUTCOMES = (
    "ok", "client_error", "rate_limited", "shed_queue", "shed_deadline", "shed_memory", "shed_drain", "timeout",
    "cancelled", "engine_error", "shed_circuit", "upstream_error",
)  # fmt: skip
WASTES = ("disconnect", "deadline", "preempt", "engine_error", "drain")
ERROR_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ERROR_RATIO = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1, 2, 5)
LIVES_KEPT = 500


class Metrics:
    """All series of one service, in a registry of its own. No label holds what a client wrote."""

    def __init__(self, info: Mapping[str, str]) -> None:
        self.registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"{PREFIX}_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", what, buckets=buckets, registry=registry)

        Info(f"{PREFIX}_build", "what runs here", registry=registry).info(dict(info))
        self.requests = counter("requests", "requests by how they ended", "endpoint", "outcome")
        self.whole = histogram("request_duration_seconds", "of completions, from arrival to the last byte", WHOLE_S)
        self.first_token = histogram("time_to_first_token_seconds", "from arrival to the first token", FIRST_TOKEN_S)
        self.per_token = histogram(
            "time_per_output_token_seconds", "between tokens after the first, mean of an answer", PER_TOKEN_S
        )
        self.queue = histogram("queue_time_seconds", "waiting for the first step", WHOLE_S)
        self.prefill = histogram("prefill_time_seconds", "in steps, up to the first token", WHOLE_S)
        self.decode = histogram("decode_time_seconds", "in steps, after the first token", WHOLE_S)
        self.send_blocked = histogram("send_blocked_seconds", "waiting for the reader", WHOLE_S)
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts; cached: found in the prefix cache", "cached")
        self.computed_tokens = counter("computed_tokens", "tokens of prompts and answers that the engine computed")
        self.generated_tokens = counter("generated_tokens", "new tokens")
        self.wasted_tokens = counter("wasted_tokens", "tokens computed for nobody", "reason")
        self.running = gauge("requests_running", "answers that hold memory")
        self.waiting = gauge("requests_waiting", "answers in the queue")
        self.inside = gauge("requests_inside", "answers let in, computed or waiting")
        self.places = gauge("requests_places", "answers that there is room for, computed or waiting")
        self.queued_tokens = gauge("queued_tokens", "what all requests in the house may add up to")
        self.kv_usage = gauge("kv_cache_usage_ratio", "blocks held, of all")
        self.kv_blocks = gauge("kv_blocks_total", "blocks of keys and values")
        self.kv_block_size = gauge("kv_block_size_tokens", "tokens of a block")
        self.predicted_wait = gauge(
            "admission_predicted_wait_seconds", "what a newcomer would wait for its first token"
        )
        self.prediction_error = histogram(
            "admission_prediction_error_seconds", "|predicted - real| wait for the first token", ERROR_S
        )
        self.prediction_ratio = histogram(
            "admission_prediction_error_ratio", "the same, of the real wait (of 50 ms where that was less)", ERROR_RATIO
        )
        self.step = histogram("engine_step_seconds", "a step of the engine", STEP_S)
        self.progress = gauge("engine_last_progress_timestamp_seconds", "when the engine last began or ended a step")
        self.restarts = counter("engine_restarts", "engines that were replaced", "reason")
        self.quarantine = gauge("quarantine_inputs", "inputs that failed the engine", "state")
        self.quarantine_refusals = counter("quarantine_refusals", "requests refused because their input is quarantined")
        self.retries = counter("client_retries", "requests that were sent again, by the client's own count")
        self.loop_lag = histogram("event_loop_lag_seconds", "how late the event loop wakes up", STEP_S)
        self.live = gauge("live", "1 while the engine gets on, 0 when a step does not end")
        self.ready = gauge("ready", "1 while a new request would be let in")
        self.tasks = gauge("event_loop_tasks", "tasks of the event loop: more and more of them are a leak")
        self.breaker_state = gauge("breaker_state", "1 for the state that it is in", "name", "state")
        self.breaker_transitions = counter("breaker_transitions", "changes of a breaker's state", "name", "to")
        self.degraded = gauge("degraded", "1 while this rung of the ladder is in use", "rung")
        self.degraded_requests = counter("degraded_requests", "requests that got something else, by rung", "rung")
        self.cache_lookups = counter("result_cache_lookups", "requests looked up among kept answers", "result")
        self.cache_bytes = gauge("result_cache_bytes", "of kept answers")
        self.law = gauge("law_ok", "1 while the books agree", "law")
        self.memory = gauge("device_memory_bytes", "memory by kind", "kind")
        self.connections = gauge("connections", "open connections")
        self.connections_refused = counter("connections_refused", "connections turned away: as many as may be at work")
        self.memory_used = gauge(
            "memory_used_ratio", "of what this process may use, by its control group or the machine"
        )
        self.memory_tight = gauge("memory_tight", "1 while connections are not kept and caches are given back")
        self.utilisation = gauge("device_utilization_ratio", "how busy the device is")
        self.log_lost = counter("log_lines_lost", "log lines that could not be written")
        self.begin_at_zero()

    def begin_at_zero(self) -> None:
        """Series that are there before anything happens: of one that begins with its first event, Prometheus does not
        see that event, because a rate needs a value before it.
        """
        for outcome in OUTCOMES:
            for endpoint in ("chat", "completions"):
                self.requests.labels(endpoint, outcome)
        for reason in WASTES:
            self.wasted_tokens.labels(reason)
        for cached in ("true", "false"):
            self.prompt_tokens.labels(cached)
        for state in State:
            self.breaker_transitions.labels("engine", state)
        for rung in Rung:
            self.degraded_requests.labels(rung)
        for result in ("hit", "miss"):
            self.cache_lookups.labels(result)


class RequestLog:
    """One JSON line per event. A log that cannot be written is counted, and the service goes on."""

    def __init__(self, stream: TextIO, lost: Counter | None = None) -> None:
        self.stream, self.lost = stream, lost

    def write(self, event: str, **facts: Any) -> None:
        line = {"ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event} | facts
        try:  # JSON escapes control characters: nobody can begin a line of his own
            self.stream.write(in_ascii(line) + "\n")
            self.stream.flush()
        except (OSError, ValueError):
            if self.lost:
                self.lost.inc()


def in_ascii(line: Mapping[str, Any]) -> str:
    """As JSON without any character that a terminal may take for something else."""
    with contextlib.suppress(TypeError):  # a lone surrogate, or a number too large for it
        text = orjson.dumps(line, default=str).decode()
        if text.isascii():
            return text
    return json.dumps(line, ensure_ascii=True, default=str, separators=(",", ":"))


class Lives:
    """The last lives, by request id: enough to explain a slow request, and no text.

    Kept under our own id, since clients may give theirs twice; found by either, of equal ones the latest. Whoever asks
    (key: a key's hash) sees his own requests only.
    """

    def __init__(self, keep: int = LIVES_KEPT) -> None:
        self.keep, self.kept = keep, OrderedDict()

    def add(self, id: str, facts: Mapping[str, Any]) -> None:
        self.kept[id] = dict(facts)
        while len(self.kept) > self.keep:
            self.kept.popitem(last=False)

    def latest(self, key: str, count: int = 20) -> list[dict[str, Any]]:
        """The newest first: id, how it ended, how long it took."""
        own = [(id, facts) for id, facts in self.kept.items() if facts.get("key_hash8", "") == key[:8]]
        newest = own[: -count - 1 : -1]
        names = ("outcome", "status", "t_total", "prompt_tokens", "completion_tokens")
        return [
            {"id": facts.get("client_request_id", id)} | {name: facts.get(name) for name in names}
            for id, facts in newest
        ]

    def get(self, id: str, key: str) -> dict[str, Any] | None:
        own = [(ours, facts) for ours, facts in self.kept.items() if facts.get("key_hash8", "") == key[:8]]
        found = [facts for ours, facts in own if id in (ours, facts.get("client_request_id"))]
        return found[-1] if found else None
