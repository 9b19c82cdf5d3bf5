"""Asks an LM again whose answer did not fit, with its answer and what did not fit. Imports DSPy.

Each call of one of our adapters is repeated on its own, so that neither the program nor its tools run again.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import dspy
import pydantic

from dspy_bridge.errors import OutputInvalid
from dspy_bridge.lm import lm_call
from dspy_bridge.lm.adapters import field_markers
from dspy_bridge.runtime import event_loop

# How much of an earlier answer is shown, in characters: an LM that writes without end should not fill its own context.
MOST_SHOWN = 4000
# The longest text of what did not fit, in characters.
_MOST_TOLD = 500
_PREFIX = "the LM's answer did not fit the signature: "
_AGAIN = "Answer again, with all of the fields, in the same format."


class Attempts(NamedTuple):
    """How a run asks again. `most`: how often an LM is asked at most for each answer.

    `fits`: raises `OutputInvalid` if the fields that an adapter has read of an answer to this signature do not fit the
    program's. `translate`: gives the error of ours for one of DSPy's. `say`: called before an LM is asked again, with
    the error, from any thread.
    """

    most: int
    fits: Callable[[Any, dict[str, Any]], None]
    translate: Callable[[Exception], Exception]
    say: Callable[[OutputInvalid], None]


class _Call:
    """One call of an adapter. An adapter may make another one of itself, in JSON: each format has its own answer."""

    def __init__(self, attempts: Attempts) -> None:
        self.attempts = attempts
        self._number = 1
        # By the adapter's class: the last answer, and what did not fit, if anything.
        self._answers: dict[type, str] = {}
        self._wrong: dict[type, str] = {}

    def answered(self, kind: type, answer: str) -> None:
        self._answers[kind] = answer

    def did_not_fit(self, kind: type, error: Exception) -> None:
        self._wrong[kind] = _what(error)

    def again(self, kind: type, error: Exception) -> bool:
        """Whether the LM is to be asked again after this error; if so, the next attempt begins."""
        known = self.attempts.translate(error)
        if not isinstance(known, OutputInvalid) or not known.by_lm or self._number == self.attempts.most:
            return False
        self._number += 1
        self._wrong.setdefault(kind, _what(error))
        self.attempts.say(known)
        return True

    def add_to(self, messages: list[dict[str, Any]], kind: type, signature: Any) -> list[dict[str, Any]]:
        """The messages of a prompt, with what is told of the attempt before."""
        wrong = self._wrong.pop(kind, None)
        if wrong is None:
            return messages
        count = f"attempt {self._number - 1} of {self.attempts.most}"
        text = f"answer did not fit: {_harmless(wrong, signature)} ({count}). {_AGAIN}"
        answer = field_markers.without_types(self._answers.pop(kind, ""))
        if not answer.strip():  # providers refuse messages without content
            return _appended(messages, f"An earlier {text}")
        shown = answer if len(answer) <= MOST_SHOWN else f"{answer[:MOST_SHOWN]}…"
        return [*messages, {"role": "assistant", "content": shown}, {"role": "user", "content": f"This {text}"}]


# The call of an adapter that this context makes.
_call: ContextVar[_Call | None] = ContextVar("call", default=None)


def asking_again(kind: Any) -> Any:
    """A decorator for a class of adapters."""
    for name, wrapper in (("__call__", _sync), ("acall", _async), ("format", _telling), ("parse", _read)):
        setattr(kind, name, wrapper(getattr(kind, name)))
    return kind


def _attempts() -> Attempts | None:
    """How the call that begins asks again; None if it does not, or is part of another one that does."""
    attempts: Attempts | None = lm_call.run().attempts
    return attempts if _call.get() is None else None


@contextmanager
def _calling(attempts: Attempts) -> Iterator[_Call]:
    call = _Call(attempts)
    token = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(token)


def _sync(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def asked(self: Any, lm: Any, lm_kwargs: Any, *args: Any, **rest: Any) -> Any:
        event_loop.refuse_sync_call()
        if (attempts := _attempts()) is None:
            return method(self, lm, lm_kwargs, *args, **rest)
        with _calling(attempts) as call:
            while True:
                try:
                    return method(self, lm, dict(lm_kwargs), *args, **rest)
                except Exception as error:
                    if not call.again(type(self), error):
                        raise

    return asked


def _async(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def asked(self: Any, lm: Any, lm_kwargs: Any, *args: Any, **rest: Any) -> Any:
        if (attempts := _attempts()) is None:
            return await method(self, lm, lm_kwargs, *args, **rest)
        with _calling(attempts) as call:
            while True:
                try:
                    return await method(self, lm, dict(lm_kwargs), *args, **rest)
                except Exception as error:
                    if not call.again(type(self), error):
                        raise
                await asyncio.sleep(0)  # what was said goes first

    return asked


def _telling(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def format(self: Any, signature: Any, demos: Any, inputs: Any) -> Any:
        messages, call = method(self, signature, demos, inputs), _call.get()
        return messages if call is None else call.add_to(messages, type(self), signature)

    return format


def _read(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def parse(self: Any, signature: Any, completion: Any) -> Any:
        call = _call.get()
        if call is None:
            return method(self, signature, completion)
        call.answered(type(self), str(completion))
        try:
            fields = method(self, signature, completion)
            call.attempts.fits(signature, fields)
            return fields
        except Exception as error:
            # DSPy may catch it, and ask in JSON.
            call.did_not_fit(type(self), error)
            raise

    return parse


def _what(error: BaseException) -> str:
    """What did not fit, for an LM: in one line, without the answer."""
    text = _unread(error) if isinstance(error, dspy.AdapterParseError) else str(error).removeprefix(_PREFIX)
    text = " ".join(text.split())
    return text if len(text) <= _MOST_TOLD else f"{text[:_MOST_TOLD]}…"


def _unread(error: Any) -> str:
    cause = error.__cause__ or error.__context__
    field = next((f"{name}: " for name, info in error.signature.output_fields.items() if _names(error, name, info)), "")
    if isinstance(cause, pydantic.ValidationError):
        return f"{field}{first_of(cause)}"
    if field or isinstance(cause, ValueError):
        return f"{field}{cause}"
    got = error.parsed_result or ()
    missing = [name for name in error.signature.output_fields if name not in got]
    return f"{', '.join(missing)} could not be read from it" if missing else "a value did not fit its type"


def first_of(error: pydantic.ValidationError) -> str:
    """What is wrong first, without the value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{''.join(f'[{part!r}]' for part in first['loc'])} {first['msg']}".strip()


def _names(error: Any, name: str, info: Any) -> bool:
    """Whether a field's value was wrong. DSPy has a text alone, in which XMLAdapter shows the whole field."""
    return any(error.message.startswith(f"Failed to parse field {shown}") for shown in (f"{name} ", f"{name}:", info))


def _harmless(text: str, signature: Any) -> str:
    """The text without field markers of any adapter: it may quote the answer."""
    text = field_markers.without_headers(field_markers.without_types(text))
    return field_markers.without_tags(text, {*signature.fields, "entry"})


def _appended(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """With `text` at the end of the last message: some servers refuse two of a user in a row."""
    *before, last = messages
    content = last["content"]
    # Parts, if there is an image or the like.
    longer = f"{content}\n\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*before, {**last, "content": longer}]
