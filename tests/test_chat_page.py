"""The chat at /: what a person sees of an answer, of a refusal and of the server; in a real browser."""

import json
import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from html.parser import HTMLParser
from typing import Any

import pytest
from browser import PHONE, READABLE, Tab, tab
from service_kit import END, NAME, PATIENCE_S, served
from test_service_text import ids_of

from service.settings import ServeConfig

pytestmark = pytest.mark.slow

WIDE, NARROW = {"width": 1280, "height": 860}, {"width": 320, "height": 640}
PARAGRAPHS = "One paragraph.\n\nAnother, with a line\nof its own.\n\n```python\nx = 1\n\ny = `x`\n```\nThe end."
PARTS = ["receive", "route", "parse", "admit", "tokenize", "queue", "prefill", "decode", "between", "deliver",
         "unexplained"]  # fmt: skip


@pytest.fixture(scope="module")
def house(checkpoint_folder):
    with served(checkpoint_folder, max_running=2, max_queued=2) as found:
        yield found


@pytest.fixture
def here(house):
    silent, jitter = house.runner.says, house.admission.jitter
    yield house
    house.runner.go()
    house.until(house.idle)
    house.runner.says, house.runner.pace_s, house.admission.jitter = silent, 0.0, jitter
    house.runner.permits = threading.Semaphore(0)  # those that nobody used


def say(here, text: str) -> None:
    """From now on the model answers this, and ends."""
    tokens = ids_of(text)
    here.runner.says = lambda known, prompt: (*tokens, END)[min(len(known) - prompt, len(tokens))]


class Chat:
    """The page in a tab, as a person uses it."""

    def __init__(self, found: Tab, address: str) -> None:
        self.tab, self.page, self.address = found, found.page, address

    def send(self, text: str = "hello") -> None:
        self.page.fill("#box", text)
        self.page.press("#box", "Enter")

    def ended(self, turns: int = 1) -> str:
        """How the last of so many turns ended."""
        self.page.wait_for_selector(f"article:nth-child({turns})[data-ended]")
        return self.page.locator("article").last.get_attribute("data-ended")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).last.inner_text()

    def wait(self, condition: str, given: Any = None) -> None:
        """Until this JavaScript is true. (playwright's own way needs eval(), which the page's policy forbids.)"""
        end = time.monotonic() + PATIENCE_S
        while not self.page.evaluate(condition, given):
            assert time.monotonic() < end, f"waited in vain for {condition}; {self.text('body')}"
            self.page.wait_for_timeout(20)

    def wait_for_answer(self, text: str) -> None:
        self.wait("(text) => [...document.querySelectorAll('.answer')].at(-1)?.textContent === text", text)


@contextmanager
def chat(browser, here, **settings):
    """expected: the status codes that the browser may tell of as errors."""
    expected = settings.pop("expected", ())
    with tab(browser, **{"viewport": WIDE, "locale": "en-US"} | settings) as found:
        address = f"http://127.0.0.1:{here.port}"
        found.page.goto(f"{address}/")
        found.page.wait_for_selector("#now:not([hidden])")
        yield Chat(found, address)
        assert [one for one in found.errors if not any(f"status of {status} " in one for status in expected)] == []
        assert all(one.startswith((f"{address}/", "blob:")) for one in found.asked)


# ---- the files


