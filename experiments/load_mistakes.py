"""Five mistakes of load generators, on servers whose delays are known and on the engine. See experiments/mistakes.py.

The golden servers (load/golden.py) compute nothing: what is wrong in these figures is the measuring alone.
"""

import asyncio
import time
from functools import cache
from statistics import median
from typing import Any

from engine.engine import Engine
from engine.load import Loaded
from engine.load import load as load_engine
from engine.request import Sampling
from engine.settings import EngineConfig
from lab import client
from lab.prompts import exact
from load import golden, measures
from load.script import MODEL, Script
from metrics import ms, number, percentile
from model import Model
from tokenizer import Tokenizer

PROMPT_TOKENS, WARM_PROMPT = 32, 200
RATE, ANSWER_S, REQUESTS = 15.0, 0.1, 24  # asked for 15 a second, a server that gives one client ten
CLIENTS, WAVES = 8, 4
Sample = dict[str, Any]
Finding = tuple[list[tuple], list[str]]


def body(new: int, chat: bool = False) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    return {"model": MODEL, **asked, "max_tokens": new, "stream": True, "stream_options": {"include_usage": True}}


def late_sender(_model: Model, _tokenizer: Tokenizer, _config: Any, _turn: int) -> Sample:
    """A schedule of 15 requests a second, sent by a client that waits for each answer before it sends the next one."""
    with golden.serve(Script(first_s=ANSWER_S, tokens=1)) as server:
        start_s = time.perf_counter()

        async def run() -> list[client.Trace]:
            traces = []
            async with client.Client(server.url + "/v1/completions") as one:
                for i in range(REQUESTS):
                    due_s = start_s + i / RATE
                    await asyncio.sleep(max(due_s - time.perf_counter(), 0))
                    traces.append(await one.ask(body(1), due_s))
            return traces

        requests = measures.measured(asyncio.run(run()), start_s)
    return {"from_sent": [one["end"] - one["sent"] for one in requests],
            "from_due": [one["end"] - one["due"] for one in requests]}  # fmt: skip


def coordinated_omission(samples: list[Sample], *_: Any) -> Finding:
    """The clock starts when a request left, and it left late because an earlier answer was late (Tene's word)."""
    wrong = median(percentile(sample["from_sent"], 95) for sample in samples[1:])
    right = median(percentile(sample["from_due"], 95) for sample in samples[1:])
    return [("p95 latency, ms", ms(wrong), ms(right), number(wrong / right, 3))], [
        "Wrong: from sent. The client waits for its answers, so it asks only as fast as the server gives; the queue of "
        f"those that were to be sent, {RATE:g} a second, is nowhere.",
        "Right: from due, when each was to be sent. load_test.py counts from due, and prints how late requests left.",
    ]


def in_fours(_model: Model, _tokenizer: Tokenizer, _config: Any, _turn: int) -> Sample:
    """A stream whose events carry four tokens each."""
    with golden.serve(Script(first_s=0.02, gap_s=0.02, per_chunk=4)) as server:
        trace = client.closed_loop(server.url + "/v1/completions", [body(32)], 1)[0]
    request = measures.measured([trace], trace.due_s)[0]
    return {"pieces": len(request["chunks"]), "tokens": request["new_tokens"], "between_s": sum(measures.gaps(request))}


def chunks(samples: list[Sample], *_: Any) -> Finding:
    """Events of a stream are counted as tokens (guidellm, issue 1145; inference-perf, issue 364)."""
    later = samples[1:]
    wrong = median(sample["pieces"] / sample["between_s"] for sample in later)
    right = median((sample["tokens"] - 1) / sample["between_s"] for sample in later)
    return [("decode speed, tokens/s", number(wrong), number(right), number(wrong / right, 3))], [
        f"Wrong: {later[0]['pieces']} events counted as tokens. Right: the {later[0]['tokens']} tokens of its usage.",
        "load_test.py takes usage, or a tokenizer, and prints pieces, usage and the server's count beside each other.",
    ]


