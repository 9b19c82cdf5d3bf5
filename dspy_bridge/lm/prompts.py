"""Prompts as DSPy 3.4 has them: what an adapter's `format` returns and an LM is sent is a list of messages.

Nothing else here knows that: DSPy 3.5 has an object of its own.
"""

from __future__ import annotations

from typing import Any


class Formatted(str):
    """Text that an adapter made of fields (a ReAct's trajectory): its markers are the adapter's own."""

    __slots__ = ()


def plain(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The prompt with plain strings: LMs get no type of ours."""
    return [
        {**message, "content": str(message["content"])} if type(message.get("content")) is Formatted else message
        for message in prompt
    ]


def with_turn(prompt: list[dict[str, Any]], answer: str, text: str) -> list[dict[str, Any]]:
    """The prompt, an LM's answer to it, and a text that follows."""
    return [*prompt, {"role": "assistant", "content": answer}, {"role": "user", "content": text}]


def of_call(inputs: dict[str, Any]) -> Any:
    """What an LM is sent, from the arguments of its call, as DSPy's callbacks get them."""
    if inputs.get("messages") is not None:
        return inputs["messages"]
    # A typed request of DSPy's has messages, too.
    asked = (inputs.get("prompt"), inputs.get("request"), inputs.get("kwargs", {}).get("request"))
    first = next((given for given in (*asked, *inputs.get("items", ())) if given is not None), None)
    return [{"role": "user", "content": first}] if isinstance(first, str) else getattr(first, "messages", None)
