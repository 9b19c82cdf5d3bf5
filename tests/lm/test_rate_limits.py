"""The limits of an account, with a clock that the tests set: nothing here waits."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_bridge.lm import rate_limits
from dspy_bridge.lm.rate_limits import Lane, Limits


class World:
    """A lane and its clock. `sent`: the waiters whose requests went out, with the time, in their order."""

    def __init__(self, limits: Limits) -> None:
        self.now = 1000.0
        self.lane = Lane(limits, clock=lambda: self.now)
        self.sent: list[tuple[float, Waiter]] = []
        self.waiters: list[Waiter] = []

    def ask(self, within: float | None = None) -> Waiter:
        waiter = Waiter(self)
        self.waiters.append(waiter)
        self.lane.enter(waiter.request, None if within is None else self.now + within)
        self.lane.advance()
        return waiter

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while (until := self.now + self.lane.advance() + 1e-9) <= end:
            self.now = until
        self.now = end
        self.lane.advance()

    def spend(self, tokens: int) -> None:
        self.lane.spend(tokens)
        self.lane.advance()

    def pause(self, seconds: float) -> None:
        self.lane.pause(seconds)
        self.lane.advance()

    def states(self) -> list[str]:
        return [waiter.state for waiter in self.waiters]


class Waiter:
    def __init__(self, world: World) -> None:
        self.world = world
        self.request: Future[None] = Future()
        self.request.add_done_callback(self.settled)
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
            self.world.lane.leave(self.request)
        self.world.lane.advance()


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
    world = World(limits)
    world.ask()
    world.ask()
    world.spend(100)
    assert world.ask(within).text == text
    assert world.ask(within + 1.1).state == "waiting"


def test_a_pause_holds_all_requests_and_fails_those_that_it_makes_late() -> None:
    world = World(Limits(max_in_flight=1))
    first = world.ask()
    late, patient = world.ask(5), world.ask(60)
    world.pause(10)
    assert (late.state, patient.state) == ("refused", "waiting")
    assert late.text == (
        "the LM's next request would have to wait 10.0 s for its server, which asked for a pause; 5.0 s are left"
    )
    first.leave()
    world.pass_time(9.9)
    assert patient.state == "waiting"
    world.pass_time(0.2)
    assert patient.state == "sent"


def test_counts_outlive_the_lms_and_do_not_grow_without_end() -> None:
    limits = Limits(requests_per_minute=1)
    mine = rate_limits.lane("mine", limits)
    assert rate_limits.lane("mine", limits) is mine and rate_limits.lane("mine", Limits()) is not mine
    for number in range(2 * rate_limits._MOST_LANES):
        rate_limits.lane(f"tenant {number}", limits)
    assert rate_limits._lane.cache_info().currsize == rate_limits._MOST_LANES


per_minute = st.one_of(st.none(), st.floats(0.1, 1000), st.integers(1, 1000))
some_limits = st.builds(Limits, st.one_of(st.none(), st.integers(1, 5)), per_minute, per_minute)
seconds = st.floats(0, 200)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.one_of(st.none(), st.none(), seconds)),
        st.tuples(st.just("pass"), seconds),
        st.tuples(st.just("leave"), st.integers(0, 1000)),
        st.tuples(st.just("spend"), st.integers(0, 2000)),
        st.tuples(st.just("pause"), seconds),
    ),
    max_size=60,
)


@given(some_limits, steps)
def test_never_more_than_the_limits_first_in_first_out_and_no_place_is_lost(limits: Limits, steps: list[Any]) -> None:
    world = World(limits)
    for what, *rest in steps:
        if what == "ask":
            world.ask(rest[0])
        elif what == "pass":
            world.pass_time(rest[0])
        elif what == "leave" and world.waiters:
            world.waiters[rest[0] % len(world.waiters)].leave()
        elif what == "spend":
            world.spend(rest[0])
        elif what == "pause":
            world.pause(rest[0])
        in_flight = len(world.lane.running)
        assert world.states().count("sent") == in_flight and in_flight <= (limits.max_in_flight or in_flight)
        # Nobody waits for nothing.
        assert "waiting" not in world.states() or world.lane.is_full() or world.lane.wait(0)[0] > 0
    if (rate := limits.requests_per_minute) is not None:
        times = [at for at, _ in world.sent]
        for first, last in itertools.combinations_with_replacement(range(len(times)), 2):
            assert last - first + 1 <= max(rate, 1) + rate / 60 * (times[last] - times[first]) + 1e-3
    order = [world.waiters.index(waiter) for _, waiter in world.sent]
    assert order == sorted(order)
    # When all others end, whoever still waits is sent in the end.
    for _ in world.waiters:
        for waiter in world.waiters:
            if waiter.state == "sent":
                waiter.leave()
        world.pass_time(1e7)
    assert "waiting" not in world.states()
    assert len(world.lane.running) == world.states().count("sent")
