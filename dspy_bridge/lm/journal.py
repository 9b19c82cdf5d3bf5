"""The journal of a request: each answer of an LM is sent to the client, and replayed when the request is sent again.

It hooks below DSPy's own handling of an answer: callbacks, meters, cut-offs and parsers see a replayed answer as a live
one. A client that resumes a run sends the entries that it has, and the LM is asked for the rest. Imports DSPy.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
from collections import Counter
from typing import Any, NamedTuple

import dspy
import orjson

from dspy_bridge.dispatch.call import Call
from dspy_bridge.errors import FrameTooLarge, InvalidArgs, JournalMismatch, NotAllowed
from dspy_bridge.lm import dspy_internals, lm_call, lm_options
from dspy_bridge.lm.lm_call import RunContext
from dspy_bridge.lm.metering import endings
from dspy_bridge.lm.transport import routes
from dspy_bridge.runtime import large_inputs
from dspy_bridge.wire import messages
from dspy_bridge.wire.json_values import encode_value

_VERSION = 1
# More are refused: each takes 2 µs and 1 KB.
_MOST = 100_000
# An entry must fit into a frame with so much room to spare: it comes back with others and the request's own arguments.
_SPARE = 1.3
# How long nothing may be under way, in seconds, until a call that fits no entry means that the run is another one. And
# how often that is looked at.
_QUIET, _POLL = 1.0, 0.005
# What is no part of a question: where and how it is asked. A rotated key or a moved server changes no answer.
_NOT_ASKED = frozenset(
    (*routes.ADDRESSES, *lm_options.OF_SERVER, "cache", "num_retries", "max_retries", "prompt_cache")
)


class Ticket(NamedTuple):
    """Which call it is: of an item of a list of inputs, the question's hash, and how many equal ones came before."""

    item: int | None
    key: str
    nth: int


def check_hooks(argument: str) -> None:
    """Raises `NotAllowed` where DSPy has changed too much: a run without its journal or budget would seem to work."""
    made, hooks = dspy_internals.CALL_RESULT.value, (dspy_internals.CALL, dspy_internals.ASYNC_CALL)
    if not all(hook.there for hook in hooks) or not all(hasattr(made, name) for name in ("dump", "load", "native")):
        raise NotAllowed(f"{argument}: this bridge cannot see all calls of LMs in DSPy {dspy.__version__}")


class Journal:
    """The entries of one request. Calls of several threads and event loops may use it."""

    @classmethod
    async def read(cls, call: Call) -> Journal:
        """The journal of a request. Raises `InvalidArgs`, naming the entry that is wrong, and `NotAllowed`."""
        check_hooks("journal")
        given = call.request.journal or []
        return cls(call, await large_inputs.in_thread(lambda: _read(given)) if given else {})

    def __init__(self, call: Call, recorded: dict[Ticket, dict[str, Any]]) -> None:
        self._call = call
        self._recorded = recorded
        self._last = max((entry["n"] for entry in self._recorded.values()), default=0)
        self._total = len(self._recorded)
        # By item: the entries that no call has taken yet.
        self._left = Counter(ticket.item for ticket in self._recorded)
        self._seen: Counter[tuple[int | None, str]] = Counter()
        self._replayed = self._live = 0
        self._lock = threading.Lock()

    def counts(self) -> dict[str, int]:
        """For meta: LM calls that were replayed and recorded, and entries that no call has taken."""
        return {"replayed": self._replayed, "live": self._live, "unused": len(self._recorded)}

    def ticket(self, item: int | None, lm: Any, prompt: Any, messages: Any, options: dict[str, Any]) -> Ticket:
        """The ticket of a call that starts now. Nothing may be awaited before: equal calls differ by their order."""
        key = _key(lm, prompt, messages, options)
        with self._lock:
            nth = self._seen[item, key]
            self._seen[item, key] += 1
        return Ticket(item, key, nth)

    async def recorded(self, ticket: Ticket, run: RunContext) -> dict[str, Any] | None:
        """The entry of a call; None if the LM is to be asked. Ends the run if it is not the one that was recorded.

        Of parallel calls some may have been answered and others not. So a call that fits no entry waits for as long as
        others may still take the rest.
        """
        with self._lock:
            if (entry := self._recorded.pop(ticket, None)) is not None:
                self._left[ticket.item] -= 1
                self._replayed += 1
                return entry
        since = time.monotonic()
        while self._left[ticket.item]:
            now = time.monotonic()
            if run.under_way:
                since = now
            elif now - since > _QUIET:
                left = len(self._recorded)
                text = f"journal: {left} of its {self._total} entries fit{'s' * (left == 1)} no call of this run"
                run.give_up(
                    JournalMismatch(f"{text}; expected the program, inputs and options that it was recorded with")
                )
            await asyncio.sleep(_POLL)
        return None

    async def add(self, ticket: Ticket, run: RunContext, what: dict[str, Any]) -> None:
        """Send an entry, before what follows from the answer. If the pipe is full, returns once the entry is in it."""
        with self._lock:
            self._last += 1
            self._live += 1
            item = {} if ticket.item is None else {"item": ticket.item}
            entry = {"n": self._last, **item, "key": ticket.key, "nth": ticket.nth, **what}
        payload = messages.encode_journal(self._call.id, entry)
        most = int(self._call.max_bytes / _SPARE)
        if len(payload) > most:
            run.give_up(FrameTooLarge(f"journal: the entry has {len(payload)} bytes: expected at most {most}"))
        await lm_call.on_main_loop(self._call.send_written(payload))


