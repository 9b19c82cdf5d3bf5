"""A few thousand frames of `make fuzz`, always the same, and that its own judgement is right where it is exact."""

from __future__ import annotations

import json

import fuzz
import pytest
from expected import LIMIT, owed
from mutations import Frames
from peer import vector_payload, vectors


@pytest.mark.slow
def test_mutated_frames_each_get_their_reply() -> None:
    summary = fuzz.run(4000, seed=6)
    assert summary.sent > 4000
    # That the frames reach what they are for: parser, envelope, arguments, DSPy.
    reached = {"invalid_json", "invalid_request", "invalid_args", "success: create_program", "success: execute_program"}
    assert all(summary.kinds[kind] > 50 for kind in reached), summary


def test_among_them_are_some_that_are_made_to_take_long() -> None:
    frames = Frames(6)
    some = [frames.next() for _ in range(8000)]
    assert sum(b'"slow"' in payload for payload in some) > 2, "patterns"
    assert sum(b"ababb" in payload for payload in some) > 2, "strings for a pattern"
    assert sum(b"7" * 90 in payload for payload in some) > 2, "runs of digits"


def test_a_seed_always_gives_the_same_frames() -> None:
    one, same, other = Frames(1), Frames(1), Frames(2)
    first = [one.next() for _ in range(200)]
    assert first == [same.next() for _ in range(200)] != [other.next() for _ in range(200)]


@pytest.mark.parametrize("vector", vectors("malformed"), ids=lambda v: v["name"])
def test_what_a_malformed_frame_is_owed(vector: dict[str, object]) -> None:
    payload = vector_payload(vector)
    due = owed(payload)
    assert due is not None and due.at_once
    if len(payload) > LIMIT:
        assert due.ends == {"frame_too_large"}
    else:
        assert due.keys == ((type(vector["id"]), vector["id"]),) and due.ends == {vector["error_type"]}


@pytest.mark.parametrize("vector", vectors("requests"), ids=lambda v: v["name"])
def test_what_a_good_request_is_owed(vector: dict[str, object]) -> None:
    due = owed(json.dumps(vector["payload"]).encode())
    assert due is not None and due.keys == ((type(vector["id"]), vector["id"]),)
    assert isinstance(vector["reply"], dict)
    assert vector["reply"].get("error_type", "success") in due.ends
