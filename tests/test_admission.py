"""Who may come in: the books against a simple model in any order of events, and predictions worked out by hand."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.admission import LATEST_S, REMEMBERED, SOONEST_S, Admission, Limits, Ticket
from service.errors import ApiError
from service.foretelling import Seat
from service.rates import Rates

KEYS = ("a", "b", "c")


@dataclass
class Fake:
    """What the engine would say of an admitted request. early: its answers ended before they had to."""

    ticket: Ticket
    started: bool = False
    delivered: int = 0
    early: bool = False
    prefix: int = 0

    def seats(self) -> list[Seat]:
        if self.ticket.done:
            return []
        done, prompt = self.delivered // self.ticket.answers, self.ticket.prompt_tokens
        there = self.ticket.answers if done else 1  # the others follow the first one
        return [Seat(1 if done else prompt, done, self.ticket.new_tokens, prompt + done, self.started)] * there

    def ended(self) -> list[tuple[int, bool]]:
        return [(self.delivered, self.early)] if self.delivered else []

    def found(self) -> int | None:
        return self.prefix if self.started else None


def rates() -> Rates:
    """A step takes 0.1 s and 0.01 s for each answer; 1,000 prompt tokens take a second."""
    return Rates(0.1, 0.01, 1000.0, clock=lambda: 0.0)


def books(slots=2, queued=2, tokens=10_000, patience_s=1e6, keys=1, jitter=lambda: 1.0) -> Admission:
    return Admission(Limits(slots, queued, tokens, patience_s, keys), rates(), jitter)


def enter(house: Admission, answers=1, prompt=100, new=10, deadline_s=1e9, key="", retry=False):
    return house.enter(
        answers=answers, prompt_tokens=prompt, new_tokens=new, deadline_s=deadline_s, key=key, retry=retry
    )


def running(house: Admission, delivered=0, **wishes):
    ticket = enter(house, **wishes)
    ticket.progress = Fake(ticket, True, delivered)
    return ticket


def refused(house: Admission, limit: str, **wishes) -> ApiError:
    with pytest.raises(ApiError) as why:
        enter(house, **wishes)
    assert why.value.details["limit_hit"] == limit, why.value.details
    return why.value


# ---- any order of events


class House(RuleBasedStateMachine):
    """The model: a list of what every guest may take, and who of them has started, or has all that he asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.house = Admission(Limits(3, 4, 400, 60.0, len(KEYS)), rates(), lambda: self.factor)
        self.guests: list = []  # (ticket, the numbers it is known by)
        self.gone: list = []
        self.shut: str | None = None
        self.retries: list[bool] = []

    def free(self, key: str) -> float:
        """Places that this key may take: who is there already leaves one to each of the others who is not."""
        return self.may_fill(key) - self.taken(0)

    def may_fill(self, key: str) -> float:
        there = {ticket.key for ticket, _ in self.guests}
        return {1: 5, 2: 6, 3: 6.3}[len(there)] if key in there else 7

    def taken(self, what: int) -> int:
        return sum(known[what] for ticket, known in self.guests if not ticket.done)

    @rule(
        answers=st.integers(1, 7), prompt=st.integers(1, 200), new=st.integers(1, 40), key=st.sampled_from(KEYS),
        deadline_s=st.sampled_from([0.3, 5.0, 1e6]), retry=st.booleans(), factor=st.sampled_from([0.8, 1.0, 1.2]),
    )  # fmt: skip
    def comes(self, answers, prompt, new, key, deadline_s, retry, factor):
        self.factor, before = factor, (list(self.house.inside), list(self.house.retried))
        room, tokens, most = self.free(key), self.taken(1), 400 * self.may_fill(key) / 7
        foretold = self.house.foretold(prompt)
        wait_s = foretold.first_token_s
        try:
            ticket = enter(self.house, answers, prompt, new, deadline_s, key, retry)
        except ApiError as why:
            self.told(why, answers, prompt + answers * new - most, room, tokens, wait_s, deadline_s)
            assert (list(self.house.inside), list(self.house.retried)) == before, "a refusal changed something"
            return
        assert self.shut is None and answers <= room
        assert (not tokens or tokens + ticket.tokens <= most) and (not before[0] or foretold.start_s <= 60)
        assert ticket.predicted_s == wait_s and wait_s + (new - 1) * 0.1 <= deadline_s
        if any(not guest.started for guest, _ in self.guests):
            self.retries.append(retry)
        self.guests.append((ticket, [answers, prompt + answers * new]))

    def told(self, why, answers, excess, room, held, wait_s, deadline_s):
        limit = why.details["limit_hit"]
        assert why.status == 503 and limit in ("requests", "tokens", "wait", "retries", "deadline", "drain", "memory")
        assert limit == self.shut if self.shut else limit not in ("drain", "memory")
        assert (limit == "requests") == (answers > room) or self.shut
        assert limit != "tokens" or (held and held + excess > 0)
        assert limit != "deadline" or wait_s + 40 * 0.13 > deadline_s
        assert limit != "retries" or sum(self.retries[-REMEMBERED:]) + 1 > 0.1 * min(len(self.retries) + 1, REMEMBERED)
        assert SOONEST_S * self.factor <= why.retry_after_s <= LATEST_S * self.factor
        assert why.details["requests"] == self.taken(0) and why.details["queued_tokens"] == self.taken(1)
        assert why.retry == (limit != "deadline") and int(why.all_headers["retry-after"]) >= why.retry_after_s
        if limit in ("wait", "tokens", "deadline"):
            assert why.details["predicted_wait_s"] == pytest.approx(wait_s, abs=0.01)

    @precondition(lambda self: any(not ticket.done for ticket, _ in self.guests))
    @rule(which=st.randoms(use_true_random=False), tokens=st.integers(1, 60), new=st.integers(1, 40))
    def is_counted(self, which, tokens, new):
        ticket, known = which.choice([guest for guest in self.guests if not guest[0].done])
        counted, others = tokens + ticket.answers * new, self.taken(1) - known[1]
        if counted > known[1] and others and others + counted > 400 * self.may_fill(ticket.key) / 7:
            with pytest.raises(ApiError) as why:
                self.house.correct(ticket, tokens, new)
            assert why.value.details["limit_hit"] == "tokens"
        else:
            self.house.correct(ticket, tokens, new)
            known[1] = counted

    @precondition(lambda self: self.guests)
    @rule(which=st.randoms(use_true_random=False))
    def starts(self, which):
        ticket, _ = which.choice(self.guests)
        ticket.progress = ticket.progress or Fake(ticket)
        ticket.progress.started = True

    def running(self) -> list:
        return [ticket for ticket, _ in self.guests if ticket.started and not ticket.done]

    @precondition(lambda self: self.running())
    @rule(which=st.randoms(use_true_random=False), more=st.integers(1, 50))
    def gets_tokens(self, which, more):
        which.choice(self.running()).progress.delivered += more

    @precondition(lambda self: self.running())
    @rule(which=st.randoms(use_true_random=False))
    def has_all_and_is_read_later(self, which):
        self.house.is_done(which.choice(self.running()))

    @precondition(lambda self: self.guests)
    @rule(which=st.randoms(use_true_random=False))
    def leaves(self, which):
        guest = which.choice(self.guests)
        self.guests.remove(guest)
        self.gone.append(guest[0])
        self.house.leave(guest[0])

    @precondition(lambda self: self.gone)
    @rule(which=st.randoms(use_true_random=False))
    def leaves_twice(self, which):
        self.house.leave(which.choice(self.gone))

    @rule(why=st.sampled_from([None, "memory", "drain"]))
    def is_closed_or_opened(self, why):
        self.house.closed = self.shut = why

    @invariant()
    def the_books_are_the_models(self):
        assert self.house.inside == [ticket for ticket, _ in self.guests]
        assert (self.house.answers, self.house.tokens) == (self.taken(0), self.taken(1))
        assert self.house.answers <= self.house.limits.places
        assert len(self.house.waiting) == sum(not ticket.started for ticket, _ in self.guests)
        assert 0 <= self.house.busy() <= 3 and self.house.predicted_wait_s(10) > 0
        assert not self.house.tokens > 400 or sum(not ticket.done for ticket, _ in self.guests) == 1