def _read(given: list[Any]) -> dict[Ticket, dict[str, Any]]:
    """The entries by their tickets. Of equal ones the last counts; an error that nothing followed is asked again."""
    if len(given) > _MOST:
        raise InvalidArgs(f"journal: {len(given)} entries; expected at most {_MOST}")
    entries: dict[Ticket, dict[str, Any]] = {}
    last: dict[int | None, tuple[int, Ticket]] = {}
    for index, entry in enumerate(given):
        where = f"journal[{index}]"
        if not isinstance(entry, dict):
            raise InvalidArgs(f"{where}: expected an object")
        item, key = entry.get("item"), entry.get("key")
        for name in ("n", "nth", *(("item",) if item is not None else ())):
            if type(entry.get(name)) is not int or entry[name] < 0:
                raise InvalidArgs(f"{where}.{name}: expected a whole number")
        if not isinstance(key, str):
            raise InvalidArgs(f"{where}.key: expected text")
        if ("answer" in entry) == ("error" in entry):
            raise InvalidArgs(f"{where}: expected an answer or an error")
        try:
            if "answer" in entry:
                _loaded(entry["answer"])
            elif not isinstance(entry["error"]["type"], str):
                raise TypeError("its type is no text")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InvalidArgs(f"{where}: not as it was sent: {type(error).__name__}: {error}") from None
        ticket = Ticket(item, key, entry["nth"])
        entries[ticket] = entry
        last[item] = max(last.get(item, (0, ticket)), (entry["n"], ticket), key=lambda one: one[0])
    for _n, ticket in last.values():
        if "error" in entries[ticket]:
            del entries[ticket]
    return entries


def _key(lm: Any, prompt: Any, messages: Any, options: dict[str, Any]) -> str:
    asked = {name: value for name, value in {**lm.kwargs, **options}.items() if name not in _NOT_ASKED}
    question = [
        lm.model,
        lm.model_type,
        prompt,
        messages,
        {name: asked[name] for name in asked if asked[name] is not None},
    ]
    options_ = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS
    try:
        data = orjson.dumps(question, default=_plain, option=options_)
    except (TypeError, ValueError):
        data = encode_value(question)
    return hashlib.sha256(data).hexdigest()[:32]


def _plain(value: Any) -> Any:
    """Of what an LM is asked: a type is a response schema."""
    if isinstance(value, type):
        return value.model_json_schema() if hasattr(value, "model_json_schema") else value.__name__
    if hasattr(value, "model_dump"):
        return value.model_dump()
    return str(value)


def _dumped(result: Any) -> dict[str, Any]:
    """An answer as JSON: without the provider's data, of which only the finish reasons are needed, and text once."""
    record = result.dump()
    native = [{name: part for name, part in one.items() if name != "provider_data"} for one in record["responses"]]
    texts = [output if isinstance(output, dict) else {"text": output} for output in record["outputs"]]
    return {
        "v": _VERSION,
        "engine": "lm15" if native else "litellm",
        "responses": native or texts,
        "finish_reasons": endings.reasons(result.responses or result.raw),
        "model": record["response_model"],
        "usage": record["usage"],
        "cost": record["cost"],
        **({"cached": True} if result.cache_hit else {}),
    }


