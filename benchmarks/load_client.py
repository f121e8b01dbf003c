"""What the load generator can do itself: how many pieces and requests, how punctual, how exact."""

from benchmarks.claim import Claim
from config import PromptConfig
from lab import arrivals
from lab.client import Body, Client
from load import ceiling, drive, golden, selfcheck
from load.drive import Ran
from load.measures import figures, measured
from load.script import MODEL, Script

FLYING, RATE, NEW = 1_200, 50, 32


def claims(config: PromptConfig) -> list[Claim]:
    most = ceiling.measure()
    least = "at least " if most["at_least"] else ""
    return [
        Claim("streamed pieces that the load generator takes", "≥ 5,000 a second",
              f"{least}{most['pieces_per_s']:,.0f} a second, each by itself; "
              f"{most['requests_per_s']:,.0f} short answers",
              most["pieces_per_s"] >= 5_000),
        flying_claim(), punctual_claim(config), *exact_claims(),
    ]  # fmt: skip


def bodies(count: int) -> list[Body]:
    return [{"model": MODEL, "prompt": "x", "max_tokens": NEW, "stream": True,
             "stream_options": {"include_usage": True}}] * count  # fmt: skip


def flying_claim() -> Claim:
    """Answers that take longer than it takes to send them all."""
    with golden.started(Script(first_s=5.0, gap_s=0.02)) as server:
        ran = sent(server.url, FLYING, [i / 600 for i in range(FLYING)])
    highest = max(flying for _, flying in ran.samples)
    whole = sum(one["ok"] for one in measured(ran.traces, ran.start_s))
    return Claim(
        "requests in flight at once", "≥ 1,000", f"{highest:,}; {whole:,} of {FLYING:,} answered whole",
        highest >= 1_000 and whole == FLYING,
    )  # fmt: skip


def punctual_claim(config: PromptConfig) -> Claim:
    count = 200 if config.quick else 1_000
    with golden.started(Script(first_s=0.1, gap_s=0.02)) as server:
        ran = sent(server.url, count, arrivals.schedule("poisson", count, RATE, config.seed))
    requests = measured(ran.traces, ran.start_s)
    late = figures(requests, {"begin": 0.0, "end": ran.end_s - ran.start_s})["schedule_delay_s"]
    share = ran.cpu_s / (ran.end_s - ran.start_s)
    return Claim(
        f"how late requests leave, at {RATE}/s of {NEW} tokens", "p99 < 10 ms",
        f"p50 {late['p50'] * 1e3:.2f} ms, p99 {late['p99'] * 1e3:.2f} ms of {late['n']}; {share:.0%} of a core",
        late["p99"] < 0.01,
    )  # fmt: skip


def sent(url: str, count: int, dues_s: list[float]) -> Ran:
    return drive.opened(Client(url + "/v1/completions"), bodies(count), dues_s)


def exact_claims() -> list[Claim]:
    found = []
    for name, way in (("closed", selfcheck.closed), ("open", selfcheck.opened)):
        rows = selfcheck.check(way)
        off = [row for row in rows if not row.holds]
        worst = max(abs(row.difference or 0.0) for row in rows if not row.rate)
        found.append(Claim(
            f"reported against what golden servers did, {name} loop", "all within 1 ms or 1 %",
            f"{len(rows) - len(off)} of {len(rows)}; the times at most {worst * 1e3:.2f} ms off", not off,
        ))  # fmt: skip
    return found