TestHouse = House.TestCase
TestHouse.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# ---- the wait


def test_a_newcomer_waits_for_those_inside_and_for_their_prompts():
    house = books(queued=9)
    running(house, delivered=5, new=10)  # ends with step 5
    running(house, delivered=1, new=21)  # and this with step 20
    enter(house, prompt=300, new=8)  # steps 6 to 13
    enter(house, prompt=400, new=3)  # steps 14 to 16
    assert house.foretold(100).start_s == pytest.approx(16 * 0.12 + 0.299 + 0.399)  # one token is with its answer
    assert house.predicted_wait_s(100) == pytest.approx(17 * 0.12 + 0.299 + 0.399 + 0.099)


def test_several_answers_to_one_prompt_count_as_many_once_it_is_computed():
    house = books()
    running(house, answers=2, delivered=10, new=20)  # 5 of 20 each
    assert house.predicted_wait_s(1) == pytest.approx(15 * 0.12 + 0.11)


def test_those_whose_bodies_are_there_may_share_the_first_step():
    house = books()
    house.knock("")
    assert house.predicted_wait_s(100) == pytest.approx(0.12 + 2 * 0.099)
    house.step_aside()
    assert house.predicted_wait_s(100) == pytest.approx(0.11 + 0.099)


def test_who_was_let_in_is_with_the_engine_after_the_time_that_others_took():
    now = [7.0]
    house = Admission(Limits(2, 2, 10_000, 1e6), rates(), clock=lambda: now[0])
    first = enter(house)
    now[0] += 0.03
    house.handed_over(first, Fake(first, True, 1))
    second = enter(house)
    now[0] += 0.01
    assert (second.entered_s, house.foreteller.hand_s) == pytest.approx((7.03, 0.03))
    assert [seat.late_s for seat in house.seats()] == pytest.approx([0.0, 0.02])
    now[0] += 1.0
    assert [seat.late_s for seat in house.seats()] == [0.0, 0.0], "any moment"
    assert first.progress.started and second.progress is None


