"""json_repairs: JSON that an LM broke is repaired as DSPy has it, unless that would take the square of its length."""

from __future__ import annotations

import json
from collections.abc import Callable

import dspy
import json_repair
import pytest

from dspy_bridge.lm.adapters.guarded_adapters import guarded
from dspy_bridge.lm.adapters.json_answers import TooMuchToRepair

# Before there was a limit, each took from a minute to hours, a hundredth of it seconds.
ENDLESS = ['["', "{", "[{", "(", "{[(", '["{",']
COUNTED = dspy.Signature("question -> items: dict[str, int]")
TYPED = dspy.Signature("question -> items: list[str]")
ADAPTERS = [dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()]


def answer(adapter: dspy.Adapter, text: str) -> str:
    return {dspy.ChatAdapter: f"[[ ## items ## ]]\n{text}", dspy.XMLAdapter: f"<items>{text}</items>"}.get(
        type(adapter), text
    )


@pytest.mark.parametrize("text", [*(unit * (1_000_000 // len(unit)) for unit in ENDLESS), '["' + '" a' * 300_000])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.timeout(20)
@pytest.mark.slow
def test_a_megabyte_that_cannot_be_repaired_in_time_is_refused(adapter: dspy.Adapter, text: str) -> None:
    with pytest.raises((TooMuchToRepair, RecursionError, dspy.AdapterParseError)):
        guarded(adapter, strict=True).parse(COUNTED, answer(adapter, text))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", [json.dumps(["{"] * 100_000), "[" + '"{",' * 30_000 + '""]'])
def test_a_list_of_braces_is_not_searched_for_an_object(text: str) -> None:
    """It is JSON, so that nothing is to be repaired."""
    with pytest.raises((TooMuchToRepair, RecursionError, dspy.AdapterParseError)):
        guarded(dspy.JSONAdapter(), strict=True).parse(TYPED, text)


ITEMS = [{"name": f"item {n}", "more": [n, n + 1]} for n in range(300)]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text[:-1] + ",}",
        lambda text: f"As in [1], here it is: {text}",
        lambda text: f"Here it is:\n```json\n{text}\n```\nDone.",
        lambda text: f"[{text}]",
        lambda text: text[:-2],
    ],
)
def test_what_an_lm_breaks_by_chance_is_repaired_as_ever(change: Callable[[str], str]) -> None:
    """300 objects in 14 KB; the adapters of a program and DSPy's own."""
    signature = dspy.Signature("question -> items: list[dict]")
    text = change(json.dumps({"items": ITEMS}))
    for adapter in (dspy.JSONAdapter(), guarded(dspy.JSONAdapter(), strict=True)):
        assert adapter.parse(signature, text) == {"items": ITEMS}


def test_what_is_json_has_no_limit() -> None:
    items = [f"{{[({n}" for n in range(100_000)]
    assert json_repair.loads(json.dumps(items)) == items
    chat = guarded(dspy.ChatAdapter(), strict=True)
    assert chat.parse(TYPED, f"[[ ## items ## ]]\n{json.dumps(items)}") == {"items": items}


@pytest.mark.parametrize("text", ["", "plain", "{'items': ['a', 'b'", "[1, 2", "1.5e3", '"a'])
def test_what_comes_out_is_the_same_and_of_no_type_of_ours(text: str) -> None:
    assert json_repair.loads(text) == json_repair.repair_json(text, return_objects=True)
    assert type(json_repair.loads(text)).__module__ == "builtins"
    assert isinstance(json_repair.loads(text, logging=True), tuple)