class Named(HTMLParser):
    """The addresses in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        assert not any(name == "style" or name.startswith("on") for name, _ in attrs), tag


def test_the_page_and_what_it_names_is_there_for_everybody_and_nothing_else_is(house):
    page = house.ask("/")
    assert page.status == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    named = Named(page.body.decode()).addresses
    assert {"/page/page.css", "/page/page.js", "/page/icon.svg"} == set(named)
    types = {house.ask(path).headers["content-type"].partition(";")[0] for path in named}
    assert types == {"text/css", "text/javascript", "image/svg+xml"}
    for path in ("/page", "/page/", "/page/index.html", "/page/words", "/page/../page", "/page/%2e%2e/app"):
        assert house.ask(path).status == 404, path
    assert "/" not in house.ask("/openapi.json").json["paths"]


def test_the_page_is_asked_for_by_get_and_head_and_sent_once(house):
    page, head = house.ask("/"), house.ask("/", method="HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", page.headers["content-length"])
    again = house.ask("/", If_None_Match=f'"other", W/{page.headers["etag"]}')
    assert (again.status, again.body, again.headers["cache-control"]) == (304, b"", "no-cache")
    for path in ("/", "/page/page.js"):
        wrong = house.ask(path, {})
        assert (wrong.status, wrong.error["code"]) == (405, "method_not_allowed")
        assert set(wrong.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_without_the_page_there_is_nothing_at_its_address(checkpoint_folder, monkeypatch):
    assert ServeConfig.from_cli("", []).page and not ServeConfig.from_cli("", ["--no-page"]).page
    monkeypatch.setenv("LLM_INFER_PAGE", "0")
    assert not ServeConfig.from_cli("", []).page
    with served(checkpoint_folder, page=False) as here:
        assert here.ask("/").status == here.ask("/page/page.js").status == 404
        assert here.ask("/health").json["now"]["slots"] == 4


# ---- an answer


def test_an_answer_appears_piece_by_piece_while_the_engine_computes_it(browser, here):
    say(here, "abcdef")
    with chat(browser, here) as one:
        here.runner.hold()
        one.send("What now?")
        assert one.text(".question") == "What now?" and one.page.input_value("#box") == ""
        one.wait("() => document.querySelector('.facts').textContent.includes('waiting for the first token')")
        for known in ("a", "ab", "abc"):
            here.runner.allow(1)
            one.wait_for_answer(known)
        one.wait("() => /TTFT .*3 so far/.test(document.querySelector('.facts').textContent)")
        assert one.text("#send") == "Stop"
        assert one.page.get_attribute(".answer", "aria-busy") == "true"
        clock = one.text(".facts span:first-child")
        one.wait("(then) => document.querySelector('.facts span').textContent !== then", clock)
        one.wait("() => document.querySelector('#slots').textContent === '1 / 2'")
        here.runner.go()
        assert one.ended() == "stop" and one.text(".answer") == "abcdef" and one.text("#send") == "Send"
        assert one.page.get_attribute(".answer", "aria-busy") == "false"
        facts = one.text(".facts")
        assert "7 out" in facts and "finished" in facts and "tokens/s" in facts, "six letters and their end"
        one.wait("() => document.querySelector('#slots').textContent === '0 / 2'")
        assert one.page.title() == NAME


def test_paragraphs_and_code_are_drawn_and_what_a_model_says_stays_text(browser, here):
    evil = '<img src=x onerror="window.hit=1"><script>window.hit=1</script><b>&amp;</b> ![x](http://evil.test/x)'
    with chat(browser, here) as one:
        say(here, PARAGRAPHS)
        one.send(evil)
        one.ended()
        drawn = one.page.locator(".answer > *").evaluate_all("(all) => all.map((e) => [e.localName, e.textContent])")
        assert drawn == [["p", "One paragraph."], ["p", "Another, with a line\nof its own."],
                         ["pre", "x = 1\n\ny = `x`"], ["p", "The end."]]  # fmt: skip
        say(here, evil)
        one.send("again")
        one.ended(2)
        assert one.text(".answer") == evil
        assert one.page.locator("article :is(img, script:not([src]), .question b, .answer b)").count() == 0
        assert one.page.evaluate("window.hit") is None


def test_the_bar_of_the_last_request_adds_up_to_its_time(browser, here):
    here.runner.pace_s = 0.005
    with chat(browser, here) as one:
        one.page.fill("[name=max_tokens]", "8")
        one.send()
        assert one.ended() == "length"
        one.send("more")
        assert one.ended(2) == "length"
        assert one.page.locator("details.split[open]").count() == 1
        last = one.page.locator("details.split").last
        bar = last.locator(".bar").bounding_box()["width"]
        widths = [piece.bounding_box()["width"] for piece in last.locator(".bar span").all()]
        assert sum(widths) == pytest.approx(bar, abs=1) and bar > 300
        rows = last.locator("li").evaluate_all("(all) => all.map((e) => [...e.children].map((c) => c.textContent))")
        assert [name for _, name, *_ in rows] == PARTS
        assert sum(float(share.removesuffix(" %")) for *_, share in rows) == pytest.approx(100, abs=0.6)
        units = {"ms": 1, "s": 1000}
        times = [float(time.split()[0]) * units[time.split()[1]] for _, _, time, _ in rows]
        shown = last.locator("summary").inner_text().split()
        assert sum(times) == pytest.approx(float(shown[2]) * units[shown[3]], rel=0.03)
        for width, time in zip(widths, times, strict=True):
            assert width / bar == pytest.approx(time / sum(times), abs=0.02)
        assert times[PARTS.index("decode")] >= 7 * 5, "seven steps of 5 ms"


def test_a_long_answer_is_drawn_by_the_screen_and_not_by_the_token(browser, here):
    """2,000 pieces that come at once would be 2,000 layouts, were each drawn on its own."""
    pieces = [
        {"choices": [{"index": 0, "delta": {"content": f"word{i} "}, "finish_reason": None}]} for i in range(2000)
    ]
    body = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces)
    with chat(browser, here) as one:
        one.page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
        )
        one.page.evaluate("""() => {
          window.drawn = 0;
          const count = new MutationObserver(() => { window.drawn += 1; });
          count.observe(document.querySelector("#talk"), { subtree: true, characterData: true });
        }""")
        one.send()
        assert one.ended() == "cut", "there was no [DONE]"
        assert one.text(".answer").split() == [f"word{i}" for i in range(2000)]
        assert 1 <= one.page.evaluate("window.drawn") <= 200
        assert "ended before the answer did" in one.text(".notice")


def test_the_page_follows_the_answer_only_for_a_reader_at_its_end(browser, here):
    say(here, "line\n" * 90)
    here.runner.pace_s = 0.002
    lowest = "() => { const e = document.documentElement; return e.scrollHeight - e.clientHeight - e.scrollTop; }"
    with chat(browser, here, viewport={"width": 800, "height": 400}) as one:
        one.send()
        one.wait("() => document.documentElement.scrollTop > 50")
        one.page.evaluate("document.documentElement.scrollTop = 10")
        one.ended()
        assert one.page.evaluate("document.documentElement.scrollTop") == 10
        say(here, "short")
        one.send("more")
        one.ended(2)
        assert one.page.evaluate(lowest) < 2


# ---- stopping, keys, settings


def test_stopping_frees_the_slot_and_what_came_stays(browser, here):
    here.runner.pace_s = 0.01
    before = here.outcomes().get("cancelled", 0)
    with chat(browser, here, expected=(404,)) as one:  # its books may take a while
        for turns, stop in ((1, lambda: one.page.keyboard.press("Escape")), (2, lambda: one.page.click("#send"))):
            one.page.fill("#box", "hello")
            one.page.dblclick("#send")  # the second click is none for Stop
            one.wait("(n) => document.querySelectorAll('.answer')[n - 1]?.textContent.length > 3", turns)
            stop()
            assert one.ended(turns) == "stopped"
            here.until(here.idle, "for the slot")
        here.until(lambda: here.outcomes().get("cancelled", 0) == before + 2)
        assert len(one.text(".answer")) > 3 and one.page.locator("#box").evaluate("(e) => e === document.activeElement")
        one.page.locator("details.split").last.wait_for(state="visible")  # from the server's own memory
        assert one.page.locator("details.split").last.locator("li").count() == len(PARTS)


@pytest.mark.parametrize("clicks", [1, 2])
def test_stop_sends_no_draft(browser, here, clicks: int):
    here.runner.pace_s = 0.01
    with chat(browser, here, expected=(404,)) as one:
        one.send()
        one.wait("() => document.querySelector('.answer')?.textContent.length > 3")
        one.page.fill("#box", "a draft")
        one.page.click("#send", click_count=clicks)
        assert one.ended() == "stopped" and one.page.input_value("#box") == "a draft"
        assert one.page.locator("article").count() == 1


def test_the_token_that_ends_an_answer_takes_its_time_too(browser, here):
    """Two letters and an end are three tokens, with two gaps of a tenth of a second between them."""
    say(here, "ab")
    here.runner.pace_s = 0.1
    with chat(browser, here) as one:
        one.send()
        assert one.ended() == "stop" and "3 out" in one.text(".facts")
        assert float(re.search(r"([\d.]+) tokens/s", one.text(".facts"))[1]) < 15


def test_enter_sends_unless_shift_or_an_input_method_needs_it(browser, here):
    with chat(browser, here) as one:
        one.page.fill("[name=max_tokens]", "2")
        one.page.focus("#box")
        one.page.keyboard.type("one")
        one.page.keyboard.press("Shift+Enter")
        one.page.keyboard.type("two")
        assert one.page.input_value("#box") == "one\ntwo" and one.page.locator("article").count() == 0
        composing = one.page.context.new_cdp_session(one.page)
        one.page.fill("#box", "")
        composing.send("Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2})
        one.page.keyboard.press("Enter")
        assert one.page.locator("article").count() == 0, "that Enter chose a character"
        composing.send("Input.insertText", {"text": "你好"})
        one.page.keyboard.press("Enter")
        assert one.ended() == "length" and one.text(".question") == "你好"


def test_keys_find_the_box_edit_the_last_message_and_leave_it(browser, here):
    with chat(browser, here) as one:
        one.page.fill("[name=max_tokens]", "2")
        one.send("first")
        one.ended()
        one.page.locator("#clear").focus()
        one.page.keyboard.press("Shift+Tab")
        assert one.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        one.page.keyboard.press("/")
        one.page.keyboard.press("ArrowUp")
        assert one.page.input_value("#box") == "first" and "Editing" in one.text("#hint")
        one.page.keyboard.press("Escape")
        assert one.page.input_value("#box") == "" and "Editing" not in one.text("#hint")
        one.page.keyboard.press("ArrowUp")
        one.send("second")
        one.ended()
        assert one.page.locator(".question").all_inner_texts() == ["second"]
        one.page.click(".again")
        one.wait("() => document.querySelectorAll('article').length === 1")
        one.ended()
        one.page.click("#clear")
        assert one.page.locator("article").count() == 0 and one.page.locator("#empty").is_visible()


def test_settings_go_along_and_the_curl_line_asks_the_same(browser, here):
    with chat(browser, here) as one:
        for name, value in (("system", "It's brief."), ("temperature", "0"), ("max_tokens", "3"), ("seed", "7")):
            one.page.fill(f"[name={name}]", value)
        with one.page.expect_request("**/v1/chat/completions") as asked:
            one.send("what's up")
        sent = asked.value.post_data_json
        assert sent["messages"] == [
            {"role": "system", "content": "It's brief."},
            {"role": "user", "content": "what's up"},
        ]
        assert (sent["temperature"], sent["max_tokens"], sent["seed"], sent["model"]) == (0, 3, 7, NAME)
        one.ended()
        one.page.click("#as-curl")
        line = one.text("#sheet pre")
        one.page.keyboard.press("Escape")
        if shutil.which("curl"):
            told = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=20).stdout
            texts = [json.loads(one[6:]) for one in told.splitlines() if one.startswith("data: {")]
            said = "".join(piece["delta"].get("content", "") for event in texts for piece in event["choices"])
            assert said == one.text(".answer") and told.rstrip().endswith("[DONE]")
        with one.page.expect_download() as download:
            one.page.click("#as-json")
        saved = json.loads(download.value.path().read_text())
        assert saved["turns"][0]["question"] == "what's up" and saved["settings"] | {"seed": 7} == saved["settings"]
        one.page.click(".facts a")
        one.page.wait_for_selector("#sheet[open]")
        assert json.loads(one.text("#sheet pre"))["completion_tokens"] == 3
        one.page.click("#sheet .close")
        one.page.reload()
        assert one.page.input_value("[name=seed]") == "7"


# ---- what goes wrong


def test_a_refusal_says_why_counts_down_and_can_be_sent_again(browser, here):
    here.admission.jitter = lambda: 6.0  # three seconds at least
    with chat(browser, here, expected=(503,)) as one:
        here.runner.hold()
        inside = [here.later(here.chat, f"number {i}") for i in range(4)]
        here.until(lambda: here.admission.answers == 4)
        one.send()
        assert one.ended() == "refused"
        assert one.text(".notice span").startswith("The server is full: it holds 4 requests")
        button = one.page.locator(".notice button")
        assert button.is_disabled() and button.inner_text().startswith("Send again in ")
        one.wait("() => document.querySelector('#status').textContent === 'full'")
        here.runner.go()
        assert {later.result().status for later in inside} == {200}
        one.wait("() => !document.querySelector('.notice button').disabled")
        assert button.inner_text() == "Send again"
        button.click()
        one.wait("() => document.querySelector('article[data-ended=length], article[data-ended=stop]')")
        assert one.page.locator(".notice:visible").count() == 0 and one.page.locator("article").count() == 1


def test_a_rate_limit_and_a_prompt_that_is_too_long_are_told_in_the_servers_words(browser, here, monkeypatch):
    with chat(browser, here, expected=(400, 429)) as one:
        monkeypatch.setitem(here.house.serving.limits.most, "requests", 1)
        one.page.fill("[name=max_tokens]", "2")
        one.send()
        one.ended()
        one.send("at once")
        assert one.ended(2) == "refused" and "rate_limit_exceeded" in one.text(".notice")
        assert one.page.locator(".notice button").last.is_disabled()
        monkeypatch.undo()
        one.send("word " * 200)
        assert one.ended(3) == "refused" and "context_length_exceeded" in one.text(".notice")
        assert one.page.locator("article:last-child .notice button").count() == 0, "once more would not help"
        assert one.page.locator(".notice button:visible").count() == 0, "and of what is past nothing is sent again"


def test_a_key_is_asked_for_works_and_is_kept_in_the_tab_only(browser, checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the page is found from anywhere
    with served(checkpoint_folder, api_key="sk-mine") as locked, chat(browser, locked, expected=(401,)) as one:
        one.wait("() => document.activeElement.name === 'key'")
        assert "API key" in one.text("#empty")
        one.send("let me in")
        assert one.ended() == "refused" and "asks for an API key" in one.text(".notice")
        for key in ("wrong", "sk-mine"):
            one.page.fill("[name=key]", key)
            one.page.press("[name=key]", "Enter")
            one.wait(
                "(then) => document.querySelector('.notice').textContent.includes('not known') === then", key == "wrong"
            )
        one.wait("() => document.querySelector('article').dataset.ended?.match(/stop|length/)")
        assert one.text("#model") == NAME
        one.page.click(".facts a")
        one.page.wait_for_selector("#sheet[open]")
        assert json.loads(one.text("#sheet pre"))["outcome"] == "ok", "the key goes along"
        kept = one.page.evaluate(
            "() => [Object.values({ ...localStorage }), Object.values({ ...sessionStorage }), document.cookie]"
        )
        assert kept[0] == [] and "sk-mine" in kept[1][0] and kept[2] == ""
        one.page.click("#sheet .close")
        one.page.click("#as-curl")
        assert "$LLM_INFER_API_KEY" in one.text("#sheet pre") and "sk-mine" not in one.text("#sheet pre")


def test_an_error_in_the_middle_is_shown_and_what_came_stays(browser, here):
    say(here, "abcdefgh")
    with chat(browser, here, expected=(404,)) as one:
        here.runner.hold()
        one.send()
        job = here.until(lambda: here.jobs and here.jobs[0])
        here.runner.allow(3)
        one.wait_for_answer("abc")
        here.runner.faults[job.answers[0].request.number] = RuntimeError("one bad sampler")
        here.runner.go()
        assert one.ended() == "failed" and one.text(".answer").startswith("abc")
        assert "engine_error" in one.text(".notice") and "one bad sampler" not in one.text(".notice")
        assert one.page.locator(".notice button").is_enabled()
        here.runner.faults.clear()


def test_a_balancer_that_speaks_for_nobody_is_no_server(browser, here):
    told = json.dumps({"error": {"message": "No replica is there.", "code": "no_replica"}})
    with chat(browser, here, expected=(503,)) as one:
        one.page.route("**/health", lambda route: route.fulfill(status=503, content_type="application/json", body=told))
        one.wait("() => document.querySelector('#status').textContent === 'unreachable'")
        one.page.unroute("**/health")
        one.wait("() => document.querySelector('#status').textContent === 'ready'")


def test_a_server_that_has_gone_is_said_to_be_unreachable(browser, here):
    with chat(browser, here) as one:
        one.page.context.set_offline(True)
        one.wait("() => document.querySelector('#status').textContent === 'unreachable'")
        one.send()
        assert one.ended() == "unreachable" and "cannot be reached" in one.text(".notice")
        one.page.context.set_offline(False)
        one.page.click(".notice button")
        one.wait("() => document.querySelector('article').dataset.ended?.match(/stop|length/)")
        one.tab.errors.clear()  # the browser's own lines about having no network


def test_an_answer_that_is_degraded_or_was_kept_is_marked(browser, checkpoint_folder):
    def lesser(route):
        answer = route.fetch()
        route.fulfill(response=answer, headers=answer.headers | {"x-degraded": "max_tokens=2"})

    with served(checkpoint_folder, result_cache_bytes=100_000) as own, chat(browser, own) as one:
        for name, value in (("temperature", "0"), ("max_tokens", "2")):
            one.page.fill(f"[name={name}]", value)
        one.send()
        one.ended()
        assert one.page.locator(".facts b").all_inner_texts() == ["result cache: miss"]
        first = one.text(".answer")
        one.page.click(".again")
        one.wait("() => document.querySelector('.facts b')?.textContent === 'result cache: hit'")
        one.ended()
        assert one.text(".answer") == first and "cache" in one.text("details.split ul")
        one.page.route("**/v1/chat/completions", lesser)
        one.page.fill("[name=temperature]", "1")
        one.send("another")
        one.ended(2)
        assert one.page.locator(".facts b").all_inner_texts()[1:] == ["degraded: max_tokens=2"]


# ---- how it looks


@pytest.mark.parametrize("size, scheme", [(WIDE, "light"), (WIDE, "dark"), (PHONE, "dark"), (NARROW, "light")])
def test_it_fits_every_screen_and_can_be_read_in_both_schemes(browser, here, size, scheme):
    say(here, "w" * 60 + "\n\n```\n" + "c" * 90 + "\n```\nend")
    with chat(browser, here, viewport=size, color_scheme=scheme, expected=(503,)) as one:
        looks = [one.tab.least_contrast()]
        one.send("q" * 100)
        assert one.ended() == "stop"
        looks.append(one.tab.least_contrast())
        assert one.tab.overflow_px == 0
        here.runner.hold()
        inside = [here.later(here.chat, f"number {i}") for i in range(4)]
        here.until(lambda: here.admission.answers == 4)
        one.send()
        assert one.ended(2) == "refused"
        if size is not WIDE:
            one.page.click("#show-settings")
        looks.append(one.tab.least_contrast())
        assert one.tab.overflow_px == 0
        here.runner.go()
        [later.result() for later in inside]
        box = one.page.locator("#composer").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= size["height"], "the box is in sight"
        one.page.click("#show-help")
        looks.append(one.tab.least_contrast())
        assert all(look["ratio"] >= READABLE for look in looks), looks


UNNAMED = """() => [...document.querySelectorAll("button, input, textarea")].filter((one) =>
  !(one.labels?.length ? one.labels[0].textContent : one.textContent).trim()).map((one) => one.outerHTML)"""


def test_chinese_is_spoken_where_the_browser_does_and_both_know_the_same_words(browser, here):
    with chat(browser, here, locale="zh-CN") as one:
        assert one.text("#send") == "发送" and one.page.get_attribute("html", "lang") == "zh"
        assert one.page.evaluate(UNNAMED) == []
        keys = one.page.evaluate(
            "import('/page/words.js').then(({ LANGUAGES: all }) => Object.values(all).map(Object.keys))"
        )
        assert keys[0] == keys[1]


def test_without_javascript_a_sentence_says_so(browser, here):
    with tab(browser, java_script_enabled=False) as found:
        found.page.goto(f"http://127.0.0.1:{here.port}/")
        assert "needs JavaScript" in found.page.locator("noscript").inner_text()


def test_the_server_is_asked_how_full_it_is_only_while_somebody_looks(browser, here):
    with chat(browser, here) as one:

        def polls() -> int:
            return sum(address.endswith("/health") for address in one.tab.asked)

        one.page.evaluate("() => { Object.defineProperty(document, 'visibilityState', { get: () => window.seen, "
                          "configurable: true }); window.seen = 'hidden'; "
                          "document.dispatchEvent(new Event('visibilitychange')); }")  # fmt: skip
        one.page.wait_for_timeout(200)
        before = polls()
        one.page.wait_for_timeout(1500)
        assert polls() == before
        one.page.evaluate("() => { window.seen = 'visible'; document.dispatchEvent(new Event('visibilitychange')); }")
        one.page.wait_for_timeout(200)
        assert polls() > before


# ---- the pure parts


def test_events_are_the_same_wherever_their_bytes_are_cut(browser, here):
    stream = (
        ': sign of life\r\n\r\ndata: one\r\n\r\ndata: two\ndata:lines\n\nid: 7\ndata\n\rdata: {"a": 1}\r\rdata: late'
    )
    program = """(stream) => import("/page/stream.js").then(({ EventParser }) => {
      const parsed = (pieces) => {
        const parser = new EventParser();
        return pieces.flatMap((piece) => parser.push(piece));
      };
      const cuts = [...stream].map((_, i) => parsed([stream.slice(0, i), stream.slice(i)]));
      return [parsed([stream]), parsed([...stream]), ...cuts];
    })"""
    with chat(browser, here) as one:
        found = one.page.evaluate(program, stream)
        assert found[0] == ["one", "two\nlines", "", '{"a": 1}']
        assert all(other == found[0] for other in found)


def test_text_is_drawn_the_same_wherever_it_is_cut(browser, here):
    texts = [
        PARAGRAPHS,
        "``` \na ``` b\n```",
        "`` no fence",
        "a\n\n\n  ```js\n\nx\n\n```\n\nb\n",
        "```",
        "```unclosed\nx",
    ]
    program = """(text) => import("/page/draw.js").then(({ TextDrawing }) => {
      const drawn = (pieces) => {
        const root = document.createElement("div"), drawing = new TextDrawing(root);
        for (const piece of pieces) drawing.add(piece);
        drawing.end();
        return root.innerHTML;
      };
      return [drawn([text]), drawn([...text]), ...[...text].map((_, i) => drawn([text.slice(0, i), text.slice(i)]))];
    })"""
    with chat(browser, here) as one:
        for text in texts:
            found = one.page.evaluate(program, text)
            assert set(found) == {found[0]}, text
        assert one.page.evaluate(program, texts[2])[0] == "<p>`` no fence</p>"
        assert '<pre tabindex="0">\nx</pre>' in one.page.evaluate(program, texts[3])[0]


def test_figures_are_written_for_people_and_a_split_is_whole(browser, here):
    timing = {"total": 1.0, "decode": 0.7, "prefill": 0.2, "new_part": 0.1, "unexplained": -1e-6}
    program = """(timing) => import("/page/figures.js").then(({ duration, roughly, splitOf, timingOf, quoted }) => [
      [0, 0.00123, 0.0456, 0.7, 0.9999, 3.14159, 42.42, 75].map(duration), [0.0123, 0.9, 3.14, 29.6, 90].map(roughly),
      splitOf(timing), timingOf({ t_decode: 1, t_total: 2, t_send_blocked: 3, status: 200 }), quoted("it's"),
    ])"""
    with chat(browser, here) as one:
        exact, rough, split, facts, word = one.page.evaluate(program, timing)
        assert exact == ["0 ms", "1.23 ms", "45.6 ms", "700 ms", "1.00 s", "3.14 s", "42.4 s", "1 min 15 s"]
        assert rough == ["12 ms", "900 ms", "3.1 s", "30 s", "1 min 30 s"]
        assert [part["name"] for part in split["parts"]] == ["prefill", "decode", "new_part", "unexplained"]
        assert sum(part["share"] for part in split["parts"]) == pytest.approx(1) and split["parts"][-1]["seconds"] == 0
        assert facts == {"decode": 1, "total": 2} and word == "'it'\\''s'"
