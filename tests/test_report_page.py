"""The page: what it shows of known records, what it escapes, and that it asks nobody for anything."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import PHONE, READABLE, tab
from load_records import record, run

import report
from config import UserError
from lab import load_runs, report_page
from lab.records import append_line

pytestmark = pytest.mark.slow

EVIL = '<script>alert("x")</script>|$_{![x](http://evil.test/x)\x1b[31m'


class Reader(HTMLParser):
    """Which tags stand open at the end, which addresses are named, and the text outside of style."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def sweep(number: int = 1, **more) -> dict:
    runs = [run(level, ttft=0.1 * level, tpot=0.02 + 0.01 * level) for level in (1, 2, 4, 8) for _ in range(6)]
    return record(runs, number, **more)


def saved(folder: Path, *records: dict) -> list[str]:
    for one in records:
        append_line(folder / "results" / "load_test.jsonl", one)
    (folder / "notes.md").write_text("# Notes\n")
    return ["--notes-file", str(folder / "notes.md")]


def test_the_page_is_whole_asks_nobody_and_shows_every_part(tmp_path: Path):
    assert report.main([*saved(tmp_path, sweep(1), sweep(2)), "--machine-price", "1.2"]) == 0
    page = (tmp_path / "results" / "report.html").read_text()
    reader = read(page)
    assert reader.open == []
    assert all(address.startswith("#") for address in reader.addresses)
    assert not re.search(r"@import|url\((?!#)", page)
    assert reader.tags.count("svg") == 5 and "script" not in reader.tags
    words = " ".join(reader.words)
    for part in ("Throughput and latency", "TTFT, TPOT and E2E", "frontier", "requests of one run", "Baseline against",
                 "Cost per 1,000", "What this rests on", "WITHIN NOISE"):  # fmt: skip
        assert part in words
    written = (tmp_path / "results" / "report.md").read_text()
    assert "load_test-261122-000002" in written and "## Cost per 1,000 tokens" in written


def test_what_a_record_says_is_text_and_never_a_tag(tmp_path: Path):
    evil = sweep(2, command=EVIL, verdicts=[EVIL])
    evil["server"] |= {"model": EVIL, "url": EVIL}
    evil["card"]["CPU"] = EVIL
    for one in evil["runs"]:
        one["load"]["prompt_tokens"] = EVIL
    report.main([*saved(tmp_path, sweep(1), evil), "--out", str(tmp_path / "there")])
    page = (tmp_path / "there" / "report.html").read_text()
    reader = read(page)
    assert "script" not in reader.tags and reader.open == []
    assert EVIL in "".join(reader.words)
    written = (tmp_path / "there" / "report.md").read_text()
    assert "<script>" not in written and "&lt;script&gt;" in written
    assert "](http" not in written and "\x1b" not in written


def test_the_knee_has_the_greatest_throughput_for_its_latency():
    assert report_page.knee_of([(10, 1.0), (18, 1.2), (20, 2.0)]) == 1  # 10, 15, 10
    assert report_page.knee_of([(10, 1.0), (18, 1.2)]) is None


def test_costs_are_split_by_the_measured_time_of_the_stages():
    """One request at a time: 0.19 s of prefill and 31 × 0.05 s of decode; 3.6 an hour is a thousandth a second."""
    one = run(1, ttft=0.201, tpot=0.05, queue=0.01, count=4)
    prefill, decode = 0.201 - 0.001 - 0.01, 31 * 0.05
    assert load_runs.stage_seconds(one) == pytest.approx((4 * prefill, 4 * decode))
    cost_in, cost_out = load_runs.cost_per_1k(one, 3.6)
    seconds = 4 * (0.201 + decode)
    share = prefill / (prefill + decode)
    assert cost_in == pytest.approx(seconds * 0.001 * share / (4 * 128) * 1000)
    assert cost_out == pytest.approx(seconds * 0.001 * (1 - share) / (4 * 32) * 1000)


def test_without_the_queue_all_costs_go_to_the_output_and_the_page_says_so(tmp_path: Path):
    one = run(1, queue=None)
    assert load_runs.cost_per_1k(one, 3.6)[0] is None
    report.main([*saved(tmp_path, record([one])), "--machine-price", "3.6"])
    assert "all is charged to the output" in (tmp_path / "results" / "report.md").read_text()
    assert "Give --machine-price" not in (tmp_path / "results" / "report.md").read_text()


def test_uncertified_percentiles_carry_a_star(tmp_path: Path):
    report.main(saved(tmp_path, record([run(count=8), run(8, count=80)])))
    written = (tmp_path / "results" / "report.md").read_text()
    rows = [line for line in written.split("\n") if line.startswith(("| 4 at once", "| 8 at once"))]
    small = next(line for line in rows if line.startswith("| 4 at once") and "*" in line)
    large = next(line for line in rows if line.startswith("| 8 at once") and "*" in line)
    assert small.count("*") == 4  # eight samples certify nothing
    assert large.count("*") == 2  # eighty certify p50 and p90


