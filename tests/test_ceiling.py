"""What the client can do at most: no limit is named that is the server's script's."""

import pytest

from load import ceiling, words


@pytest.mark.parametrize("most", [3_000.0, 9_600.0, 19_000.0, 40_000.0, 1e6])
def test_the_scripts_own_pace_is_never_called_the_clients_limit(most):
    """96 streams sent 9,697 pieces a second at most, and 9,622 were said to be the client's limit."""
    asked = []

    def taken(streams: int) -> float:
        asked.append(streams)
        return min(most, 0.99 * ceiling.sent_by(streams))

    found, at_least = ceiling.most_pieces(taken)
    assert at_least is (most == 1e6)
    assert at_least or found == most < 0.95 * ceiling.sent_by(asked[-1])
    assert asked == list(ceiling.STREAMS[: len(asked)])


def test_the_sentence_says_at_least_where_no_more_was_sent():
    reached = {"requests_per_s": 8906.0, "pieces_per_s": 9622.0, "cpu": "any"}
    limit = (
        "A run is this client's own limit above 8,906 requests/s or 9,622 pieces/s: so much it reached against a "
        "server that only answers."
    )
    assert words.ceiling_sentence(reached | {"at_least": False}) == limit
    least = (
        "A run is this client's own limit above 8,906 requests/s: so much it reached against a server that only "
        "answers. It takes at least 9,622 pieces/s, too: no more were sent."
    )
    assert words.ceiling_sentence(reached | {"at_least": True}) == words.ceiling_sentence(reached) == least


@pytest.mark.slow
def test_it_is_measured_in_seconds_and_kept(monkeypatch):
    """A few streams only, of which every client takes each piece by itself."""
    monkeypatch.setattr(ceiling, "STREAMS", (2, 4))
    monkeypatch.setattr(ceiling, "STREAM_NEW", 50)
    found = ceiling.measure()
    assert found["requests_per_s"] > 0 and 0 < found["pieces_per_s"] <= 1.05 * ceiling.sent_by(4)
    assert found["at_least"] or found["pieces_per_s"] < 0.95 * ceiling.sent_by(4)
    assert ceiling.known() == found


def test_the_standard_streams_take_seconds():
    assert len(ceiling.STREAMS) * ceiling.STREAM_NEW * ceiling.GAP_S < 10
    assert max(ceiling.STREAMS) < 900, "a thousand open files are too many for the exact clock"
