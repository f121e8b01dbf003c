"""When a request has ended: its figures go into the metrics, its line into the log, its times among the last lives."""

import asyncio
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

from engine.request import Request
from service.life import Life, Tracing
from service.observe import Lives, Metrics, RequestLog

PROBES = ("health", "metrics")  # asked every few seconds by machines: counted, and logged only when they fail
COMPLETIONS = ("chat", "completions")
MOST_KEPT = 512  # steps and tokens of one answer, for whoever asks later
GRADES_KEPT = 500
TINY_S = (
    0.05  # a wait below this one counts as this when its foretelling is graded: nobody cares for a share of nothing
)
LATER_S, AT_ONE_GO = 0.05, 20  # the books of a flood: closed when it has been answered, and not all in one breath
MOST_LEFT = 1000  # of them; from then on each refusal pays for one


class Books:
    """decode: token ids to text where prompts and answers are to be logged too, else None."""

    def __init__(
        self, metrics: Metrics, log: RequestLog, lives: Lives, decode: Callable[[list[int]], str] | None,
        traces: Tracing | None = None,
    ) -> None:  # fmt: skip
        self.metrics, self.log, self.lives, self.decode, self.traces = metrics, log, lives, decode, traces
        self.refused: deque[Life] = deque()
        self.grades: deque[float] = deque(maxlen=GRADES_KEPT)  # errors of the foretelling, as parts of the real wait

    def close_later(self, life: Life) -> None:
        """Of a refusal: its books take as long as its answer, and behind it in a flood others wait for theirs."""
        life.ended_s = life.clock()
        self.refused.append(life)
        if len(self.refused) > MOST_LEFT:
            self.close(self.refused.popleft())
        elif len(self.refused) == 1:
            asyncio.get_running_loop().call_later(LATER_S, self.settle, AT_ONE_GO)

    def settle(self, most: int | None = None) -> None:
        """Close what close_later() left; when that is more than `most`, the rest behind whatever else is to be done."""
        try:
            for _ in range(min(most or len(self.refused), len(self.refused))):
                self.close(self.refused.popleft())
        finally:
            if self.refused:
                asyncio.get_running_loop().call_soon(self.settle, most)

    def close(self, life: Life) -> None:
        parts = life.split()
        self.metrics.requests.labels(life.endpoint, life.outcome).inc()
        facts = self.facts(life, parts)
        if life.endpoint in COMPLETIONS:
            self.measure(life, parts)
            if "key" in life.facts:  # else a stranger's, whom nobody could show it to
                self.lives.add(life.id, facts | {"timelines": [Times(one, life.start_s) for one in life.requests]})
        if self.traces is not None:
            self.traces.end(life, parts)
        if life.endpoint not in PROBES or life.status != 200:
            self.log.write("request", **facts, **self.text(life))

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
        if life.requests and life.requests[0].timeline.admitted is not None:
            first = life.requests[0]
            m.prompt_tokens.labels("true").inc(first.reused)
            m.prompt_tokens.labels("false").inc(len(first.prompt) - first.reused)
            self.grade(life)

    def grade(self, life: Life) -> None:
        """How far the wait for the first token was from the one foretold."""
        wait_s = real_wait_s(life)
        if wait_s is None:
            return
        error_s = abs(wait_s - life.facts["predicted_wait"])
        self.grades.append(error_s / max(wait_s, TINY_S))
        self.metrics.prediction_error.observe(error_s)
        self.metrics.prediction_ratio.observe(self.grades[-1])

    def grading(self) -> dict[str, float | int | None]:
        """Of the last requests that were let in: the middle error of the foretelling, and the one that nine in ten were
        below, as parts of the real wait.
        """
        known = sorted(self.grades)
        p50, p90 = (round(known[int(len(known) * share)], 3) if known else None for share in (0.5, 0.9))
        return {"requests": len(known), "p50": p50, "p90": p90}

    def facts(self, life: Life, parts: dict[str, float]) -> dict[str, Any]:
        """What is known of it, without anybody's text."""
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
                "real_wait": None if (wait_s := real_wait_s(life)) is None else round(wait_s, 4),
                "batch_max": max((size for one in life.requests for *_, size in one.timeline.slices), default=0),
            }
        return {name: value for name, value in known.items() if value not in (None, "")}

    def text(self, life: Life) -> dict[str, Any]:
        """Prompt and answers where the operator asked for them: for the log alone, which only he can read."""
        if self.decode is None or not life.requests:
            return {}
        return {
            "prompt": self.decode(life.requests[0].prompt),
            "answers": [self.decode(one.answer) for one in life.requests],
        }


def real_wait_s(life: Life) -> float | None:
    """From when it was let in to its first token; None where it has none."""
    tokens = life.requests[0].timeline.tokens
    return tokens[0] - life.admitted_s if tokens and "predicted_wait" in life.facts else None


class Times:
    """One answer's, in milliseconds since its request arrived; packed, since hundreds of them are kept for hours.

    steps: begin, length, tokens, requests in the step. Of long answers the first MOST_KEPT steps and tokens.
    """

    def __init__(self, request: Request, start_s: float) -> None:
        line = request.timeline
        moments = (line.arrived, line.admitted, line.finished)
        self.edges = [None if moment is None else round((moment - start_s) * 1e3, 3) for moment in moments]
        self.tokens = array("f", [(moment - start_s) * 1e3 for moment in line.tokens[:MOST_KEPT]])
        self.steps = array("f")
        for begin, end, tokens, size in line.slices[:MOST_KEPT]:
            self.steps.extend(((begin - start_s) * 1e3, (end - begin) * 1e3, tokens, size))
        self.left_out = max(len(line.tokens) - MOST_KEPT, len(line.slices) - MOST_KEPT, 0)

    def shown(self) -> dict[str, Any]:
        arrived, admitted, finished = self.edges
        steps = [round(number, 3) for number in self.steps]
        return {
            "arrived": arrived, "admitted": admitted, "finished": finished,
            "tokens": [round(moment, 3) for moment in self.tokens],
            "steps": [[*steps[i : i + 2], *map(int, steps[i + 2 : i + 4])] for i in range(0, len(steps), 4)],
            "left_out": self.left_out,
        }  # fmt: skip