def test_two_factors_are_named_in_the_comparison(tmp_path: Path):
    card = {**record([])["card"], "CPU": "another", "Versions": "Python 3.12"}
    report.main(saved(tmp_path, sweep(1), sweep(2, card=card)))
    written = (tmp_path / "results" / "report.md").read_text()
    assert "more than one factor differs" in written and "CPU (a processor → another)" in written


def test_open_and_closed_loops_have_pictures_of_their_own(tmp_path: Path):
    rates = [run(rate=rate, kind="open", arrival="poisson") for rate in (1.0, 2.0)]
    report.main(saved(tmp_path, record([run(1), run(4), *rates])))
    page = (tmp_path / "results" / "report.html").read_text()
    assert "Against requests at once" in page and "Against requests/s" in page


def test_a_run_in_which_everything_failed_leaves_a_page(tmp_path: Path):
    failed = run()
    for request in failed["requests"]:
        request |= {"ok": False, "chunks": [], "status": 503, "error": "refused: no place"}
    rates = ("output_tokens_per_s", "requests_per_s", "prompt_tokens_per_s", "mean_in_flight")
    failed["figures"] |= dict.fromkeys(("ttft_s", "tpot_s", "itl_s", "e2e_s", *rates))
    failed["laws"] = None
    assert report.main([*saved(tmp_path, record([failed])), "--machine-price", "1"]) == 0
    assert read((tmp_path / "results" / "report.html").read_text()).open == []


def test_nothing_measured_is_a_sentence_that_says_what_to_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"load_test\.py"):
        report.main(saved(tmp_path))


def test_a_baseline_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="begins with"):
        report.main([*saved(tmp_path, sweep()), "--baseline", "nothing"])


def test_the_model_is_told_in_words_whatever_the_server_tells():
    told = {"name": "SmolLM2", "weights": "exact", "hash": "1e25", "kept": {"int4": 1}}
    assert report_page.model_words(told) == "SmolLM2 (weights exact; hash 1e25)"
    assert (report_page.model_words("gpt"), report_page.model_words(None)) == ("gpt", "unknown")


# ---- in a browser

CUT_LINES = """() => [...document.querySelectorAll("figure svg path[clip-path]")].filter((line) => {
  const id = line.getAttribute("clip-path").slice(4, -1);
  const room = document.querySelector(`${id} rect`).getBBox(), box = line.getBBox();
  return box.y < room.y - 1 || box.y + box.height > room.y + room.height + 1;
}).length"""


@pytest.fixture
def address(tmp_path: Path) -> str:
    slower = sweep(2)
    for one in slower["runs"]:
        one["figures"]["e2e_s"]["p99"] *= 4  # a tail far above the medians
    report.main([*saved(tmp_path, sweep(1), slower), "--machine-price", "1.2"])
    return (tmp_path / "results" / "report.html").as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{"width": 1200, "height": 900}, PHONE])
def test_a_browser_shows_the_page_whole_and_asks_nobody(browser, address: str, scheme: str, size: dict):
    """The p99 line ran out of its drawing: the upper end was fixed before that line was drawn."""
    with tab(browser, viewport=size, color_scheme=scheme) as found:
        found.page.goto(address)
        assert found.errors == [] and found.asked == [address]
        assert found.overflow_px == 0
        drawings = [one.bounding_box() for one in found.page.locator("figure svg:not(.broad)").all()]
        assert len(drawings) == 4 and found.page.locator("svg.broad").bounding_box()["width"] > 600
        assert all(box["width"] > 300 and box["height"] > 100 and box["x"] >= 0 for box in drawings)
        assert all(box["x"] + box["width"] <= size["width"] for box in drawings)
        assert found.page.evaluate(CUT_LINES) == 0
        assert found.least_contrast()["ratio"] >= READABLE, found.least_contrast()


def test_no_table_is_cut_on_a_screen_a_phone_or_paper(browser, address: str):
    hidden = (
        "(all) => all.filter((one) => one.scrollWidth > one.clientWidth).map((one) => getComputedStyle(one).overflowX)"
    )
    with tab(browser, viewport={"width": 1200, "height": 900}) as found:
        found.page.goto(address)
        assert found.page.locator(".wide").evaluate_all(hidden) == []  # all there at once
        found.page.set_viewport_size(PHONE)
        assert set(found.page.locator(".wide").evaluate_all(hidden)) <= {"auto"}  # can be pushed
        found.page.set_viewport_size({"width": 700, "height": 1000})  # A4 between its margins, at 96 dots an inch
        found.page.emulate_media(media="print")
        assert found.overflow_px == 0 and found.page.locator(".wide").evaluate_all(hidden) == []
