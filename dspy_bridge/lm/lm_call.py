"""The LM call under way: where it goes, for which run, on which loop, and all that is recorded of it. Imports DSPy.

`transport` sends its requests by it, `metering` shows it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn, TypeVar

import dspy

from dspy_bridge import tracing
from dspy_bridge.dispatch.call import Call
from dspy_bridge.errors import BridgeError, BudgetSpent, InvalidArgs
from dspy_bridge.lm import budgets
from dspy_bridge.lm.budgets import Budget
from dspy_bridge.lm.rate_limits import Lane
from dspy_bridge.runtime import worker_threads
from dspy_bridge.runtime.worker_threads import Job

T = TypeVar("T")
# The DSPy setting that has the `RunContext`: DSPy's threads have its settings, but no other context.
RUN = tracing.RUN


class Target(NamedTuple):
    """Where an LM of ours is asked. `account`: the server and the key, as the cache tells them apart.

    `scope`: of the cache, as the client named it. `connect_timeout`: in seconds; `retries`: whether a failed attempt to
    connect is followed by others within it. `key_of`: the provider whose key the LM has from the peer's; None if its
    own options say where it is asked. `lane`: where its requests wait.
    """

    account: str
    scope: str | None
    connect_timeout: float
    retries: bool
    key_of: str | None
    lane: Lane


class LMOverloaded(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """A request would have to wait past the deadline of its run. `begun`: whether the run has asked LMs or tools."""

    def __init__(self, text: str, begun: bool) -> None:
        super().__init__(text)
        self.begun = begun


class Ended(BaseException):
    """Unwinds the code of a run that is over. Not an `Exception`, as modules and DSPy catch those and go on."""


class RunContext:
    """What LM calls, tools and adapters of one run need to know of it, on the event loop as in threads.

    `deadline`: in seconds of `time.monotonic`, or None. `call`: the client's. `meter`: None if its reply has no meta.
    `attempts`: how adapters ask again; None if they do not. `refuses_cut_off`: whether answers that were cut off are
    refused. `on_asking_again`: called, from any thread, with what did not fit, before an LM is asked again. `steps`:
    calls of LMs and tools that it made. `job`: for threads that have DSPy's settings alone. `journal`, `budget` and
    `stream`: None if it has none. `item`: its index among the inputs. `over`: the error that has ended it, whatever its
    code makes of that.
    """

    budget: Budget | None = None
    item: int | None = None
    journal: Any = None
    over: BridgeError | None = None
    stream: Any = None

    def __init__(self, deadline: float | None, call: Call | None = None) -> None:
        self.deadline = deadline
        self.call: Any = call
        self.meter: Any = None
        self.attempts: Any = None
        self.on_asking_again: Callable[[Any], object] = lambda _error: None
        self.refuses_cut_off = False
        self.traceparent = tracing.current()
        self.job: Job | None = None
        self.steps = 0
        # A token for each LM call and tool call that it waits for.
        self.under_way: set[object] = set()
        # The LM calls whose answers go into the journal, and the requests that the budget has refused.
        self.recording: set[object] = set()
        self.refused: set[object] = set()

    # Whether DSPy's executors run each example once, however long it takes, and without a progress bar.
    examples_once = False

    def slot(self) -> AbstractAsyncContextManager[None] | None:
        """What a call of an LM waits for, on its event loop, and leaves at its end; None by default."""
        return None

    def give_up(self, error: BridgeError) -> NoReturn:
        """End the run, in its own code. The first error counts."""
        self.over = self.over or error
        raise Ended

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around a call of an LM or a tool."""
        token = object()
        self.under_way.add(token)
        try:
            yield
        finally:
            self.under_way.discard(token)

    async def begin_request(self, tokens: int = 0) -> None:
        """Before each request to an LM's server, of some `tokens`; `end_request` follows if it returns."""
        if self.budget is not None:
            try:
                await self.budget.reserve(tokens)
            except BudgetSpent as error:
                self.refused.add(error)
                # Other answers may be paid and not yet in the journal: a run that goes on later would pay them again.
                while len(self.recording) > len(self.refused):  # noqa: ASYNC110  # as in `Budget.reserve`
                    await asyncio.sleep(budgets.POLL)
                self.give_up(error)

    def end_request(self, *, sent: bool) -> None:
        """`sent`: false if it was refused, or cancelled as it waited."""
        if self.budget is not None:
            self.budget.release(sent=sent)

    def spend(self, model: str, tokens: int, usd: float | None) -> None:
        """Called with the tokens and the price of each answer."""
        if self.budget is None:
            return
        if usd is None and self.budget.limits_usd:
            self.give_up(InvalidArgs(f"budget.usd: DSPy knows no price of {model}; expected lm_calls or tokens"))
        self.budget.spend(tokens, usd or 0.0)

    def overloaded(self, text: str) -> LMOverloaded:
        """The error for a request of the latest step."""
        return LMOverloaded(text, self.steps > 1)


