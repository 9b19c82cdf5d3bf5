"""The README: its code, its commands, its table."""

from __future__ import annotations

import re

from peer import ROOT
from test_docs import table

README = (ROOT / "README.md").read_text()


def test_what_happens_in_short_is_what_happens() -> None:
    """Its rows are those of how-it-works.md, where each names a test."""
    short, whole = table("README.md", "what happens, in short"), table("docs/how-it-works.md", "what happens")
    assert len(short) == 5
    assert {when: [*then, whole[when][-1]] for when, then in short.items()} == {when: whole[when] for when in short}


def test_each_program_that_is_called_is_created_before() -> None:
    """Except one, whose error is shown."""
    created = re.findall(r"\bid: \"(\w+)\"", README)
    called = re.findall(r"program_id: \"(\w+)\"", README)
    assert [name for name in called if name not in created] == ["tirage"]
