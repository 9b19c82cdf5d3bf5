"""DSPy's two kinds of ReAct: tests with the mark `agents` run with both.

Their LMs answer as the one by trajectory is answered; for the one by history the answers are translated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

# That of the test under way.
version = "v1"


def env() -> dict[str, str]:
    """Settings of its peers."""
    return {} if version == "v1" else {"DSPY_BRIDGE_REACT": version}


def calls(*named: tuple[str, Any], thought: str = "t") -> str:
    """A step by history, in chat's format."""
    return _written({"next_thought": thought}, list(named))


def for_version(answers: Iterable[Any]) -> list[Any]:
    """A list of answers for the test's ReAct."""
    left, made = list(answers), []
    while left:
        answer = left.pop(0)
        fields = {} if version == "v1" or not isinstance(answer, str) else _fields(answer)
        if "next_tool_name" not in fields:
            made.append(answer)
            continue
        name, args = fields["next_tool_name"], fields["next_tool_args"]
        if name == "finish":
            # The outputs are the next answer.
            name, args = "submit", _fields(left.pop(0)) if left else {}
        args = json.loads(args) if isinstance(args, str) else args
        made.append(_written({"next_thought": fields["next_thought"]}, [(name, args)], as_json=answer.startswith("{")))
    return made


def _fields(answer: str) -> dict[str, Any]:
    if answer.startswith("{"):
        return dict(json.loads(answer))
    parts = re.split(r"^\[\[ ## (\w+) ## \]\]\n?", answer, flags=re.MULTILINE)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True) if name != "completed"}


def _written(fields: dict[str, Any], named: list[tuple[str, Any]], *, as_json: bool = False) -> str:
    made: dict[str, Any] = {"tool_calls": [{"name": name, "args": args} for name, args in named]}
    if as_json:
        return json.dumps({**fields, "tool_calls": made})
    texts = {**fields, "tool_calls": json.dumps(made)}
    return "\n\n".join(f"[[ ## {name} ## ]]\n{text}" for name, text in texts.items()) + "\n\n[[ ## completed ## ]]"
