"""The forge's own CI: it can be read, and runs the README's two commands on all that is supported."""

from __future__ import annotations

import re
from typing import Any

import yaml
from peer import ROOT

WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_it_runs_the_two_commands() -> None:
    runs = [step.get("run") for step in WORKFLOW["jobs"]["test"]["steps"]]
    assert "make demo" in runs and "make test" in runs


def test_its_matrix_is_what_the_package_says_it_supports() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    versions = re.findall(r"Python :: (3\.\d+)", project)
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == versions
    assert matrix["otp"] == ["26", "27"]


def test_every_expression_names_something_that_is_there() -> None:
    """A misspelt matrix key is an empty text on the forge, not an error."""
    job = WORKFLOW["jobs"]["test"]
    used = set(re.findall(r"matrix\.(\w+)", str(job)))
    assert used == set(job["strategy"]["matrix"])
