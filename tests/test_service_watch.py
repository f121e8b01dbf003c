"""The service looks at itself: laws that its books must obey, waste, lateness, what it remembers; and every scrape."""

import asyncio
import contextlib
import http.client
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from service_kit import Served, served
from step_kit import figure, one_step, running, settled

from service.books import MOST_LEFT
from service.life import Life
from service.observe import LIVES_KEPT

pytestmark = pytest.mark.slow


@pytest.fixture
def here(checkpoint_folder):
    with served(checkpoint_folder) as found:
        yield found


@contextlib.contextmanager
def broken_books(here: Served, law: str):
    bridge, blocks = here.bridge, here.bridge.engine.scheduler.blocks
    if law == "tokens":
        bridge.useful += 5
        yield
        bridge.useful -= 5
    elif law == "blocks":
        block, _ = blocks.free.popitem()
        yield
        blocks.free[block] = None
    else:
        bridge.in_house.change(50)
        yield
        bridge.in_house.change(-50)
        here.house.watch.windows.clear()


@pytest.mark.parametrize("law", ["tokens", "blocks", "little"])
def test_a_broken_law_is_named_and_a_mended_one_forgotten(here, law: str):
    here.house.watch.laws_s = 0  # at every step
    assert here.ask("/health").json == here.ask("/health").json | {"status": "ok", "broken_laws": []}
    with broken_books(here, law):
        here.until(lambda: here.chat() and here.ask("/health").json["broken_laws"] == [law], f"for {law}")
        found = here.ask("/health")
        assert (found.status, found.json["status"]) == (200, "degraded")
        assert [figure(here, "law_ok", law=one) for one in here.house.watch.laws] == [
            float(one != law) for one in here.house.watch.laws
        ]
    here.until(lambda: here.chat() and here.ask("/health").json["status"] == "ok")
    assert figure(here, "law_ok") == 3


def test_clients_that_leave_during_a_long_step_break_no_law(here):
    here.runner.hold()
    leaving = [here.send_chat(max_tokens=50) for _ in range(3)]
    running(here, 3)
    begin = time.monotonic()
    for connection in leaving:
        connection.close()
    here.until(lambda: not here.house.serving.jobs)
    looks = []
    while time.monotonic() - begin < 2.5:
        looks.append(here.house.watch.little_agrees())
        time.sleep(0.1)
    here.runner.go()
    assert all(looks) and here.bridge.in_house.area_s(here.bridge.clock()) > 3


def test_a_single_odd_look_breaks_no_law(here):
    """An answer that ends while two books are compared may stand in one of them only."""
    looks, told = iter([False, True, False, False]), []

    def little_agrees() -> bool:
        told.append(here.house.watch.laws["little"])
        return next(looks, True)

    here.house.watch.little_agrees = little_agrees
    here.until(lambda: len(told) == 5)
    assert told[1:] == [True, True, True, False]


def test_what_was_computed_for_nobody_is_booked_by_its_reason(checkpoint_folder):
    with served(checkpoint_folder, kv_blocks=9, max_running=2) as here:
        here.runner.hold()
        leaving = here.send_chat(stream=True, max_tokens=50)
        running(here, 1)
        one_step(here)
        leaving.close()
        here.until(lambda: not here.house.serving.jobs)
        here.runner.go()
        here.until(here.idle)
        assert figure(here, "wasted_tokens_total", reason="disconnect") > 10
        here.runner.hold()
        late = here.later(here.chat, "late", max_tokens=50, headers={"X_Request_Deadline_Ms": "400"})
        running(here, 1)
        one_step(here)
        details = late.result().error["details"]
        assert details["completion_tokens"] == settled(here)[-1]["completion_tokens"] > 0
        here.runner.go()
        here.until(here.idle)
        here.runner.hold()
        two = [here.later(here.chat, text, max_tokens=70) for text in ("one", "two")]  # 9 blocks cannot hold both
        running(here, 2)
        here.runner.go()
        assert {one.result().status for one in two} == {200}
        here.runner.faults[f"step {here.runner.steps + 1}"] = RuntimeError("broken")
        assert here.chat("broken").status == 500
        reasons = {one: figure(here, "wasted_tokens_total", reason=one) for one in here.bridge.wasted}
        assert reasons.keys() == {"disconnect", "deadline", "preempt", "engine_error"} and min(reasons.values()) > 0
        assert sum(reasons.values()) == here.bridge.count("computed") - here.bridge.useful
        assert figure(here, "generated_tokens_total") == here.bridge.count("delivered") > 140


def test_how_late_the_event_loop_wakes_is_measured(here):
    before = figure(here, "event_loop_lag_seconds_sum")
    here.server.loop.call_soon_threadsafe(time.sleep, 0.4)
    here.until(lambda: figure(here, "event_loop_lag_seconds_sum") >= before + 0.25)


