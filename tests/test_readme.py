"""What the README says of the tests is so."""

from __future__ import annotations

import re

from peer import ROOT

EXUNIT = ROOT / "elixir_harness" / "test" / "dspex" / "python_bridge"


def test_each_row_of_what_happens_is_a_test() -> None:
    """By the file and the name in its last column."""
    table = re.search("<!-- what happens -->\n(.*)<!-- /what happens -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert table is not None
    rows = table[1].splitlines()[2:]
    assert len(rows) > 20
    for row in rows:
        file, name = row.rstrip("| ").rpartition(" | ")[2].split(": ", 1)
        if file.startswith("test_"):
            assert f"def {name}(" in (ROOT / "tests" / "port" / f"{file}.py").read_text(), row
        else:
            assert f'test "{name}"' in (EXUNIT / f"{file}_test.exs").read_text(), row
