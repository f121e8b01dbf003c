"""When requests arrive: schedules that are fixed before anything runs, in seconds from the start.

An open loop sends by such a schedule, whether or not the server keeps up, and counts latency from it. (A closed loop,
which sends when an answer came, slows down with the server, and so hides its queue.)
"""

import random

KINDS = ("burst", "poisson", "constant")


def schedule(kind: str, requests: int, rate_per_s: float, seed: int) -> list[float]:
    """The moments at which the requests are due.

    burst: all at once. constant: evenly spaced. poisson: independent users, so the gaps are exponential; seeded.
    """
    if kind == "burst":
        return [0.0] * requests
    if kind == "constant":
        return [i / rate_per_s for i in range(requests)]
    chance, moment, dues = random.Random(seed), 0.0, []
    for _ in range(requests):
        dues.append(moment)
        moment += chance.expovariate(rate_per_s)
    return dues