def test_from_those_who_leave_it_is_learned_how_much_of_a_prompt_is_in_the_cache():
    house = books(slots=1, queued=99)
    for _ in range(2000):
        ticket = enter(house)
        ticket.progress = Fake(ticket, True, prefix=32)
        house.leave(ticket)
        ticket = enter(house)
        ticket.progress = Fake(ticket, False, prefix=99)  # has not begun
        house.leave(ticket)
    assert house.predicted_wait_s(100) == pytest.approx(0.11 + 0.067)
    assert house.predicted_wait_s(20) == house.predicted_wait_s(0) == pytest.approx(0.11)
    enter(house, prompt=50, new=1)
    assert house.predicted_wait_s(100) == pytest.approx(0.11 + 0.017 + 0.11 + 0.067)


def test_from_those_who_leave_it_is_learned_how_long_answers_become():
    house = books(slots=1, queued=99)
    for _ in range(300):
        house.leave(running(house, delivered=50, new=51))
    for _ in range(300):
        ticket = running(house, delivered=5, new=50)
        ticket.progress.early = True
        house.leave(ticket)
        house.leave(ticket)
    running(house, delivered=1, new=1000)
    assert house.predicted_wait_s(1) < 10 * 0.11, "most end within some tokens"


def test_who_would_wait_too_long_is_refused_with_the_wait():
    house = books(slots=1, queued=9, patience_s=5.0)
    running(house, delivered=1, new=11)
    enter(house, new=40)  # it would itself wait 1.1 s, and holds the slot for 4.4 s more
    why = refused(house, "wait", new=1, prompt=101)
    assert why.details["predicted_wait_s"] == pytest.approx(10 * 0.11 + 40 * 0.11 + 0.1 + 0.21, abs=0.01)
    assert why.retry_after_s == pytest.approx(10 * 0.11)  # when the slot is free


