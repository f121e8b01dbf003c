"""Traces and GenAI metrics for OpenTelemetry, where --otlp-endpoint asks for them. Nothing else imports this module.

One span of a request, and in it one for each stretch of its way: receive, prepare, queue, prefill, decode, deliver. A
client's traceparent is continued (W3C Trace Context), and the trace's id stands in the log line too. No text of
anybody's.

The names beginning with gen_ai are OpenTelemetry's for generative models, which may still change. Spans wait in a
bounded queue for a thread that sends them in batches; what does not fit is lost, and requests never wait for a
collector.
"""

import logging
import threading
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.books import PROBES
from service.life import Life
from service.observe import ENDPOINTS, FIRST_TOKEN_S, PER_TOKEN_S, WHOLE_S

SERVICE = "llm-infer-baseline"
OPERATIONS = {"chat": "chat", "completions": "text_completion"}
PATHS = {endpoint: path for path, endpoint in reversed(ENDPOINTS.items())}
EXPORTER = "opentelemetry.exporter.otlp.proto.http"
LAST_S = 2.0  # for what is left when the service ends, whether the collector answers or not
NS = 1_000_000_000


class Traces:
    """endpoint: the collector's address, such as http://127.0.0.1:4318. about: of the model.

    What OpenTelemetry's own variables say counts too: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
    OTEL_EXPORTER_OTLP_HEADERS and _TIMEOUT, OTEL_BSP_MAX_QUEUE_SIZE, OTEL_METRIC_EXPORT_INTERVAL and their kin.
    """

    def __init__(self, endpoint: str, about: Mapping[str, Any]) -> None:
        logging.getLogger(EXPORTER).setLevel(logging.ERROR)  # that a batch is lost, and not each of its tries
        base, own = endpoint.rstrip("/"), {"service.name": SERVICE, "llmserve.model.hash": str(about.get("hash", ""))}
        resource = Resource.create(own).merge(OTELResourceDetector().detect())
        self.spans = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.spans.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces")))
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(f"{base}/v1/metrics"))
        self.metrics = MeterProvider([reader], resource, shutdown_on_exit=False)
        self.tracer = self.spans.get_tracer(SERVICE)
        self.propagator = TraceContextTextMapPropagator()
        meter = self.metrics.get_meter(SERVICE)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Any:
            return meter.create_histogram(
                f"gen_ai.server.{name}", "s", what, explicit_bucket_boundaries_advisory=buckets
            )

        self.whole = histogram("request.duration", "from arrival to the last byte", WHOLE_S)
        self.first_token = histogram("time_to_first_token", "from arrival to the first token", FIRST_TOKEN_S)
        self.per_token = histogram("time_per_output_token", "between tokens after the first", PER_TOKEN_S)

    def begin(self, life: Life, headers: Mapping[str, str]) -> None:
        """Its span, from the moment when it arrived. Probes have none."""
        if life.endpoint in PROBES:
            return
        begin_ns = time.time_ns() - round((life.clock() - life.start_s) * NS)
        parent = self.propagator.extract(headers, Context())
        span = self.tracer.start_span(name_of(life), parent, SpanKind.SERVER, start_time=begin_ns)
        life.span = (span, begin_ns)
        life.facts["trace_id"] = format(span.get_span_context().trace_id, "032x")

    def end(self, life: Life, parts: Mapping[str, float]) -> None:
        """What has become of it, when its books are closed. parts: of life.split(), seconds."""
        if life.span is None:
            return
        span, begin_ns = life.span
        if span.is_recording():
            span.update_name(name_of(life))
            span.set_attributes(attributes(life))
            if life.status >= 500:
                span.set_status(Status(StatusCode.ERROR, life.error_code))
            self.stretches(span, life, begin_ns, parts["total"])
        span.end(begin_ns + round(parts["total"] * NS))
        if life.endpoint in OPERATIONS:
            self.measure(life, parts["total"])

    def stretches(self, parent: Span, life: Life, begin_ns: int, total_s: float) -> None:
        """The spans within. Each begins where the one before it ends."""
        context = set_span_in_context(parent, Context())
        end_s = life.start_s + total_s
        begun = [(name, moment_s) for name, moment_s in moments(life) if moment_s <= end_s]
        for (name, from_s), (_, to_s) in pairwise([*begun, ("end", end_s)]):
            span = self.tracer.start_span(name, context, start_time=begin_ns + round((from_s - life.start_s) * NS))
            span.end(begin_ns + round((to_s - life.start_s) * NS))

    def measure(self, life: Life, total_s: float) -> None:
        common = genai(life)
        failed = {} if life.error_code is None else {"error.type": life.error_code}
        self.whole.record(total_s, common | failed)
        for request in life.requests:
            tokens = request.timeline.tokens
            if tokens:
                self.first_token.record(tokens[0] - life.start_s, common)
            if len(tokens) > 1:
                self.per_token.record((tokens[-1] - tokens[0]) / (len(tokens) - 1), common)

    def stop(self) -> None:
        """Send what is left, for LAST_S at most: a collector that is away must not keep the service from ending."""

        def send() -> None:
            self.spans.shutdown()
            self.metrics.shutdown()

        last = threading.Thread(target=send, name="last traces", daemon=True)
        last.start()
        last.join(LAST_S)


