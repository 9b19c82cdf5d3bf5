"""Asks an LM again whose answer did not fit, with its answer and what did not fit. Imports DSPy.

Each call of one of our adapters is repeated on its own, so that neither the program nor its tools run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import dspy
import pydantic

from dspy_bridge.errors import OutputInvalid
from dspy_bridge.lm import lm_call, prompts
from dspy_bridge.lm.adapters import field_markers

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
    say: Callable[[OutputInvalid], object]


class _Call:
    def __init__(self, attempts: Attempts) -> None:
        self.attempts = attempts
        self.number = 1
        # The last answer and its error, by the adapter's class: in JSON an adapter may make another call of itself.
        self.unfit: dict[type, tuple[str, Exception]] = {}

    def again(self, kind: type, error: Exception) -> bool:
        """Whether the LM is to be asked again after this error; if so, the next attempt begins."""
        known = self.attempts.translate(error)
        if not isinstance(known, OutputInvalid) or not known.by_lm or self.number == self.attempts.most:
            return False
        self.number += 1
        self.unfit.setdefault(kind, ("", error))
        self.attempts.say(known)
        return True


# The call of an adapter that this context makes.
_call: ContextVar[_Call | None] = ContextVar("call", default=None)


@contextmanager
def calling() -> Iterator[Callable[[type, Exception], bool]]:
    """Around a call of an adapter: says after an error whether to ask again. The call within another never is."""
    attempts: Attempts | None = lm_call.run().attempts
    if attempts is None or _call.get() is not None:
        yield lambda _kind, _error: False
        return
    call = _Call(attempts)
    token = _call.set(call)
    try:
        yield call.again
    finally:
        _call.reset(token)


def check(signature: Any, fields: dict[str, Any]) -> None:
    """Raises `OutputInvalid` if the fields of an answer do not fit the program."""
    if (call := _call.get()) is not None and fields:
        call.attempts.fits(signature, fields)


def check_calls(kind: type, signature: Any, answers: list[dict[str, Any]]) -> None:
    """As `check`, for answers that call tools natively, which no adapter parses."""
    for fields in answers if _call.get() is not None else ():
        calls = [value for value in fields.values() if isinstance(value, dspy.ToolCalls)]
        try:
            check(signature, fields if calls else {})
        except OutputInvalid as error:
            did_not_fit(kind, calls[0].model_dump_json(), error)
            raise


def did_not_fit(kind: type, answer: Any, error: Exception) -> None:
    """Keep an answer, of which the next attempt is told."""
    if (call := _call.get()) is not None:
        call.unfit[kind] = str(answer), error


def add_to(prompt: Any, kind: type, signature: Any) -> Any:
    call = _call.get()
    if call is None or kind not in call.unfit:
        return prompt
    answer, error = call.unfit.pop(kind)
    count = f"attempt {call.number - 1} of {call.attempts.most}"
    # It may quote the answer.
    wrong = field_markers.without_headers(field_markers.without_types(_what(error)))
    wrong = field_markers.without_tags(wrong, {*signature.fields, "entry"})
    text = f"This answer did not fit: {wrong} ({count}). {_AGAIN}"
    # Providers refuse messages without content.
    answer = field_markers.without_types(answer) if answer.strip() else "(no answer)"
    shown = answer if len(answer) <= MOST_SHOWN else f"{answer[:MOST_SHOWN]}…"
    return prompts.with_turn(prompt, shown, text)


def _what(error: BaseException) -> str:
    """What did not fit, for an LM: in one line, without the answer."""
    text = _unread(error) if isinstance(error, dspy.AdapterParseError) else str(error).removeprefix(_PREFIX)
    text = " ".join(text.split())
    return text if len(text) <= _MOST_TOLD else f"{text[:_MOST_TOLD]}…"


def _unread(error: Any) -> str:
    cause, fields = error.__cause__ or error.__context__, error.signature.output_fields
    # DSPy has a text alone, in which XMLAdapter shows the whole field.
    failed = {
        name: [f"Failed to parse field {one}" for one in (f"{name} ", f"{name}:", fields[name])] for name in fields
    }
    field = next((f"{name}: " for name, texts in failed.items() if error.message.startswith(tuple(texts))), "")
    if isinstance(cause, pydantic.ValidationError):
        return f"{field}{first_of(cause)}"
    if field or isinstance(cause, ValueError):
        return f"{field}{cause}"
    missing = [name for name in fields if name not in (error.parsed_result or ())]
    return f"{', '.join(missing)} could not be read from it" if missing else "a value did not fit its type"


def first_of(error: pydantic.ValidationError) -> str:
    """What is wrong first, without the value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{''.join(f'[{part!r}]' for part in first['loc'])} {first['msg']}".strip()
