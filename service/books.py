"""When a request has ended: its figures go into the metrics, its line into the log, its times among the last lives."""

from collections.abc import Callable
from typing import Any

from engine.request import Request
from service.life import Life
from service.observe import Lives, Metrics, RequestLog

PROBES = ("health", "metrics")  # asked every few seconds by machines: counted, and logged only when they fail
COMPLETIONS = ("chat", "completions")


class Books:
    """decode: token ids to text where prompts and answers are to be logged too, else None."""

    def __init__(
        self, metrics: Metrics, log: RequestLog, lives: Lives, decode: Callable[[list[int]], str] | None
    ) -> None:
        self.metrics, self.log, self.lives, self.decode = metrics, log, lives, decode

    def close(self, life: Life) -> None:
        parts = life.split()
        self.metrics.requests.labels(life.endpoint, life.outcome).inc()
        facts = self.facts(life, parts)
        if life.endpoint in COMPLETIONS:
            self.measure(life, parts)
            self.lives.add(life.id, facts | {"timelines": timelines(life)})
        if life.endpoint not in PROBES or life.status != 200:
            self.log.write("request", **facts)

    def measure(self, life: Life, parts: dict[str, float]) -> None:
        m = self.metrics
        m.whole.observe(parts["total"])
        m.send_blocked.observe(life.blocked_s)
        if life.facts.get("retry"):
            m.retries.inc()
        for name, histogram in (("queue", m.queue), ("prefill", m.prefill), ("decode", m.decode)):
            if name in parts:
                histogram.observe(parts[name])
        for request in life.requests:
            tokens = request.timeline.tokens
            if tokens:
                m.first_token.observe(tokens[0] - life.start_s)
            if len(tokens) > 1:
                m.per_token.observe((tokens[-1] - tokens[0]) / (len(tokens) - 1))
        if life.requests:
            first = life.requests[0]
            m.prompt_tokens.labels("true").inc(first.reused)
            m.prompt_tokens.labels("false").inc(len(first.prompt) - first.reused)
            error_s = prediction_error_s(life)
            if error_s is not None:
                m.prediction_error.observe(error_s)

    def facts(self, life: Life, parts: dict[str, float]) -> dict[str, Any]:
        """What the log says of it. No text of anybody's, unless the operator asked for it."""
        known = {name: value for name, value in life.facts.items() if name != "key"}
        known |= {"request_id": life.id, "key_hash8": life.facts.get("key", "")[:8], "status": life.status,
                  "outcome": life.outcome, "error_code": life.error_code}  # fmt: skip
        known |= {f"t_{name}": round(seconds, 6) for name, seconds in parts.items()}
        known["t_send_blocked"] = round(life.blocked_s, 6)
        if life.requests:
            first = life.requests[0]
            known |= {
                "prompt_tokens": len(first.prompt),
                "cached_tokens": first.reused,
                "completion_tokens": sum(len(one.answer) for one in life.requests),
                "finish_reason": [one.finish_reason for one in life.requests],
                "preemptions": sum(one.preemptions for one in life.requests),
                "batch_max": max((size for one in life.requests for *_, size in one.timeline.slices), default=0),
            }
            if self.decode is not None:
                known |= {
                    "prompt": self.decode(first.prompt),
                    "answers": [self.decode(one.answer) for one in life.requests],
                }
        return {name: value for name, value in known.items() if value not in (None, "")}


def prediction_error_s(life: Life) -> float | None:
    """How far the wait for the first token was from the one foretold."""
    tokens = life.requests[0].timeline.tokens
    if not tokens or "predicted_wait" not in life.facts:
        return None
    return abs(tokens[0] - life.admitted_s - life.facts["predicted_wait"])


def timelines(life: Life) -> list[dict[str, Any]]:
    """Every answer's, in milliseconds since the request arrived. steps: start, length, tokens, requests in the step."""
    return [timeline(one, life.start_s) for one in life.requests]


def timeline(request: Request, start_s: float) -> dict[str, Any]:
    def since(moment_s: float | None) -> float | None:
        return None if moment_s is None else round((moment_s - start_s) * 1e3, 3)

    line, steps = request.timeline, request.timeline.slices
    return {
        "arrived": since(line.arrived), "admitted": since(line.admitted), "finished": since(line.finished),
        "tokens": [since(moment) for moment in line.tokens],
        "steps": [[since(begin), round((end - begin) * 1e3, 3), tokens, size] for begin, end, tokens, size in steps],
    }  # fmt: skip
