"""frames: any split of the stream gives the same frames; what is too long is read past, not stored."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from peer import frame

from dspy_bridge.wire.frames import FrameDecoder, TooLarge

PAYLOADS = st.lists(st.binary(max_size=40), max_size=12)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(position % (len(data) + 1) for position in at)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(PAYLOADS, st.lists(st.integers(0, 10_000)))
def test_any_split_gives_every_payload_once_and_in_order(payloads: list[bytes], at: list[int]) -> None:
    decoder = FrameDecoder(1000)
    stream = b"".join(frame(payload) for payload in payloads)
    assert [got for chunk in cut(stream, at) for got in decoder.feed(chunk)] == payloads
    assert not decoder.mid_frame


@given(PAYLOADS, st.binary(min_size=1, max_size=40), st.integers(1, 43))
def test_a_stream_that_ends_inside_a_frame_is_told_apart(whole: list[bytes], last: bytes, missing: int) -> None:
    decoder = FrameDecoder(1000)
    packet = frame(last)
    cut_short = packet[: max(1, len(packet) - missing)]
    assert decoder.feed(b"".join(frame(p) for p in whole) + cut_short) == whole
    assert decoder.mid_frame


@given(st.lists(st.binary(max_size=12), max_size=10), st.lists(st.integers(0, 10_000)))
def test_a_frame_over_the_limit_is_skipped_and_the_next_one_served(payloads: list[bytes], at: list[int]) -> None:
    decoder = FrameDecoder(6)
    stream = b"".join(frame(payload) for payload in payloads)
    wanted = [payload if len(payload) <= 6 else TooLarge(len(payload)) for payload in payloads]
    assert [got for chunk in cut(stream, at) for got in decoder.feed(chunk)] == wanted


def test_a_frame_over_the_limit_is_not_stored() -> None:
    """A hostile length must not cost memory: the payload is skipped without being stored."""
    decoder = FrameDecoder(10)
    assert decoder.feed((0xFFFFFFFF).to_bytes(4, "big")) == [TooLarge(0xFFFFFFFF)]
    for _ in range(100):
        assert decoder.feed(b"x" * 10_000) == []
        assert decoder._pieces == []
    assert decoder.mid_frame


def test_a_frame_of_length_zero_is_a_frame() -> None:
    assert FrameDecoder(10).feed(frame(b"") + frame(b"a")) == [b"", b"a"]