def test_in_an_empty_house_a_long_prompt_is_no_waiting():
    house = books(patience_s=5.0)
    assert house.predicted_wait_s(9_000) > 5.0
    enter(house, prompt=9_000)
    refused(books(patience_s=5.0), "deadline", prompt=9_000, deadline_s=5.0)


def test_a_deadline_counts_the_wait_and_the_whole_answer():
    house = books()
    enter(house, prompt=100, new=11, deadline_s=0.1 + 0.11 + 10 * 0.11 + 0.01)
    house = books()
    why = refused(house, "deadline", prompt=100, new=11, deadline_s=0.1 + 0.11 + 10 * 0.11 - 0.01)
    assert (why.code, why.outcome, why.retry) == ("deadline_unreachable", "shed_deadline", False)
    assert why.details["deadline_s"] == pytest.approx(1.3, abs=0.01)


def test_one_request_may_be_larger_than_all_tokens_when_nobody_else_is_there():
    house = books(tokens=50)
    ticket = enter(house, prompt=100)
    refused(house, "tokens", prompt=1, new=1)
    house.leave(ticket)
    enter(house, prompt=100)


# ---- what a refusal says


def said(error: ApiError) -> tuple:
    return error.status, error.code, error.outcome, error.retry, error.retry_after_s, error.body["error"]["message"]


def test_a_refusal_says_in_numbers_what_is_full_and_when_to_come_back():
    house = books(slots=2, queued=1, tokens=150, patience_s=2.0)
    running(house, delivered=2, prompt=20, new=12)  # 10 left
    running(house, delivered=1, prompt=20, new=30)
    tail = "(2 requests, 82 tokens; a newcomer would wait about {} s): try again later."
    found = refused(house, "tokens", prompt=60, new=9, deadline_s=7.0)
    assert said(found) == (503, "server_overloaded", "shed_queue", True, pytest.approx(1.2),
                           "The server holds as many tokens as it can " + tail.format("1.4"))  # fmt: skip
    assert found.details == {
        "limit_hit": "tokens", "requests": 2, "queue_depth": 0, "queued_tokens": 82, "drain_rate_tok_s": 16.7,
        "retry_after_s": 1.2, "predicted_wait_s": 1.38, "deadline_s": 7.0,
    }  # fmt: skip
    enter(house, prompt=11, new=9)
    found = refused(house, "requests", prompt=1, new=1)
    assert "as many requests as it can (3 requests, 102 tokens; a newcomer would wait about 2.4 s)" in said(found)[-1]
    assert (found.details["queue_depth"], "deadline_s" in found.details) == (1, False)
    assert found.details["predicted_wait_s"] == pytest.approx(20 * 0.12 + 0.01, abs=0.01)
    house = books(slots=1, queued=9, patience_s=2.0)
    running(house, delivered=1, new=20)
    found = refused(house, "wait", deadline_s=9.0)
    assert said(found)[-1].startswith("The server holds all it can for now (1 requests")
    assert found.details["deadline_s"] == 9.0
    house = books(slots=1, queued=9)
    running(house, new=10)
    enter(house)
    house.retried.extend([True] * 10)
    found = refused(house, "retries", retry=True, deadline_s=9.0)
    assert "others wait, one in 10 may be such (2 requests" in said(found)[-1]
    assert found.details["deadline_s"] == 9.0


