"""What an LM is told when its answer did not fit and it is asked again. Imports DSPy.

A run that may be asked again notes its LM calls here, by our adapters (`told`): what was asked, what was answered, and
what did not fit. In the next attempt the predictor that failed has this at the end of its prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import dspy
import pydantic

from dspy_bridge.errors import OutputInvalid
from dspy_bridge.lm.adapters import field_markers
from dspy_bridge.runtime import event_loop

# Of an earlier answer, in characters, as it is shown: an LM that writes without end should not fill its own context.
MOST_SHOWN = 4000
# Of what did not fit.
_MOST_TOLD = 500
_PREFIX = "the LM's answer did not fit the signature: "

# A predictor, as its signature shows it: some modules make a new signature, or a new predictor, for each call.
Key = tuple[str, tuple[str, ...], tuple[str, ...]]


class _Call:
    """One LM call by one adapter. `wrong`: what did not fit, if anything."""

    __slots__ = ("answer", "key", "kind", "messages", "wrong")

    def __init__(self, key: Key, kind: type) -> None:
        self.key = key
        self.kind = kind
        self.messages: list[dict[str, Any]] = []
        self.answer = ""
        self.wrong: str | None = None


class Attempts:
    """The attempts of one run: the LM calls of the present one, and what is told of the one before."""

    def __init__(self, most: int) -> None:
        """`most`: how many attempts there may be."""
        self._most = most
        self._number = 1
        # The last call of each predictor and adapter, in their order.
        self._calls: dict[tuple[Key, type], _Call] = {}
        self._raised: tuple[BaseException, Key] | None = None
        self._told: dict[type, _Call] = {}
        self._of: Key | None = None
        self._wrong = ""

    def next(self, error: OutputInvalid, fields: Iterable[str]) -> None:
        """The next attempt begins: it is told of `error`. `fields`: the outputs that may be meant."""
        self._number += 1
        calls, raised = self._calls, self._raised
        self._calls, self._raised, self._told, self._of = {}, None, {}, None
        self._wrong = _what(error)
        if raised is not None and raised[0] in _chain(error):
            self._of = raised[1]
            last = next((call for call in reversed(calls.values()) if call.key == self._of and call.wrong), None)
            self._wrong = self._wrong if last is None or last.wrong is None else last.wrong
        else:
            # The answer was read, and refused later.
            wanted = set(fields)
            last = next((call for call in reversed(calls.values()) if not wanted.isdisjoint(call.key[2])), None)
            if last is None:
                return
            self._of = last.key
            last.wrong = self._wrong
        self._told = {call.kind: call for call in calls.values() if call.key == self._of and call.wrong is not None}

    def started(self, call: _Call) -> None:
        """A call has begun; the last one of its predictor and adapter counts."""
        self._calls.pop((call.key, call.kind), None)
        self._calls[call.key, call.kind] = call

    def raised(self, error: BaseException, call: _Call) -> None:
        """An error leaves an adapter. The innermost call is the one that failed."""
        if self._raised is None or self._raised[0] is not error:
            self._raised = error, call.key

    def add_to(self, messages: list[dict[str, Any]], call: _Call) -> list[dict[str, Any]]:
        """The messages of a prompt, with what is told of the attempt before."""
        if call.key != self._of:
            return messages
        told = self._told.get(call.kind)
        count = f"attempt {self._number - 1} of {self._most}"
        if told is not None and told.messages == messages and told.answer.strip():
            text = f"This answer did not fit: {_harmless(told.wrong or '', call.key)} ({count}). {_AGAIN}"
            answer = field_markers.without_types(told.answer)
            shown = answer if len(answer) <= MOST_SHOWN else f"{answer[:MOST_SHOWN]}…"
            return [*messages, {"role": "assistant", "content": shown}, {"role": "user", "content": text}]
        # Asked otherwise than before, as in an agent's other trajectory: the answer would belong to another question.
        wrong = self._wrong if told is None or told.wrong is None else told.wrong
        text = f"An earlier answer did not fit: {_harmless(wrong, call.key)} ({count}). {_AGAIN}"
        return _appended(messages, text)


_AGAIN = "Answer again, with all of the fields, in the same format."

# Of the run in this context, if it may be asked again.
current: ContextVar[Attempts | None] = ContextVar("attempts", default=None)
# The call that this context makes.
_call: ContextVar[_Call | None] = ContextVar("call", default=None)


def told(kind: Any) -> Any:
    """A decorator for a class of adapters: its calls are noted, and told of the attempt before."""
    for name, wrapper in (("__call__", _noted), ("acall", _noted_async), ("format", _telling), ("parse", _read)):
        setattr(kind, name, wrapper(getattr(kind, name)))
    return kind


def _noted(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def noted(self: Any, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        event_loop.refuse_sync_call()
        with _noting(type(self), signature):
            return method(self, lm, lm_kwargs, signature, demos, inputs)

    return noted


def _noted_async(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def noted(self: Any, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        with _noting(type(self), signature):
            return await method(self, lm, lm_kwargs, signature, demos, inputs)

    return noted


@contextmanager
def _noting(kind: type, signature: Any) -> Iterator[None]:
    attempts = current.get()
    if attempts is None:
        yield
        return
    call = _Call(_key(signature), kind)
    attempts.started(call)
    before = _call.set(call)
    try:
        yield
    except Exception as error:
        _failed(attempts, call, error)
        raise
    finally:
        _call.reset(before)


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def format(self: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        messages = method(self, signature, demos, inputs)
        attempts, call = current.get(), _call.get()
        if attempts is None or call is None or call.kind is not type(self):
            return messages
        call.messages = messages
        return attempts.add_to(messages, call)

    return format


def _read(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def parse(self: Any, signature: Any, completion: Any) -> Any:
        call = _call.get()
        if call is None or call.kind is not type(self):
            return method(self, signature, completion)
        call.answer = str(completion)
        try:
            return method(self, signature, completion)
        except Exception as error:
            # DSPy may catch it, and ask in JSON.
            call.wrong = _what(error)
            raise

    return parse


def _failed(attempts: Attempts, call: _Call, error: Exception) -> None:
    attempts.raised(error, call)
    if call.wrong is None and isinstance(error, (dspy.AdapterParseError, OutputInvalid)):
        call.wrong = _what(error)
        call.answer = call.answer or str(getattr(error, "lm_response", ""))


def _what(error: BaseException) -> str:
    """What did not fit, for an LM: in one line, without the answer."""
    text = _unread(error) if isinstance(error, dspy.AdapterParseError) else str(error).removeprefix(_PREFIX)
    text = " ".join(text.split())
    return text if len(text) <= _MOST_TOLD else f"{text[:_MOST_TOLD]}…"


def _unread(error: Any) -> str:
    cause = error.__cause__ or error.__context__
    field = next((f"{name}: " for name, info in error.signature.output_fields.items() if _names(error, name, info)), "")
    if isinstance(cause, pydantic.ValidationError):
        first = cause.errors(include_url=False, include_input=False, include_context=False)[0]
        place = "".join(f"[{part!r}]" for part in first["loc"])
        return f"{field}{place} {first['msg']}".strip()
    if field or isinstance(cause, ValueError):
        return f"{field}{cause}"
    got = error.parsed_result or ()
    missing = [name for name in error.signature.output_fields if name not in got]
    return f"{', '.join(missing)} could not be read from it" if missing else "a value did not fit its type"


def _names(error: Any, name: str, info: Any) -> bool:
    """Whether a field's value was wrong. DSPy has a text alone, in which XMLAdapter shows the whole field."""
    return any(error.message.startswith(f"Failed to parse field {shown}") for shown in (f"{name} ", f"{name}:", info))


def _key(signature: Any) -> Key:
    # `hint_` is what Refine adds from its second run on.
    inputs = tuple(name for name in signature.input_fields if name != "hint_")
    return signature.instructions, inputs, tuple(signature.output_fields)


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:  # one may be raised from itself
        yield found
        seen.add(id(found))
        found = found.__cause__


def _harmless(text: str, key: Key) -> str:
    """The text without field markers of any adapter: it may quote the answer."""
    text = field_markers.without_headers(field_markers.without_types(text))
    return field_markers.without_tags(text, {*key[1], *key[2], "entry"})


def _appended(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """With `text` at the end of the last message: some servers refuse two of a user in a row."""
    *before, last = messages
    content = last["content"]
    # Parts, if there is an image or the like.
    longer = f"{content}\n\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*before, {**last, "content": longer}]
