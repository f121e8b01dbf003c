"""Hands on a running service: its engine moved step by step, its figures as a scrape has them."""

import threading
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from service_kit import Reply, Served


def figure(here: Served, name: str, /, **labels: str) -> float:
    """The sum of a metric's samples with these labels, as a scrape has it."""
    families = text_string_to_metric_families(here.ask("/metrics").body.decode())
    samples = [one for family in families for one in family.samples if one.name == f"llmserve_{name}"]
    return sum(one.value for one in samples if labels.items() <= one.labels.items())


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["message"]["content"]


def running(here: Served, count: int) -> None:
    """Let steps pass one by one until so many requests are in the engine's hands."""
    here.until(lambda: len(here.bridge.engine.inbox) + len(here.bridge.engine.answers) == count)
    while len(here.bridge.engine.scheduler.running) < count:
        one_step(here)


def one_step(here: Served) -> None:
    before = here.runner.steps
    here.runner.allow(1)
    here.until(lambda: here.runner.steps > before)
    here.until(lambda: here.bridge.working)


def number_of(here: Served, text: str) -> int:
    """The engine's number of the running request with this message."""
    prompt = here.house.serving.prompts.core.encode(f"[user] {text}[assistant] ").ids
    return next(one.number for one in here.bridge.engine.scheduler.running if one.prompt == prompt)


def settled(here: Served) -> list[dict[str, Any]]:
    """The log's lines when all books are closed: that happens just after a reply has been sent."""
    here.until(lambda: sum(here.outcomes().values()) == here.received)
    done = threading.Event()
    here.server.loop.call_soon_threadsafe(done.set)
    assert done.wait(5)
    return here.lines()


def break_engine(here: Served) -> None:
    """Every request fails, until there were twenty: the probe of the test kit went well."""
    one, here.runner.one = here.runner.one, lambda _part: RuntimeError("broken")
    assert {here.chat(f"number {i}").status for i in range(19)} == {500}
    here.runner.one = one