def test_a_deadline_is_refused_with_what_it_would_take():
    found = refused(books(), "deadline", prompt=201, new=11, deadline_s=1.0)
    assert said(found) == (
        503, "deadline_unreachable", "shed_deadline", False, pytest.approx(0.5),
        "You will wait 1.0 s, and this request would take about 0.3 s to its first token and 1.1 s from there: ask for "
        "fewer tokens, or wait longer.",
    )  # fmt: skip
    assert found.details["predicted_wait_s"] == pytest.approx(0.31) and found.details["deadline_s"] == 1.0


def test_a_closed_door_says_why_and_for_how_long():
    house = books()
    house.closed = "drain"
    assert said(refused(house, "drain")) == (
        503, "server_shutting_down", "shed_drain", True, 1.0, "The server is shutting down: ask another one.",
    )  # fmt: skip
    house.closed = "memory"
    assert said(refused(house, "memory")) == (
        503, "server_overloaded", "shed_memory", True, 5.0, "The server is short of memory: try again later.",
    )  # fmt: skip


def test_at_the_door_a_place_is_kept_and_counted_for_everybody():
    house = books(slots=2, queued=2, keys=2)
    house.knock("a")
    enter(house, key="a")
    house.knock("a")
    with pytest.raises(ApiError) as why:
        house.knock("a")  # the last place is the others'
    assert why.value.details["limit_hit"] == "requests"
    assert (why.value.details["requests"], why.value.details["queue_depth"]) == (3, 3)
    house.knock("b")
    refused(house, "requests", key="b")
    house.step_aside()
    assert refused(house, "requests", key="a").details["requests"] == 3
    enter(house, key="b")


def test_the_figures_of_a_flood_are_looked_up_a_few_times_a_second():
    now, house = [9.0], books(slots=1, queued=0)
    house.clock = lambda: now[0]
    running(house, new=50)
    seen = house.crowd()
    for now[0] in (9.02, 9.04):
        refused(house, "requests")
        assert house.crowd() is seen
    now[0] = 9.06
    assert house.crowd() is not seen and house.crowd().seen_s == 9.06
    house.leave(house.inside[0])
    assert house.crowd().answers == 0, "whoever leaves is seen at once"


# ---- several keys, and those who come again


def test_one_key_cannot_fill_the_house_and_another_finds_room():
    house = books(slots=4, queued=6, keys=2)
    inside = [enter(house, key="flood", new=1) for _ in range(9)]
    refused(house, "requests", key="flood", new=1)
    enter(house, key="quiet", new=1)
    refused(house, "requests", key="third", new=1)  # now it is full
    house.leave(inside[0])
    refused(house, "requests", key="flood", new=1)
    enter(house, key="third", new=1)


def test_of_three_keys_each_finds_a_place_in_a_small_house():
    """The tenth that was kept was one place: the second key took it, and for the third there was none."""
    house = books(slots=4, queued=6, keys=3)
    for _ in range(8):
        enter(house, key="flood", new=1)
    refused(house, "requests", key="flood", new=1)
    enter(house, key="second", new=1)
    refused(house, "requests", key="second", new=1)
    enter(house, key="third", new=1)


def test_however_many_keys_there_are_one_may_fill_half_of_the_house():
    house = books(slots=4, queued=6, keys=1000)
    for _ in range(5):
        enter(house, key="only", new=1)
    refused(house, "requests", key="only", new=1)
    assert house.share("only") == 0.5 and house.share("another") == 1.0


def test_a_count_above_the_estimate_never_lifts_the_sum_above_its_limit():
    house = books(tokens=300)
    first, second = enter(house, prompt=100, new=10), enter(house, prompt=100, new=10)
    house.correct(first, 180, 10)  # 190 and 110
    with pytest.raises(ApiError) as why:
        house.correct(second, 101, 10)
    assert why.value.details["limit_hit"] == "tokens" and why.value.outcome == "shed_queue"
    assert (house.tokens, second.prompt_tokens) == (300, 100)
    house.correct(second, 90, 20)
    house.leave(second)
    house.correct(first, 5000, 1)  # alone, one may be larger than all there is
    assert house.tokens == 5001


