"""A few thousand frames of `make fuzz`, always the same, and that its own judgement is right where it is exact."""

from __future__ import annotations

import fuzz
import pytest


@pytest.mark.slow
def test_mutated_frames_each_get_their_reply() -> None:
    summary = fuzz.run(4000, seed=6)
    assert summary.sent > 4000
    # That the frames reach what they are for: parser, envelope, arguments, DSPy.
    reached = {"invalid_json", "invalid_request", "invalid_args", "success: create_program", "success: execute_program"}
    assert all(summary.kinds[kind] > 50 for kind in reached), summary
