"""`offline/script`: an LM whose answers the client chooses, for tests.

`answers` is a list, from which each LM call takes the next one, or an object of texts and answers. An answer is a
string, which is sent as it is, or an object of output fields, which is written in the adapter's format.
"""

from __future__ import annotations

import threading
from typing import Any

import dspy

from dspy_bridge.errors import InvalidArgs, short
from dspy_bridge.lm.offline.offline_lm import Asked
from dspy_bridge.wire.json_values import encode_value

NAME = "offline/script"
# The key of an object's answer to all questions without one of their own.
_ANY = "*"
# Fields of DSPy's modules, which an object of fields may leave out.
_LEFT_OUT: dict[str, Any] = {"reasoning": "", "rationale": "", "next_thought": "", "next_tool_args": {}}


class NoAnswer(dspy.LMError):  # type: ignore[misc]  # DSPy ships no types
    """The script has no answer to what the LM was asked."""

    def __init__(self, text: str) -> None:
        super().__init__(text, model=NAME)


class Script:
    """The answers of one LM, or of several with one list."""

    def __init__(self, answers: object) -> None:
        """Raises `InvalidArgs`."""
        if not isinstance(answers, (list, dict)) or not answers:
            raise InvalidArgs("lm.answers: expected a list of answers, or an object of texts and answers")
        for where, one in answers.items() if isinstance(answers, dict) else enumerate(answers):
            if not isinstance(one, (str, dict)):
                place = short(where) if isinstance(where, str) else where
                raise InvalidArgs(f"lm.answers[{place}]: expected text, or an object of output fields")
        self._answers = answers
        self._taken = 0
        # LMs are called in several threads.
        self._lock = threading.Lock()

    def answer(self, texts: list[str], asked: Asked | None) -> str:
        """The answer to messages, whose texts are given. Raises `NoAnswer`."""
        chosen = self._next() if isinstance(self._answers, list) else self._matching(self._answers, texts[-1])
        if isinstance(chosen, str):
            return chosen
        return encode_value(chosen).decode() if asked is None else _written(chosen, asked)

    def _next(self) -> Any:
        with self._lock:
            if self._taken == len(self._answers):
                raise NoAnswer(f"all {self._taken} answers are used")
            self._taken += 1
            return self._answers[self._taken - 1]

    def _matching(self, answers: dict[str, Any], question: str) -> Any:
        # The longest text says most about the question.
        found = max((text for text in answers if text != _ANY and text in question), key=len, default=_ANY)
        if found not in answers:
            raise NoAnswer(f"the last message contains none of the {len(answers)} texts of its answers")
        return answers[found]


def _written(fields: dict[str, Any], asked: Asked) -> str:
    """An answer of these fields alone, in the adapter's format."""
    signature = asked.signature
    for name in fields:
        if name not in signature.output_fields:
            expected = ", ".join(signature.output_fields)
            raise NoAnswer(f"its answer has an unknown field {short(name)}; expected {expected}")
    values = {name: _LEFT_OUT[name] for name in signature.output_fields if name in _LEFT_OUT} | fields
    for name, field in signature.output_fields.items():
        if name not in values:
            signature = signature.delete(name)
        elif field.annotation is dspy.ToolCalls and isinstance(values[name], list):
            values[name] = dspy.ToolCalls.from_dict_list(values[name])
    text: str = asked.adapter.format_assistant_message_content(signature, values)
    return text
