"""Prints the lines of code beside their budget in `pyproject.toml`; exits 1 past it. `make check` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
SUFFIXES = {".py", ".ex", ".exs"}


def lines(folders: list[str], left_out: list[str]) -> int:
    """The lines of all Python and Elixir files in these folders, without those in folders that are left out.

    A link is not counted: the file that it leads to is.
    """
    found = (file for folder in folders for file in (ROOT / folder).rglob("*") if not file.is_symlink())
    files = [file for file in found if file.suffix in SUFFIXES]
    counted = [file for file in files if not any(file.is_relative_to(ROOT / folder) for folder in left_out)]
    return sum(file.read_bytes().count(b"\n") for file in counted)


def main() -> int:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    past = False
    for budget in config["tool"]["dspy_bridge"]["budget"]:
        size = lines(budget["folders"], budget.get("left_out", []))
        past = past or size > budget["lines"]
        mark = "  past the budget" if size > budget["lines"] else ""
        sys.stdout.write(f"{budget['name']:36} {size:7,} of {budget['lines']:7,} lines{mark}\n")
    return past


if __name__ == "__main__":
    sys.exit(main())
