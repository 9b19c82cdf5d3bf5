"""json_repairs: JSON that an LM broke is repaired as DSPy has it, unless that would take the square of its length."""

from __future__ import annotations

import json
from typing import Any

import dspy
import json_repair
import pytest

from dspy_bridge import json_repairs
from dspy_bridge.adapters import guarded
from dspy_bridge.json_repairs import TooMuchToRepair

json_repairs.install()

# Before there was a limit, each took from a minute to hours, a hundredth of it seconds.
ENDLESS = ['["', "{", "[{", "(", 'x {"a" ', '{"a":', "[{]", '["{",']
TYPED = dspy.Signature("question -> items: list[str]")
COUNTED = dspy.Signature("question -> items: dict[str, int]")


@pytest.mark.parametrize("unit", ENDLESS)
@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()])
@pytest.mark.timeout(20)
def test_a_megabyte_that_opens_and_does_not_close_is_refused(adapter: dspy.Adapter, unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    marked = {"ChatAdapter": f"[[ ## items ## ]]\n{text}", "XMLAdapter": f"<items>{text}</items>"}
    with pytest.raises((TooMuchToRepair, dspy.AdapterParseError)):
        guarded(adapter, strict=True).parse(COUNTED, marked.get(type(adapter).__name__, text))


@pytest.mark.timeout(20)
def test_a_list_of_braces_is_not_searched_for_an_object() -> None:
    """It is JSON, so that nothing is to be repaired; DSPy would search it with a recursive pattern."""
    with pytest.raises(TooMuchToRepair):
        guarded(dspy.JSONAdapter(), strict=True).parse(TYPED, json.dumps(["{"] * 100_000))


@pytest.mark.timeout(20)
def test_the_json_that_a_chat_adapter_falls_back_to_has_the_limit() -> None:
    class Endless(dspy.BaseLM):
        def forward(self, prompt: Any = None, messages: Any = None, **_kwargs: Any) -> Any:
            raise AssertionError("not asked like this")

        def __call__(self, *_args: Any, **_kwargs: Any) -> list[str]:
            return [json.dumps(["{"] * 100_000)]

    with pytest.raises(TooMuchToRepair):
        guarded(dspy.ChatAdapter(), strict=True)(Endless("own/endless"), {}, TYPED, [], {"question": "?"})


def test_what_is_json_has_no_limit() -> None:
    """Nor has what stands between other text."""
    items = [f"{{[({n}" for n in range(20_000)]
    text = json.dumps({"items": items})
    assert json_repair.loads(text) == {"items": items}
    adapter = guarded(dspy.JSONAdapter(), strict=True)
    for answer in (text, f"Here it is:\n```json\n{text}\n```\nDone."):
        assert adapter.parse(TYPED, answer) == {"items": items}
    chat = guarded(dspy.ChatAdapter(), strict=True)
    assert chat.parse(TYPED, f"[[ ## items ## ]]\n{json.dumps(items)}") == {"items": items}


def test_what_is_short_is_repaired_as_ever() -> None:
    assert json_repair.loads("{'items': ['a', 'b'") == {"items": ["a", "b"]}
    assert json_repair.loads('{"items": ["a"', logging=True)[0] == {"items": ["a"]}
