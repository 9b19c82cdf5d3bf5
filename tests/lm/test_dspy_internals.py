"""dspy_internals: the one module that touches undocumented names of DSPy's."""

from __future__ import annotations

import ast
import re

from peer import ROOT

from dspy_bridge.lm import dspy_internals

# Modules of DSPy's that its documentation imports from.
DOCUMENTED = {
    "dspy",
    "dspy.experimental",
    "dspy.evaluate",
    "dspy.lm15",
    "dspy.streaming",
    "dspy.utils.callback",
    "json_repair",
}
LIBRARIES = ("dspy", "json_repair", "litellm")
# The doctor's script does without them.
ALONE = {("check_lm.py", "dspy.clients.backend_selection"), ("check_lm.py", "litellm")}


def test_no_other_module_imports_what_is_not_documented() -> None:
    found = set()
    for path in (ROOT / "dspy_bridge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.partition(".")[0] in LIBRARIES and name not in DOCUMENTED:
                    found.add((path.name, name))
    assert found == ALONE


def test_no_other_module_names_a_private_attribute_of_dspys() -> None:
    for path in (ROOT / "dspy_bridge").rglob("*.py"):
        if path.name != "dspy_internals.py":
            assert re.findall(r"\bdspy\.(?:\w+\.)*_(?!_)\w+", path.read_text()) == [], path


def test_each_name_says_what_is_off_without_it() -> None:
    assert all(name.without for name in dspy_internals.names)
    dotted = [name.dotted for name in dspy_internals.names]
    assert len(set(dotted)) == len(dotted)
