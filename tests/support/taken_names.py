"""Undocumented names inside DSPy, for tests of peers that run without them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peer import ROOT

from dspy_bridge.lm import dspy_internals

# Those that this DSPy has.
NAMES = [name for name in dspy_internals.names if name.there]


def without(taken: Iterable[dspy_internals.Name], how: str, folder: Path) -> dict[str, str]:
    """The environment of such a peer; `how`: see `fakes/take_away.py`. `folder`: an empty one, for its PYTHONPATH."""
    (folder / "sitecustomize.py").write_text("import take_away")
    return {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'fakes'}:{folder}",
        "TAKEN": " ".join(f"{name.module}:{name.path}" for name in taken),
        "HOW": how,
    }