def _loaded(answer: dict[str, Any]) -> Any:
    """DSPy's result, which has no outputs yet if they are in `responses`. Raises what its shape makes DSPy raise."""
    native, responses, usage = answer["engine"] == "lm15", answer["responses"], answer["usage"]
    if answer["v"] != _VERSION or not isinstance(usage, dict) or not responses or not isinstance(responses, list):
        raise ValueError(f"expected the version {_VERSION} with responses and usage")
    if not native and not all(isinstance(one["text"], str | None) for one in responses):
        raise TypeError("expected a text in each of its responses")
    if not isinstance(answer["cost"], float | int | None) or not isinstance(answer["finish_reasons"], list):
        raise TypeError("expected a cost and finish_reasons")
    return dspy_internals.CALL_RESULT.value.load(
        {
            "responses": responses if native else [],
            "outputs": [] if native else [one if len(one) > 1 else one["text"] for one in responses],
            "cost": 0.0,
            "response_model": answer["model"],
        }
    )


def _result(lm: Any, call: Any, answer: dict[str, Any]) -> Any:
    """The result for DSPy, whose outputs are read from the LM's own words."""
    loaded = _loaded(answer)
    if not loaded.responses:
        loaded.raw = loaded.provider_response()
        return loaded
    options = {"model_type": lm.model_type, "logprobs": bool(call.legacy.get("logprobs"))}
    parts = [dspy_internals.CALL_RESULT.value.native(one, **options) for one in loaded.responses]
    outputs = [output for part in parts for output in part.outputs]
    if len(parts) > 1 and any(isinstance(output, dict) for output in outputs):
        outputs = [output if isinstance(output, dict) else {"text": output} for output in outputs]
    loaded.outputs = outputs
    return loaded


class _Replayed(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """An LM's error of which the journal does not say more."""


def _error(given: dict[str, Any], lm: Any) -> Exception:
    kind = getattr(dspy, given["type"], None)
    text = f"{given['type']} (replayed)"
    if isinstance(kind, type) and issubclass(kind, dspy.LMError):
        with contextlib.suppress(TypeError):
            made: Exception = kind(text, model=lm.model)
            return made
    return _Replayed(text)


class Recording:
    """One call of an LM under a journal: `begin`, and then `replay`, or `answered` or `failed`, and `close`."""

    def __init__(self, lm: Any, call: Any, run: RunContext) -> None:
        """`call`: prepared by DSPy. On the thread that makes it."""
        self._lm, self._call, self._run = lm, call, run
        self._here = lm_call.current.get()
        ticket = None if self._here is None else self._here.ticket
        if ticket is None:  # of an LM that your application made
            options = {**call.kwargs, "request": call.request}
            ticket = run.journal.ticket(run.item, lm, call.prompt, call.messages, options)
        self._ticket: Ticket = ticket

    async def begin(self) -> dict[str, Any] | None:
        """As `Journal.recorded`."""
        entry: dict[str, Any] | None = await self._run.journal.recorded(self._ticket, self._run)
        if entry is None:
            self._run.under_way.add(self)
            self._run.recording.add(self)
        return entry

    async def replay(self, entry: dict[str, Any]) -> Any:
        """The recorded result. Raises the recorded error."""
        if "error" in entry:
            raise _error(entry["error"], self._lm)
        answer = entry["answer"]
        if self._here is not None:
            self._here.replayed = answer
        if self._run.budget is not None and not answer.get("cached"):
            # Else each resend would have a budget of its own.
            self._run.budget.spend(endings.tokens(answer["usage"]), answer["cost"] or 0.0, len(answer["responses"]))
        result = _result(self._lm, self._call, answer)
        if self._run.stream is not None:
            await self._run.stream.replay(result)
        return result

    async def answered(self, result: Any) -> None:
        await self._run.journal.add(self._ticket, self._run, {"answer": _dumped(result)})

    async def failed(self, error: Exception) -> None:
        retryable = bool(isinstance(error, dspy.LMError) and dspy.is_retryable_lm_error(error))
        what = {"type": type(error).__name__, "retryable": retryable}
        await self._run.journal.add(self._ticket, self._run, {"error": what})

    def close(self) -> None:
        self._run.under_way.discard(self)
        self._run.recording.discard(self)
