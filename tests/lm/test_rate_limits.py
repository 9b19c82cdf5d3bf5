"""The limits of an account, with a clock that the tests set: nothing here waits."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_bridge.lm import rate_limits
from dspy_bridge.lm.rate_limits import Gate, Lane, Limits, Ticket


class World:
    """A gate and its clock. `sent`: the waiters whose requests went out, with the time, in their order."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.gate = Gate(clock=lambda: self.now)
        self.sent: list[tuple[float, Waiter]] = []
        self.waiters: list[Waiter] = []

    def ask(self, lane: Lane, within: float | None = None) -> Waiter:
        waiter = Waiter(self, lane, None if within is None else self.now + within)
        self.waiters.append(waiter)
        self.gate.enter(waiter.ticket)
        self.gate.advance()
        return waiter

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while (until := self.now + self.gate.advance() + 1e-9) <= end:
            self.now = until
        self.now = end
        self.gate.advance()

    def spend(self, tokens: int, lane: Lane) -> None:
        self.gate.spend(tokens, lane)
        self.gate.advance()

    def pause(self, seconds: float) -> None:
        self.gate.pause(seconds)
        self.gate.advance()

    def states(self) -> list[str]:
        return [waiter.state for waiter in self.waiters]


class Waiter:
    def __init__(self, world: World, lane: Lane, deadline: float | None) -> None:
        self.world, self.lane = world, lane
        self.ticket = Ticket(lane, deadline)
        self.ticket.gone.add_done_callback(self.settled)
        self.state = "waiting"
        self.text = ""

    def settled(self, gone: Future[None]) -> None:
        assert self.state == "waiting"
        if (refusal := gone.exception()) is not None:
            self.state, self.text = "refused", str(refusal)
            return
        self.state = "sent"
        self.world.sent.append((self.world.now, self))

    def leave(self) -> None:
        self.state = "left"
        for _ in range(2):
            self.world.gate.leave(self.ticket)
        self.world.gate.advance()


@pytest.mark.parametrize(
    ("limits", "within", "text"),
    [
        (
            Limits(requests_per_minute=2),
            29,
            "the LM's next request would have to wait 30.0 s for requests_per_minute (2); 29.0 s are left",
        ),
        (
            Limits(tokens_per_minute=60),
            40,
            "the LM's next request would have to wait 41.0 s for tokens_per_minute (60); 40.0 s are left",
        ),
    ],
)
def test_a_wait_past_the_deadline_fails_at_once_and_names_limit_and_wait(
    limits: Limits, within: float, text: str
) -> None:
    world = World()
    gate = world.gate.lane(limits)
    world.ask(gate)
    world.ask(gate)
    world.spend(100, gate)
    assert world.ask(gate, within).text == text
    assert world.ask(gate, within + 1.1).state == "waiting"


def test_a_pause_holds_all_requests_of_the_account_and_fails_those_that_it_makes_late() -> None:
    world = World()
    limited = world.gate.lane(Limits(max_in_flight=1))
    free = world.gate.lane(Limits())
    first = world.ask(limited)
    late, patient = world.ask(limited, 5), world.ask(limited, 60)
    world.pause(10)
    other = world.ask(free)
    assert (late.state, patient.state, other.state) == ("refused", "waiting", "waiting")
    assert late.text == (
        "the LM's next request would have to wait 10.0 s for its server, which asked for a pause; 5.0 s are left"
    )
    first.leave()
    world.pass_time(9.9)
    assert (patient.state, other.state) == ("waiting", "waiting")
    world.pass_time(0.2)
    assert (patient.state, other.state) == ("sent", "sent")


def test_each_lm_keeps_its_own_limits_and_all_requests_of_the_account_count() -> None:
    """So a batch leaves room for others, and who names nothing is not held up."""
    world = World()
    narrow = world.gate.lane(Limits(max_in_flight=1, requests_per_minute=2))
    wide = world.gate.lane(Limits(max_in_flight=3))
    free = world.gate.lane(Limits())
    assert world.ask(free).state == world.ask(wide).state == "sent"
    batch = world.ask(narrow)
    assert batch.state == "waiting"
    assert world.ask(wide).state == "sent" and world.ask(wide).state == "waiting" and world.ask(free).state == "sent"
    for waiter in world.waiters:
        if waiter is not batch:
            waiter.leave()
    assert batch.state == "waiting", "five requests were sent, and its LM allows two a minute"
    world.pass_time(31)
    assert batch.state == "sent", "what others send beyond its limits is not its debt"


def test_counts_outlive_the_lms_of_an_account_and_do_not_grow_without_end() -> None:
    limits = Limits(requests_per_minute=1)
    mine = rate_limits.lane("mine", limits)
    assert rate_limits.lane("mine", limits) is mine and rate_limits.lane("mine", Limits()).gate is mine.gate
    for number in range(2 * rate_limits._MOST_GATES):
        rate_limits.lane(f"tenant {number}", limits)
    assert rate_limits._gate.cache_info().currsize == rate_limits._MOST_GATES
    for number in range(100):
        mine.gate.lane(Limits(tokens_per_minute=number + 1))
    assert mine.gate.lanes() == [mine], "no LM has the others any more"


per_minute = st.one_of(st.none(), st.floats(0.1, 1000), st.integers(1, 1000))
some_limits = st.builds(Limits, st.one_of(st.none(), st.integers(1, 5)), per_minute, per_minute)
seconds = st.floats(0, 200)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 1), st.one_of(st.none(), st.none(), seconds)),
        st.tuples(st.just("pass"), seconds),
        st.tuples(st.just("leave"), st.integers(0, 1000)),
        st.tuples(st.just("spend"), st.integers(0, 2000)),
        st.tuples(st.just("pause"), seconds),
    ),
    max_size=60,
)


@given(st.tuples(some_limits, some_limits), steps)
def test_never_more_than_the_limits_first_in_first_out_and_no_place_is_lost(
    limits: tuple[Limits, Limits], steps: list[Any]
) -> None:
    world = World()
    lanes = [world.gate.lane(limit) for limit in limits]
    for what, *rest in steps:
        if what == "ask":
            world.ask(lanes[rest[0]], rest[1])
        elif what == "pass":
            world.pass_time(rest[0])
        elif what == "leave" and world.waiters:
            world.waiters[rest[0] % len(world.waiters)].leave()
        elif what == "spend":
            world.spend(rest[0], lanes[0])
        elif what == "pause":
            world.pause(rest[0])
        in_flight = world.states().count("sent")
        for lane in lanes:
            waiting = [w for w in world.waiters if w.state == "waiting" and w.lane is lane]
            assert in_flight == world.gate.in_flight
            # Nobody waits for nothing.
            assert not waiting or lane.is_full() or lane.wait(0)[0] > 0
    # Within its own limits, whatever the others of the account send.
    for lane in lanes:
        own = [at for at, waiter in world.sent if waiter.lane is lane]
        if (rate := lane.limits.requests_per_minute) is not None:
            for first, last in itertools.combinations_with_replacement(range(len(own)), 2):
                most = max(rate, 1) + rate / 60 * (own[last] - own[first])
                assert last - first + 1 <= most + 1e-3
        order = [world.waiters.index(waiter) for _, waiter in world.sent if waiter.lane is lane]
        assert order == sorted(order)
    # When all others end, whoever still waits is sent in the end.
    for _ in world.waiters:
        for waiter in world.waiters:
            if waiter.state == "sent":
                waiter.leave()
        world.pass_time(1e7)
    assert "waiting" not in world.states()
    assert world.gate.in_flight == world.states().count("sent")