def name_of(life: Life) -> str:
    """As the conventions have it: what is done with which model, or method and route."""
    if life.endpoint in OPERATIONS:
        return " ".join(filter(None, (OPERATIONS[life.endpoint], life.facts.get("model"))))
    return " ".join(filter(None, (life.facts["method"], PATHS.get(life.endpoint))))


def moments(life: Life) -> list[tuple[str, float]]:
    """When each stretch of its way began, as far as it came: readings of its clock, in their order."""
    found: list[tuple[str, float | None]] = [("receive", life.start_s), ("prepare", life.opened_s or None)]
    if life.last is not None:
        line = life.last.timeline
        first = line.tokens[0] if line.tokens else None
        found += [("queue", line.arrived), ("prefill", line.admitted), ("decode", first), ("deliver", line.finished)]
    return [(name, moment_s) for name, moment_s in found if moment_s is not None]


def genai(life: Life) -> dict[str, str]:
    """What its measurements are told apart by: few values each. The model is the served one, whatever was asked."""
    found = {"gen_ai.operation.name": OPERATIONS[life.endpoint], "gen_ai.provider.name": SERVICE}
    if "model" in life.facts:
        found |= {"gen_ai.request.model": life.facts["model"], "gen_ai.response.model": answered_by(life)}
    return found


def answered_by(life: Life) -> str:
    """The model that answered: another server's, where that stood in (x-degraded: model=...)."""
    rung, _, model = life.facts.get("degraded", "").partition("=")
    return model if rung == "model" else life.facts["model"]


def attributes(life: Life) -> dict[str, Any]:
    found = {
        "http.request.method": life.facts["method"], "http.response.status_code": life.status,
        "http.route": PATHS.get(life.endpoint), "error.type": life.error_code, "llmserve.outcome": life.outcome,
        "llmserve.request_id": life.id,
    }  # fmt: skip
    if life.endpoint in OPERATIONS:
        found |= genai(life)
    facts = life.facts  # of answers that did not come from the engine, too
    found |= {
        "gen_ai.usage.input_tokens": facts.get("prompt_tokens"),
        "gen_ai.usage.cache_read.input_tokens": facts.get("cached_tokens"),
        "gen_ai.usage.output_tokens": facts.get("completion_tokens"),
        "llmserve.degraded": facts.get("degraded"), "llmserve.cache": facts.get("cache"),
    }  # fmt: skip
    if life.requests:
        first = life.requests[0]
        found |= {
            "gen_ai.usage.input_tokens": len(first.prompt),
            "gen_ai.usage.cache_read.input_tokens": first.reused,
            "gen_ai.usage.output_tokens": sum(len(one.answer) for one in life.requests),
            "gen_ai.response.finish_reasons": [one.finish_reason or "none" for one in life.requests],
            "llmserve.predicted_wait_s": life.facts.get("predicted_wait"),
            "llmserve.preemptions": sum(one.preemptions for one in life.requests),
        }
    return {name: value for name, value in found.items() if value is not None}
