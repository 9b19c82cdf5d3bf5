"""field_parsers: however an answer is split, the chunks of a field make the value of DSPy's parser."""

from __future__ import annotations

import itertools
import json

import dspy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dspy_bridge.streaming.field_parsers import ChatReader, JSONReader, Reader, XMLReader

SIGNATURE = dspy.Signature("question -> first, second")
FIELDS = ("first", "second")
READERS: dict[str, tuple[type[Reader], dspy.Adapter]] = {
    "chat": (ChatReader, dspy.ChatAdapter()),
    "json": (JSONReader, dspy.JSONAdapter()),
    "xml": (XMLReader, dspy.XMLAdapter()),
}


def read(reader: type[Reader], pieces: list[str]) -> dict[str, str]:
    reading = reader(FIELDS)
    chunks = dict.fromkeys(FIELDS, "")
    for piece in pieces:
        for field, text in reading.feed(piece):
            assert text
            chunks[field] += text
    return chunks


def split(answer: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(answer), *(cut % (len(answer) + 1) for cut in cuts)})
    return [answer[a:b] for a, b in itertools.pairwise(edges)]


def parsed(adapter: dspy.Adapter, answer: str) -> dict[str, str]:
    """The result of DSPy's parser; answers that it refuses are skipped."""
    try:
        return adapter.parse(SIGNATURE, answer)
    except dspy.AdapterParseError:
        assume(False)
        raise


CUTS = st.lists(st.integers(0, 10_000), max_size=12) | st.just(list(range(10_000)))
# Markers in halves, white space of all kinds, quotes, escapes, entities, what is not ASCII.
SCRAPS = st.sampled_from(
    ["[[", "]]", " ## ", "[[ ## first ## ]]", "[[ ## x ## ]]", "[[ ## sec", "\n", "\r\n", "\r", "\u2028", "  ", "\t",
     "a", "word", '"', "\\", "\\n", "{", "}", ",", ":", '"second":', "</", "<", "&", "&amp;", "<b>x</b>", "😀", "#"]
)  # fmt: skip
TEXT = st.lists(SCRAPS, max_size=8).map("".join) | st.text(max_size=20)


@given(TEXT, TEXT, st.sampled_from(["", "Sure!\n", " [[ ## \n"]), CUTS)
@settings(max_examples=200)
def test_chat(first: str, second: str, before: str, cuts: list[int]) -> None:
    answer = f"{before}[[ ## first ## ]]\n{first}\n\n[[ ## second ## ]]{second}\n\n[[ ## completed ## ]]"
    wanted = parsed(READERS["chat"][1], answer)
    assert read(ChatReader, split(answer, cuts)) == wanted


@given(TEXT, TEXT, st.booleans(), st.sampled_from(["", "```json\n", "Sure: "]), CUTS)
@settings(max_examples=200)
def test_json(first: str, second: str, ascii: bool, before: str, cuts: list[int]) -> None:
    fields = {"other": [1, {"first": "no", "}": "]"}], "n": -1.5, "first": first, "": None, "second": second, "z": "é"}
    answer = before + json.dumps(fields, ensure_ascii=ascii, indent=None if ascii else 2)
    assert read(JSONReader, split(answer, cuts)) == {"first": first, "second": second}


@given(TEXT, TEXT, CUTS)
@settings(max_examples=200)
def test_xml(first: str, second: str, cuts: list[int]) -> None:
    def escaped(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;")

    answer = f"Sure!\n<first>\n{escaped(first)}\n</first>\n<x>no</x><second>{escaped(second)}</second>"
    wanted = parsed(READERS["xml"][1], answer)
    assert read(XMLReader, split(answer, cuts)) == wanted


@given(st.sampled_from(sorted(READERS)), st.lists(SCRAPS | st.sampled_from(
    ['{"first": "', '", "second": "', '"}', "<first>", "</first>", "<second>", "</second>", "[[ ## second ## ]]\n"]
), max_size=15).map("".join), CUTS)  # fmt: skip
@settings(max_examples=200)
def test_whatever_an_lm_writes_raises_no_error_and_gives_the_same_chunks_in_any_pieces(
    name: str, answer: str, cuts: list[int]
) -> None:
    reader = READERS[name][0]
    chunks, at_once = read(reader, split(answer, cuts)), read(reader, [answer] if answer else [])
    # Of an answer with an error in it JSON gives what came before that, and all of it in one piece is nothing.
    assert chunks == at_once or (name == "json" and all(chunks[field].startswith(at_once[field]) for field in FIELDS))


@pytest.mark.parametrize(
    ("name", "answer", "field", "chunks"),
    [
        # What DSPy's own listeners get wrong, and when a chunk is emitted.
        ("chat", "[[ ## first ## ]]\nsee [[1]] and [[ ## x", "first", "see [[1]] and [[ ## x"),
        ("chat", "[[ ## first ## ]]\nPar", "first", "Par"),
        ("chat", "[[ ## first ## ]]\nParis\n[[ ## s", "first", "Paris"),
        ("chat", "[[ ## first ## ]] Paris  \n\n", "first", "Paris"),
        ("chat", "[[ ## first ## ]] It is  \nParis. ", "first", "It is\nParis."),
        ("chat", "[[ ## first ## ]]\na\n[[ ## second ## ]]\nb\n[[ ## first ## ]]\nc", "first", "a"),
        ("json", r'{"first": "say \"hi\"\n\u00e9', "first", 'say "hi"\né'),
        ("json", '{"first": "a \\', "first", "a "),
        ("json", r'{"first": "\ud83d', "first", ""),
        ("json", r'{"first": "\ud83d\ude00', "first", "😀"),
        ("json", '{"first" "a", "second": "b"', "second", ""),
        ("json", '{"first": 5, "second": "b"', "second", "b"),
        ("xml", "<first>\n a &lt; b &amp; c", "first", "a < b & c"),
        ("xml", "<first>a<b>c</b>d</first><second>e</second>", "first", "a"),
        ("xml", "<first>a & b</first>", "first", "a"),
    ],
)
def test_chunks_so_far(name: str, answer: str, field: str, chunks: str) -> None:
    for pieces in ([answer], list(answer)):
        assert read(READERS[name][0], pieces)[field] == chunks


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_long_answer_in_small_pieces_takes_time_in_proportion(name: str) -> None:
    """A parser that started again with each piece would take minutes."""
    begin = {"chat": "[[ ## first ## ]]\n", "json": '{"x": ["', "xml": "<first>"}[name]
    for filling in ("ab c", "\n   ", "[ \\n"):
        reading = READERS[name][0](FIELDS)
        list(reading.feed(begin))
        for _ in range(100_000):
            list(reading.feed(filling))