def role_first(_model: Model, _tokenizer: Tokenizer, _config: Any, _turn: int) -> Sample:
    """A chat stream that names the role at once and has its first token later."""
    with golden.serve(Script(first_s=0.15, gap_s=0.005)) as server:
        trace = client.closed_loop(server.url + "/v1/chat/completions", [body(8, chat=True)], 1)[0]
    request = measures.measured([trace], trace.due_s)[0]
    return {"event": request["choice_times"][0], "text": measures.ttft(request)}


def role_chunk(samples: list[Sample], *_: Any) -> Finding:
    """The event that names the role is taken for the first token (vLLM, issues 3759 and 15106)."""
    wrong = median(sample["event"] for sample in samples[1:])
    right = median(sample["text"] for sample in samples[1:])
    return [("time to the first token, ms", ms(wrong, 2), ms(right, 2), number(wrong / right, 3))], [
        "Wrong: to the first event with a choice, which says only who speaks. Right: to the first text.",
        "Such a server seems to answer at once, however long its prompts take.",
    ]


@cache
def loaded(model: str | None, threads: int) -> Loaded:
    return load_engine(EngineConfig(model=model, threads=threads))


def engine_of(config: Any) -> Engine:
    """Empty: it has seen no prompt."""
    return loaded(config.model, config.threads).new_engine()


def asked_twice(_model: Model, tokenizer: Tokenizer, config: Any, turn: int) -> Sample:
    """The engine's first token for a prompt that it has not seen, and for the very same one again."""
    engine = engine_of(config)
    prompt = exact(tokenizer.codec.encode, WARM_PROMPT, turn)
    waits = []
    for _ in range(2):
        answer = engine.submit(prompt, Sampling(max_new_tokens=2, ignore_eos=True))
        while engine.step():
            pass
        line = answer.request.timeline
        waits.append(line.tokens[0] - line.arrived)
    return {"new": waits[0], "again": waits[1]}


def warm_cache(samples: list[Sample], *_: Any) -> Finding:
    """The same prompts are sent in every run, and a prefix cache answers (vLLM, issues 52884 and 54227)."""
    wrong = median(sample["again"] for sample in samples[1:])
    right = median(sample["new"] for sample in samples[1:])
    return [(f"time to the first token of {WARM_PROMPT}, ms", ms(wrong), ms(right), number(wrong / right, 3))], [
        "Wrong: a prompt that the engine has just computed: its keys and values are found, prefill is next to nothing.",
        "Right: a prompt of its own. load_test.py begins every prompt with a mark that no other has, and prints how "
        "much of the prompts was found in a cache.",
    ]


def in_waves(_model: Model, tokenizer: Tokenizer, config: Any, _turn: int) -> Sample:
    """Eight clients that begin together, each with four requests one after the other, on the engine."""
    engine = engine_of(config)
    wish = Sampling(max_new_tokens=config.max_new_tokens, ignore_eos=True)
    left = [exact(tokenizer.codec.encode, PROMPT_TOKENS + 2 * i, i) for i in range(CLIENTS * WAVES)]
    flying, waits = [], []
    while left or flying:
        while left and len(flying) < CLIENTS:
            flying.append(engine.submit(left.pop(), wish))
        engine.step()
        for answer in [one for one in flying if one.done]:
            flying.remove(answer)
            waits.append((answer.request.timeline.arrived, answer.request.timeline.tokens[0]))
    waits.sort()
    return {"first_tokens": [token - arrived for arrived, token in waits]}


def opening_wave(samples: list[Sample], *_: Any) -> Finding:
    """All clients begin at once, as no users do, and that moment is inside the percentile."""
    wrong = median(percentile(sample["first_tokens"], 95) for sample in samples[1:])
    right = median(percentile(sample["first_tokens"][CLIENTS:], 95) for sample in samples[1:])
    return [("p95 of the first token, ms", ms(wrong), ms(right), number(wrong / right, 3))], [
        f"Wrong: over all {CLIENTS * WAVES} requests, the first {CLIENTS} of which computed their prompts together.",
        "Right: after each client's first answer. load_test.py leaves out the opening wave and the drain, and says "
        "which window it took.",
    ]