def test_the_last_500_requests_are_remembered(here):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", here.port, timeout=10)) as connection:
        for i in range(LIVES_KEPT + 3):
            connection.request(
                "POST", "/v1/completions", b"{}", {"content-type": "application/json", "x-request-id": f"r{i}"}
            )
            connection.getresponse().read()
    settled(here)
    assert here.ask("/debug/requests/r2").status == 404
    oldest = here.ask("/debug/requests/r3").json
    assert (oldest["status"], oldest["outcome"], oldest["timelines"]) == (400, "client_error", [])
    assert len(here.house.books.lives.kept) == LIVES_KEPT
    assert [one["id"] for one in here.ask("/debug/requests").json["requests"]][:2] == ["r502", "r501"]


def test_strangers_push_nobody_out_of_what_is_remembered(checkpoint_folder):
    with served(checkpoint_folder, api_key="k") as here:
        assert [here.chat(f"{i}").status for i in range(3)] == [401] * 3
        settled(here)
        assert len(here.house.books.lives.kept) == 1, "the probe"


def test_in_a_flood_no_more_than_a_thousand_refusals_wait_for_their_books(here):
    """Each keeps some memory, and a scrape closes them all at once, while everybody waits."""
    books = here.house.books

    async def flood() -> int:
        for i in range(3 * MOST_LEFT):
            life = Life(time.perf_counter, f"req-flood-{i}", time.perf_counter())
            life.failed("shed_queue", "server_overloaded")
            life.endpoint, life.status = "other", 503
            books.close_later(life)
        return len(books.refused)

    here.received += 3 * MOST_LEFT
    assert asyncio.run_coroutine_threadsafe(flood(), here.server.loop).result(20) == MOST_LEFT
    here.until(lambda: here.outcomes().get("shed_queue") == 3 * MOST_LEFT)


def test_prompts_and_answers_are_logged_where_that_is_wanted_and_shown_to_nobody(checkpoint_folder):
    with served(checkpoint_folder, log_prompts=True) as here:
        reply = here.chat("a secret")
        line = settled(here)[-1]
        assert "a secret" in line["prompt"] and line["answers"] == [reply.json["choices"][0]["message"]["content"]]
        life = here.ask(f"/debug/requests/{reply.headers['x-request-id']}").json
        assert life["prompt_tokens"] > 0 and not life.keys() & {"prompt", "answers"}


def test_a_look_that_fails_is_not_the_last_one(checkpoint_folder, caplog):
    """A door that was shut for lack of memory must open again, even if the files run out for a moment."""
    used: list = [0.5]

    def share() -> float:
        if isinstance(used[0], Exception):
            raise used[0]
        return used[0]

    with served(checkpoint_folder, memory_used=share) as here:
        used[0] = 0.96
        here.until(lambda: here.admission.closed == "memory")
        used[0] = OSError(24, "Too many open files")
        here.until(lambda: "could not look after itself (guard_memory)" in caplog.text)
        used[0] = 0.5
        here.until(lambda: here.admission.closed is None)
        assert here.chat().status == 200


def test_b74_metrics_are_scraped_through_all_of_it_and_never_fall(checkpoint_folder):
    wishes = {"max_running": 2, "max_queued": 1, "stall_after": 0.2, "quarantine_minutes": 0, "breaker": "off"}
    with served(checkpoint_folder, **wishes) as here:
        pages, over = [], threading.Event()

        def scrape() -> None:
            while not over.is_set():
                begin = time.perf_counter()
                page = here.ask("/metrics")
                pages.append((page, time.perf_counter() - begin))

        scraping = here.later(scrape)
        here.runner.pace_s = 0.01
        for i in range(6):
            here.runner.faults[f"step {here.runner.steps + 2 + i}"] = RuntimeError("broken")
            asked = [here.later(here.chat, f"{i} {k}", stream=bool(k % 2)) for k in range(5)]
            here.send_chat(stream=True).close()
            statuses = {one.result().status for one in asked}
            assert statuses <= {200, 500, 503}
        here.runner.faults.clear()  # a step that never came
        here.runner.pace_s = 0.0
        over.set()
        scraping.result()
        assert len(pages) > 5 and all(page.status == 200 for page, _ in pages)
        assert sorted(took for _, took in pages)[len(pages) // 2] < 0.2
        seen: dict[object, float] = {}
        for page, _ in pages:
            for family in text_string_to_metric_families(page.body.decode()):
                for one in family.samples if family.type in ("counter", "histogram") else ():
                    key = (one.name, *sorted(one.labels.items()))
                    assert one.value >= seen.get(key, 0), key
                    seen[key] = one.value
        assert here.bridge.restarts >= 1


def test_the_service_grades_its_own_foretelling(checkpoint_folder):
    with served(checkpoint_folder) as here:
        here.runner.pace_s = 0.2  # a thousand times slower than was measured
        assert here.chat("a", max_tokens=1).status == 200
        line = settled(here)[-1]
        assert line["real_wait"] > 0.19 and line["predicted_wait"] < 0.19
        found = here.ask("/capacity").json["prediction_error"]
        error = (line["real_wait"] - line["predicted_wait"]) / line["real_wait"]
        assert found["requests"] == 2 and found["p90"] == pytest.approx(error, abs=0.01)
        assert figure(here, "admission_prediction_error_ratio_count") == 2
        assert figure(here, "admission_prediction_error_ratio_sum") >= found["p90"] - 0.01
        assert figure(here, "admission_prediction_error_seconds_sum") > 0.1
