"""The forge's own CI: it can be read, and runs the README's two commands on all that is supported."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from peer import ROOT

WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_its_matrix_is_what_the_package_says_it_supports() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    versions = re.findall(r"Python :: (3\.\d+)", project)
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == versions
    assert matrix["otp"] == ["26", "27", "28"]
    # Elixir's own table: 1.18 is for OTP 25 to 27, 1.19 for 26 to 28.
    assert {pair["otp"]: pair["elixir"] for pair in matrix["include"]} == {"26": "1.18", "27": "1.18", "28": "1.19"}


def test_it_runs_each_version_of_dspy_and_may_fail_with_a_pre_release_alone() -> None:
    job = WORKFLOW["jobs"]["dspy"]
    *versions, last = job["strategy"]["matrix"]["dspy"]
    assert last == "pre" and job["continue-on-error"] == "${{ matrix.dspy == 'pre' }}"
    assert job["steps"][-1]["run"] == "make test-dspy VERSION=${{ matrix.dspy }}"
    oldest = re.search(r'"dspy>=([\d.]+),<4"', (ROOT / "pyproject.toml").read_text())
    pins = (ROOT / "elixir_harness" / "priv" / "python" / "requirements.txt").read_text()
    pinned = re.search(r"^dspy==([\d.]+) ", pins, re.MULTILINE)
    assert oldest is not None and pinned is not None
    assert versions[0] == oldest[1] and versions[-1] == pinned[1]


@pytest.mark.parametrize("name", WORKFLOW["jobs"])
def test_every_expression_names_something_that_is_there(name: str) -> None:
    """A misspelt matrix key is an empty text on the forge, not an error."""
    job = WORKFLOW["jobs"][name]
    used = set(re.findall(r"matrix\.(\w+)", str(job)))
    matrix = job["strategy"]["matrix"]
    assert used == {*matrix, *(key for pair in matrix.get("include", ()) for key in pair)} - {"include"}
