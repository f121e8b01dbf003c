"""The benchmark of the breaker, once through with short times: what it counts is what happened."""

from dataclasses import replace

import pytest

from benchmarks import serve_faults

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with serve_faults.served(tmp_path_factory.mktemp("faults") / "tiny") as found:
        found.breaker.rules = replace(found.breaker.rules, open_s=3.0)
        yield found


def test_a_breaker_that_knows_nothing_opens_after_twenty_failures_and_closes_after_two_probes(service):
    found = serve_faults.episode(service, good=0)
    assert (found.failed, found.reached, found.probes) == (20, 0, 2)
    assert (found.state, found.healed) == ("closed", serve_faults.AFTER)
    assert len(found.wishes_s) == serve_faults.REFUSED and all(abs(wish) < 5.0 for wish in found.wishes_s)
    claims = [*serve_faults.opens([found], [found]), *serve_faults.recovers(service, [found])]
    assert all(claim.holds for claim in claims), claims


def test_a_probe_that_fails_doubles_the_time(service):
    service.breaker.rules = replace(service.breaker.rules, open_s=2.0)
    first_s, again_s = serve_faults.reopened(service)
    assert first_s == 2.0 and 2.0 < again_s <= 4.0  # some of the four seconds have passed
