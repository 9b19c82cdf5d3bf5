"""field_markers: the headers that it finds are those that DSPy finds, and text that quotes one is escaped."""

from __future__ import annotations

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_bridge.lm.adapters import field_markers

SCRAPS = st.sampled_from(
    ["[[ ## ", " ## ]]", "[[ ## first ## ]]", "[[ ## x ## ]]", "[", "]", " ", "#", "a_1", "é", "\u0301", "-", "\n",
     "\r", "\u2028", "<", "</", ">", "/>", "<first>", "<first a='b'/>", "second", "first"]
)  # fmt: skip
TEXT = st.lists(SCRAPS, max_size=12).map("".join) | st.text(max_size=30)


@given(TEXT)
@settings(max_examples=200)
def test_an_answer_is_split_where_dspy_splits_it(text: str) -> None:
    """DSPy's parser gives the first section of each name, as a string."""
    answer = f"{text}\n[[ ## second ## ]] end"
    found: dict[str, str] = {}
    for name, value in field_markers.headed(answer):
        found.setdefault(name, value)
    signature = dspy.Signature("q -> second: str, " + ", ".join(f"{name}: str" for name in found if name != "second"))
    assert dspy.ChatAdapter().parse(signature, answer) == {name: found[name] for name in signature.output_fields}


@pytest.mark.parametrize(
    "text",
    [
        "[[ ## " * 200_000,
        "[[ ## a" * 150_000,
        "[[ ## " + "a" * 1_000_000,
        " ## ]]" * 170_000,
        " " * 1_000_000,
        "[" * 1_000_000,
        "<" * 1_000_000,
        "<first " * 140_000,
        "</" * 500_000,
        "{" * 1_000_000,
        '{"a": ' * 170_000,
        '"' * 1_000_000,
    ],
)
def test_a_megabyte_of_anything_is_read_once(text: str) -> None:
    """Quadratic work on any of these would take minutes."""
    assert len(field_markers.without_headers(text)) == len(text)
    assert len(field_markers.without_tags(text, {"second"})) == len(text)
    list(field_markers.headed(text))
    field_markers.keyed(text)


def test_a_value_is_changed_in_all_its_texts_or_stays_the_very_same() -> None:
    value = {"k": ["v", ("v", {"v"}, frozenset("v"))], "n": [1, None, 2.5], "v": b"v"}
    assert field_markers.changed(value, lambda text: text) is value
    wanted = {"k": ["w", ("w", {"w"}, frozenset("w"))], "n": [1, None, 2.5], "w": b"v"}
    made = field_markers.changed(value, lambda text: text.replace("v", "w"))
    assert made == wanted and made["n"] is value["n"]
