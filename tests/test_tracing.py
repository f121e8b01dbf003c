"""OpenTelemetry, where it is asked for: a span for each request, in its client's trace, and without its text."""

import subprocess
import sys
import time

import pytest
from otlp_kit import Collector, attributes, collecting
from prometheus_kit import free_port
from service_kit import NAME, served
from step_kit import running, settled

from config import ROOT, UserError
from service import settings as settings_module
from service.life import Life
from service.settings import ServeConfig
from service.tracing import attributes as attributes_of
from service.tracing import genai

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENT_ALONG = f"00-{TRACE}-{PARENT}-01"
STRETCHES = ["receive", "prepare", "queue", "prefill", "decode", "deliver"]


@pytest.fixture
def hasty(monkeypatch):
    """Spans and metrics are sent after a moment, not after seconds."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")


@pytest.fixture
def collector(hasty):  # noqa: ARG001
    with collecting() as found:
        yield found


@pytest.fixture
def here(checkpoint_folder, collector: Collector):
    with served(checkpoint_folder, otlp_endpoint=collector.address) as found:
        found.until(collector.roots, "for the span of the probe")
        collector.spans.clear()
        yield found


def one_root(here, collector: Collector):
    (root,) = here.until(collector.roots, "for a span")
    return root


@pytest.mark.slow
def test_a_request_is_one_span_and_its_stretches_fill_it(here, collector: Collector):
    reply = here.chat("what is said stays here", max_tokens=5, headers={"traceparent": SENT_ALONG})
    root = one_root(here, collector)
    assert (root.name, root.trace_id.hex(), root.parent_span_id.hex()) == (f"chat {NAME}", TRACE, PARENT)
    stretches = collector.within(root)
    assert [span.name for span in stretches] == STRETCHES
    edges = [root.start_time_unix_nano, *[span.end_time_unix_nano for span in stretches]]
    assert [span.start_time_unix_nano for span in stretches] == edges[:-1], "each begins where the one before it ends"
    assert edges[-1] == root.end_time_unix_nano and edges == sorted(edges)
    assert abs(root.start_time_unix_nano / 1e9 - time.time()) < 60
    usage, told = reply.json["usage"], attributes(root)
    assert told.items() >= {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "llm-infer-baseline",
        "gen_ai.request.model": NAME, "gen_ai.response.model": NAME, "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"], "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0, "http.request.method": "POST", "http.response.status_code": 200,
        "http.route": "/v1/chat/completions", "llmserve.outcome": "ok",
    }.items()  # fmt: skip
    assert "error.type" not in told and root.status.code == root.status.STATUS_CODE_UNSET
    line = settled(here)[-1]
    assert (line["trace_id"], line["request_id"]) == (TRACE, told["llmserve.request_id"])
    assert collector.resource["service.name"] == "llm-infer-baseline"


@pytest.mark.slow
def test_without_a_clients_trace_it_begins_one_and_probes_have_none(here, collector: Collector):
    for path in ("/health", "/metrics", "/health/ready"):
        here.ask(path, traceparent=SENT_ALONG)
    assert here.complete(stream=True).status == 200
    root = one_root(here, collector)
    assert root.name == f"text_completion {NAME}" and not root.parent_span_id
    assert settled(here)[-1]["trace_id"] == root.trace_id.hex() != TRACE
    assert here.ask("/v1/models").status == 200
    assert here.until(lambda: len(collector.roots()) == 2) and collector.roots()[1].name == "GET /v1/models"


@pytest.mark.slow
def test_a_trace_that_its_client_does_not_record_is_not_recorded(here, collector: Collector):
    assert here.chat(headers={"traceparent": SENT_ALONG[:-1] + "0"}).status == 200
    assert settled(here)[-1]["trace_id"] == TRACE
    assert here.chat("recorded").status == 200
    assert one_root(here, collector).trace_id.hex() != TRACE


@pytest.mark.slow
def test_what_fails_says_how(here, collector: Collector):
    assert here.chat(temperature=9).status == 400
    here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("broken")
    assert here.chat("it breaks").status == 500
    here.runner.hold()
    leaving = here.send_chat("never mind", max_tokens=50)
    running(here, 1)
    leaving.close()
    here.until(lambda: not here.house.serving.jobs)
    here.runner.go()
    here.admission.closed = "memory"
    assert here.chat("nobody").status == 503
    here.admission.closed = None
    here.until(lambda: len(collector.roots()) == 4)
    roots = {attributes(span)["llmserve.outcome"]: span for span in collector.roots()}
    found = {
        outcome: (attributes(span)["error.type"], attributes(span)["http.response.status_code"],
                  span.status.code == span.status.STATUS_CODE_ERROR, [one.name for one in collector.within(span)])
        for outcome, span in roots.items()
    }  # fmt: skip
    assert found == {
        "client_error": ("invalid_value", 400, False, ["receive", "prepare"]),
        "engine_error": ("engine_error", 500, True, [*STRETCHES[:4], "deliver"]),
        "cancelled": ("client_left", 499, False, STRETCHES[:4]),
        "shed_memory": ("server_overloaded", 503, True, ["receive"]),
    }


@pytest.mark.slow
def test_nobodys_text_leaves_the_service_and_the_measures_have_their_names(here, collector: Collector):
    answer = here.chat("a word that is mine", max_tokens=9, user="somebody").json["choices"][0]["message"]["content"]
    assert here.chat("mine too", stop=["mine"], metadata={"mine": "mine"}).status in (200, 400)
    here.until(lambda: len(collector.roots()) == 2 and collector.metrics.keys() >= {"gen_ai.server.request.duration"})
    sent = b"".join(collector.raw)
    assert len(answer) == 9 and answer.encode() not in sent and b"mine" not in sent and b"somebody" not in sent
    points = {name: one.histogram.data_points[0] for name, one in collector.metrics.items()}
    assert points.keys() == {f"gen_ai.server.{name}" for name in
                             ("request.duration", "time_to_first_token", "time_per_output_token")}  # fmt: skip
    for name, one in points.items():
        assert collector.metrics[name].unit == "s" and one.count >= 2
        assert attributes(one)["gen_ai.request.model"] == NAME
    assert list(points["gen_ai.server.time_to_first_token"].explicit_bounds)[:3] == [0.001, 0.005, 0.01]


@pytest.mark.slow
def test_a_collector_that_does_not_answer_costs_spans_and_no_request(checkpoint_folder, collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "24")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "12")
    collector.open.clear()
    with served(checkpoint_folder, otlp_endpoint=collector.address) as here:
        replies = [here.chat(f"number {i}") for i in range(30)]  # of seven spans each
        assert {reply.status for reply in replies} == {200}
        collector.open.set()
        here.until(lambda: len(collector.spans) >= 24)
        time.sleep(0.3)
        assert len(collector.spans) <= 24 + 12 + 12 < 30 * 7, "what did not fit is lost"
        dropped = [line for line in here.lines("log") if "dropping" in line["message"]]
        assert len(dropped) <= 1, "and said once, not once a span"


@pytest.mark.slow
def test_a_collector_that_is_not_there_keeps_nobody_from_ending(checkpoint_folder, hasty):  # noqa: ARG001
    with served(checkpoint_folder, otlp_endpoint=f"http://127.0.0.1:{free_port()}") as here:
        assert {here.chat().status for _ in range(5)} == {200}
        begin = time.monotonic()
    assert time.monotonic() - begin < 15


@pytest.mark.slow
def test_without_it_the_clients_trace_stands_in_the_log_and_what_is_none_does_not(checkpoint_folder):
    wrong = ("", "00-xyz", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE.upper()}-{PARENT}-01", "x" * 5000)
    with served(checkpoint_folder) as here:
        for header in (SENT_ALONG, f"01-{TRACE}-{PARENT}-01-more", *wrong):
            assert here.chat(headers={"traceparent": header}).status == 200
        found = [line.get("trace_id") for line in settled(here)[1:]]
    assert found == [TRACE, TRACE] + [None] * len(wrong)


@pytest.mark.slow
def test_without_it_nothing_of_it_is_imported():
    code = (
        "import sys, serve, service.app, service.assembly, service.server\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) "
        "or name == 'service.tracing'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_model_that_answered_is_told_also_where_another_server_stood_in():
    life = Life(lambda: 1.0, "req-1", endpoint="chat", facts={"method": "POST", "model": "large"})
    assert genai(life)["gen_ai.response.model"] == "large"
    life.facts["degraded"] = "max_tokens=8"
    assert genai(life)["gen_ai.response.model"] == "large"
    life.facts |= {"degraded": "model=org/small=1", "prompt_tokens": 7, "completion_tokens": 3}
    found = attributes_of(life)
    assert (found["gen_ai.request.model"], found["gen_ai.response.model"]) == ("large", "org/small=1")
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (7, 3)
    assert found["llmserve.degraded"] == "model=org/small=1"


def test_packages_that_are_missing_are_named_with_the_way_to_get_them(monkeypatch):
    ServeConfig(otlp_endpoint="http://127.0.0.1:4318").check_tracing()
    monkeypatch.setattr(settings_module, "OTEL_PACKAGES", ("no_such_package.sdk",))
    ServeConfig().check_tracing()
    with pytest.raises(UserError, match=r"needs no_such_package, .*requirements-otel.txt"):
        ServeConfig(otlp_endpoint="http://127.0.0.1:4318").check_tracing()


@pytest.mark.parametrize(
    "wrong", ["collector:4318", "ftp://there", "http://", "http://me:secret@there", "http://a/?key=b"]
)
def test_an_endpoint_that_is_none_or_holds_a_secret_is_refused(wrong: str):
    with pytest.raises(UserError, match="otlp-endpoint"):
        ServeConfig(otlp_endpoint=wrong).check_tracing()