def run() -> RunContext:
    """The run under way; an empty one outside of runs."""
    found: RunContext | None = dspy.settings.get(RUN)
    return RunContext(None) if found is None else found


def step() -> RunContext:
    """The run under way, which has come to a call of an LM or a tool."""
    found = run()
    found.steps += 1
    return found


def job() -> Job | None:
    """By which a sync call of an LM in this thread can be cancelled, if it can."""
    return worker_threads.current.get() or run().job


class LMCall:
    """One call of an LM; its requests follow one another. Times are of `time.monotonic`, in seconds.

    `target`: None for an LM that your application made. `by_litellm`: whether LiteLLM sends its requests;
    `refused`: our error, of which LiteLLM and the clients below it may have made one of theirs. `usage`: token counts
    as DSPy reported them, none for an answer from the cache.
    `finish_reason` and `cost` (US dollars) are None where DSPy does not tell them, `error_type` is the class of the
    exception that it failed with. `first_chunk`: when the first piece of a streamed answer came. `entry`: its
    place in the run's history, with the messages, if the reply has one; `outputs`: for the history alone. `ticket`: its
    place in the run's journal; `replayed`: the recorded answer that it got.
    """

    by_litellm = False
    cached = False
    cost: float | None = None
    ended: float | None = None
    entry: tuple[Any, Any] | None = None
    error_type: str | None = None
    finish_reason: str | None = None
    first_chunk: float | None = None
    metered = False
    model = ""
    outputs: Any = None
    refused: dspy.LMError | None = None
    replayed: dict[str, Any] | None = None
    ticket: Any = None
    _waiting_since: float | None = None
    _waited = 0.0

    def __init__(self, target: Target | None, run: RunContext) -> None:
        self.target = target
        self.run = run
        self.started = time.monotonic()
        self.usage: dict[str, Any] = {}

    @property
    def unpriced(self) -> bool:
        """Whether the call was billed, as far as DSPy knows, and its price is not known."""
        return self.cost is None and not self.cached and bool(self.usage or (self.ended and self.error_type is None))

    def begin_wait(self) -> None:
        """It waits for the limits of its account from now on, unless it does already."""
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
            _waiting.add(self)

    def end_wait(self) -> None:
        self._waited, self._waiting_since = self.waited(time.monotonic()), None
        _waiting.discard(self)

    def waited(self, until: float) -> float:
        since = self._waiting_since
        return self._waited + (0.0 if since is None else max(0.0, until - since))

    def chunk(self) -> None:
        if self.first_chunk is None:
            self.first_chunk = time.monotonic()


# The LM call under way in this context.
current: ContextVar[LMCall | None] = ContextVar("lm_call", default=None)
# The calls that wait now.
_waiting: set[LMCall] = set()


def waiting() -> int:
    return len(_waiting)


def target() -> Target | None:
    """Where the LM call under way goes; None for an LM that your application made."""
    call = current.get()
    return None if call is None else call.target


@contextmanager
def of(target: Target | None, ticket: Any = None) -> Iterator[None]:
    """Around a call of an LM of ours."""
    call = LMCall(target, step())
    call.ticket = ticket
    token = current.set(call)
    try:
        yield
    finally:
        current.reset(token)
        call.end_wait()


_main: asyncio.AbstractEventLoop | None = None


def begin_on_main_loop() -> None:
    """Called by each run on its event loop, where what LM calls share is used, such as the limits of their accounts."""
    global _main
    _main = asyncio.get_running_loop()


def main_loop() -> asyncio.AbstractEventLoop | None:
    """The loop on which runs begin; None before the first one."""
    return None if _main is None or _main.is_closed() else _main


async def on_main_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` there, from any loop."""
    loop = main_loop()
    if loop in (None, asyncio.get_running_loop()):
        return await work
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


def call_on_main_loop(work: Callable[..., object], *args: Any) -> None:
    """Call `work` there: at once if this is that loop, else soon. From any thread."""
    loop = main_loop()
    try:
        here = loop in (None, asyncio.get_running_loop())
    except RuntimeError:  # in a thread
        here = False
    if here:
        work(*args)
    elif loop is not None:
        loop.call_soon_threadsafe(work, *args)