def test_a_longer_answer_than_was_let_in_finds_no_room_either():
    house = books(tokens=300)
    enter(house, prompt=100, new=100)
    ticket = enter(house, prompt=50, new=50)
    with pytest.raises(ApiError):
        house.correct(ticket, 50, 51)
    assert house.tokens == 300


def test_whose_answer_is_done_takes_no_place_while_it_is_read():
    house = books(slots=1, queued=0, tokens=300)
    ticket = running(house, prompt=100, new=200)
    refused(house, "requests")
    house.is_done(ticket)
    assert ticket.done and (house.answers, house.tokens, house.inside) == (0, 0, [ticket])
    enter(house, prompt=100, new=200)


def test_one_key_cannot_take_all_tokens_either():
    house = books(slots=4, queued=96, tokens=1000, keys=2)
    for _ in range(9):
        enter(house, key="flood", prompt=90, new=10)
    refused(house, "tokens", key="flood", prompt=90, new=10)
    enter(house, key="quiet", prompt=90, new=10)


def test_one_key_cannot_use_up_the_whole_wait_either():
    house = books(slots=1, queued=96, patience_s=10.0, keys=2)
    running(house, key="flood", new=86, prompt=0, delivered=1)  # 85 steps of 0.11 s: 9.35, and one more
    refused(house, "wait", key="flood", new=1, prompt=0)
    assert enter(house, key="quiet", new=1, prompt=0).predicted_s == pytest.approx(86 * 0.11)


def test_where_there_is_one_key_it_has_the_whole_house():
    house = books(slots=4, queued=6)
    for _ in range(10):
        enter(house, key="only", new=1)
    refused(house, "requests", key="only", new=1)


def test_nobody_is_refused_for_coming_again_while_nobody_waits():
    house = books()
    for _ in range(200):
        house.leave(enter(house, retry=True))
    house.retried.extend([True] * 10)  # as after an overload
    enter(house, retry=True)


def test_while_others_wait_one_in_ten_admissions_may_be_a_retry():
    house, admitted = books(slots=1, queued=10), []
    running(house, new=10)
    enter(house, new=1)  # waits
    for i in range(1000):  # half of those who ask come again
        retry = i % 2 == 1
        try:
            ticket = enter(house, new=1, retry=retry)
        except ApiError as why:
            assert retry and why.details["limit_hit"] == "retries" and why.code == "server_overloaded"
        else:
            admitted.append(retry)
            house.leave(ticket)
    assert admitted.count(False) == 500 and 40 <= admitted.count(True) <= 60
    assert all(sum(admitted[i : i + REMEMBERED]) <= 10 for i in range(len(admitted) - REMEMBERED))


def test_retries_in_an_empty_house_cost_nothing_of_that_budget():
    house = books(slots=1, queued=10)
    for _ in range(200):
        house.leave(enter(house, retry=True))
    running(house, new=10)
    enter(house, new=1)
    enter(house, new=1, retry=True)


def test_in_a_queue_that_is_half_full_retries_are_a_tenth_from_the_first_one_on():
    house = books(slots=1, queued=8)
    running(house, new=10)
    for _ in range(4):
        enter(house, new=1)  # half of the places to wait in
    enter(house, new=1, retry=True)  # one of three recorded: there is room
    why = refused(house, "retries", new=1, retry=True)
    assert why.details["retries_let_in"] == 1 and why.details["let_in"] == 4
    assert "sent again come last: of those let in while others wait, one in 10 may be such" in why.message
    assert why.retry and why.outcome == "shed_queue" and why.retry_after_s >= SOONEST_S
    for _ in range(14):
        house.leave(enter(house, new=1))
    refused(house, "retries", new=1, retry=True)  # 2 of 20 would be a tenth, and with this one they are 19
    house.leave(enter(house, new=1))
    enter(house, new=1, retry=True)
    refused(house, "retries", new=1, retry=True)
