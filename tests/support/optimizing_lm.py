"""The LM of the tests of optimizers: it answers some questions rightly, and all of them under one instruction.

That instruction is what it proposes whenever it is asked for a better one. Each answer depends on the request alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from lm_server import chat

GOOD = "Answer with the capitals of the question."
QUESTIONS = [f"word {number}" for number in range(12)]

# With it each optimizer finds something better than what it starts with.
SALT = 1
_FIELD = re.compile(r"`(?:\[\[ ## )?(\w+)(?: ## \]\])?`")


def expected(question: str) -> str:
    """The right answer."""
    return question.upper()


def answer(messages: list[dict[str, Any]], temperature: float | None = None, *, by_luck: bool = True) -> str:
    """What the LM writes. `by_luck`: some answers are right without the instruction, by demos and temperature."""
    system, last = _text(messages[0]), _text(messages[-1])
    asked, _, wanted = last.rpartition("Respond with")
    fields = [field for field in _FIELD.findall(wanted) if field != "completed"] if asked else []
    if not fields:
        # GEPA's prompt of its own.
        return f"```\n{GOOD}\n```"
    demos = "".join(_text(message) for message in messages[1:-1])
    luck = f"{demos}{temperature}" if by_luck else None
    values = {field: _value(field, asked, system, luck) for field in fields}
    return json.dumps(values) if "JSON" in wanted else chat(**values)


def _value(field: str, asked: str, system: str, luck: str | None) -> Any:
    if field == "answer":
        question = re.findall(r"\[\[ ## question ## \]\]\n(.*)\n", asked)[-1]
        lucky = luck is not None and hashlib.sha256(f"{SALT}{question}{luck}".encode()).digest()[0] % 3 == 0
        return expected(question) if GOOD in system or lucky else "no idea"
    if field == "module_advice":
        names = re.findall(r"\[\[ ## module_names ## \]\]\n(\[[^\]]*\])", asked)[-1]
        return json.dumps(dict.fromkeys(json.loads(names), GOOD))
    return GOOD if "instruction" in field else f"some {field}"


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
