"""The LM of the tests of optimizers: it answers some questions rightly, and all of them under one instruction.

That instruction is what it proposes whenever it is asked for a better one. Each answer depends on the request alone.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

from lm_server import chat

GOOD = "Answer with the capitals of the question."
QUESTIONS = [f"word {number}" for number in range(12)]

_FIELD = re.compile(r"`(?:\[\[ ## )?(\w+)(?: ## \]\])?`")


def expected(question: str) -> str:
    """The right answer."""
    return question.upper()


def answer(messages: list[dict[str, Any]], *, by_luck: bool = True) -> str:
    """What the LM writes. `by_luck`: without the instruction, some are right, others with other demos."""
    system, last = _text(messages[0]), _text(messages[-1])
    asked, _, wanted = last.rpartition("Respond with")
    fields = _FIELD.findall(wanted) if asked else []
    fields = [field for field in fields if field != "completed"]
    if not fields:
        # GEPA's prompt of its own.
        return f"```\n{GOOD}\n```"
    values = {field: _value(field, asked, system, len(messages) if by_luck else None) for field in fields}
    return json.dumps(values) if "JSON" in wanted else chat(**values)


def _value(field: str, asked: str, system: str, luck: int | None) -> str:
    if field == "answer":
        question = re.findall(r"\[\[ ## question ## \]\]\n(.*)\n", asked)[-1]
        lucky = luck is not None and zlib.crc32(f"{question}{luck}".encode()) % 2 == 0
        return expected(question) if GOOD in system or lucky else "no idea"
    if field == "module_advice":
        names = json.loads(re.findall(r"\[\[ ## module_names ## \]\]\n(.*)\n", asked)[-1])
        return json.dumps(dict.fromkeys(names, GOOD))
    return GOOD if "instruction" in field else f"some {field}"


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
