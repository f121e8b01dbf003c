"""The conformance card: what this service does in each of the 74 cases of its fault matrix, and what others do.

Two ways to look. The card of this kit's own service comes from its tests, which hold the engine, break it and look
inside: a case passes when all tests of its number pass. Any server can be looked at from outside, over HTTP: every case
that can be seen that way is sent to it, and what comes back is judged twice, as the matrix has it, and whether it is
safe (no 5xx for a client's mistake, no crash, no hang, others served as before). This service is asked the same way, so
that servers are compared like with like.

    make conformance                                            # both, with every server that is installed here
    python3 -m conformance --suite                              # the card alone, some minutes
    python3 -m conformance --start llama-server                 # one server from outside: ours, transformers,
                                                                # transformers-cb, llama-server
    python3 -m conformance --url http://127.0.0.1:8000 --name mine
    python3 -m conformance --start ours --cases 13,44,61

Others are installed by benchmarks/peers/install.sh llama_cpp transformers_serve. The exit status is 0 when no case of
this service fails or lacks a test and every server starts, else 1.
"""

from config import SERVE_PACKAGES, Recorded, UserError, check_packages, knob, listed

if __name__ == "__main__":
    check_packages("pytest", *SERVE_PACKAGES, target="test", requirements="requirements-dev.txt")

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from conformance import servers, suite, tables
from conformance.judge import Kind, Verdict
from conformance.look import Looks
from conformance.matrix import cases
from conformance.suite import Found, Outcome
from conformance.target import Target
from lab import console, records
from lab.card import machine_card
from lab.request_tables import card_table

QUESTION = "What does the service do with faults and bad input, and what do others?"
MODEL = {"name": "SmolLM2-135M-Instruct", "dtype": "as each server keeps it", "device": "cpu", "origin": "embedded",
         "hash": "–"}  # fmt: skip


@dataclass(frozen=True)
class ConformanceConfig(Recorded):
    suite: bool = knob(False, "only the card from this kit's own tests")
    start: str | None = knob(None, "only this server from outside, started here", choices=tuple(servers.STARTS))
    url: str | None = knob(None, "only the server at this address from outside, without /v1")
    name: str | None = knob(None, "what to call the server at --url")
    model: str | None = knob(None, "the model's name at --url; by default the first that it lists")
    api_key: str | None = knob(None, "a key for --url", env="LLM_INFER_API_KEY", secret=True)
    quick: bool = knob(False, "a first look: with a random model of next to nothing; this leaves out llama-server")
    cases: str = knob("all", "only these cases, such as 1,2,44", metavar="N,N")

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = [
            flag for flag, value in (("--suite", self.suite), ("--start", self.start), ("--url", self.url)) if value
        ]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} are different looks: give one of them, or none for all.")
        if self.name and not self.url:
            raise UserError("--name names the server at --url: give both.")

    @property
    def numbers(self) -> set[int] | None:
        """UserError."""
        return None if self.cases == "all" else set(listed(self.cases, "--cases", most=len(cases())))


def main(argv: list[str] | None = None) -> int:
    config = ConformanceConfig.from_cli(__doc__, argv)
    records.check_writable(config, "conformance")
    wanted, begin = config.numbers, time.monotonic()
    machine, page = machine_card(), console.Page(silent=config.json == "-")
    record = records.new_record("conformance", QUESTION, config, machine)
    page.show("# Conformance: 74 things that go wrong\n\n" + card_table(machine), keep=False)
    every = starts(config)
    mine: dict[int, Found] = {}
    looked: dict[str, dict[int, Verdict]] = {}
    lost: list[str] = []  # why a server is not looked at
    try:
        if not (config.start or config.url):
            mine = own_card(wanted)
        for start, again in every:
            try:
                look_at(start, again, wanted, looked)
            except UserError as why:
                lost.append(str(why))
    except KeyboardInterrupt:
        record["partial"] = True
    if lost and not (mine or looked):
        raise UserError(" ".join(lost))
    record |= described(config, mine, looked) | {"took_s": time.monotonic() - begin}
    record["verdicts"] += lost
    status = console.conclude(config, record, page, sections(mine, looked))
    failed = any(one.outcome in (Outcome.FAIL, Outcome.MISSING) for one in mine.values())
    return status or int(failed or bool(lost))


def own_card(wanted: set[int] | None) -> dict[int, Found]:
    found = suite.card(suite.run(wanted))
    return found if wanted is None else {number: found[number] for number in sorted(wanted)}


def look_at(
    start: Callable[[], Target], again: bool, wanted: set[int] | None, looked: dict[str, dict[int, Verdict]]
) -> None:
    """Its verdicts go into looked: after Ctrl-C those that there are. UserError."""
    looks = Looks(start, again)
    try:
        looks.all(wanted)
    finally:
        looked[looks.target.name] = looks.known(wanted)


def starts(config: ConformanceConfig) -> list[tuple[Callable[[], Target], bool]]:
    """What starts each server that is looked at, and whether it can be started again. Says what is left out."""
    if config.suite:
        return []
    if config.url:
        return [(lambda: servers.at(config.url or "", config.name, config.model, config.api_key), False)]
    model = servers.weights(config.quick)
    names = (config.start,) if config.start else tuple(servers.STARTS)
    lacks = {name: servers.lacking(name, model) for name in names}
    if config.start and lacks[config.start]:
        raise UserError(lacks[config.start])
    for sentence in lacks.values():
        console.warn(sentence)
    return [(lambda start=servers.STARTS[name]: start(model), True) for name in names if lacks[name] is None]


def sections(mine: dict[int, Found], looked: dict[str, dict[int, Verdict]]) -> list[str]:
    found = []
    if mine:
        found += ["### This service, by its own tests", tables.suite_card(mine), tables.suite_rest(mine)]
    if looked:
        found += ["### From outside, over HTTP", tables.looks_totals(looked), tables.looks_card(looked)]
        found += [tables.looks_rest(server, verdicts) for server, verdicts in looked.items()]
        found += [tables.unseen_reasons(looked)]
    return [section for section in found if section]


def described(
    config: ConformanceConfig, mine: dict[int, Found], looked: dict[str, dict[int, Verdict]]
) -> dict[str, Any]:
    """The parts of the record that are this script's."""
    verdicts = []
    if mine:
        passed = sum(one.outcome == Outcome.PASS for one in mine.values())
        verdicts.append(f"By its tests this service passes {passed} of {len(mine)} cases.")
    for server, found in looked.items():
        seen = [one.kind for one in found.values() if one.kind in (Kind.PASS, Kind.OTHERWISE, Kind.UNSAFE)]
        verdicts.append(f"{server}, from outside: {seen.count(Kind.PASS)} of {len(seen)} cases as the matrix has them, "
                        f"{len(seen) - seen.count(Kind.UNSAFE)} safe.")  # fmt: skip
    return {
        "suite": {number: asdict(one) for number, one in mine.items()},
        "looks": {server: {number: asdict(one) for number, one in found.items()} for server, found in looked.items()},
        "verdicts": verdicts,
        "model": MODEL | ({"name": config.model or config.url, "origin": "–"} if config.url else {}),
        "prompt": "as each case says", "prompt_tokens": "–", "batch_policy": "as each server's own", "kv_cache": "on",
        "gpu_utilisation": "not sampled",
    }  # fmt: skip


if __name__ == "__main__":
    console.run(main)
