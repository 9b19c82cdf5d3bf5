"""peer_log: what a record says of contents is left out, where it comes from stays."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from dspy_bridge.logs import peer_log

SECRET = "a secret of the caller's"


def filtered(name: str, path: str, message: object, *args: object, error: BaseException | None = None) -> str:
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord(name, logging.ERROR, path, 12, message, args, exc_info)
    return logging.Formatter("%(message)s").format(peer_log.without_contents(record))


@pytest.fixture
def react(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a file in DSPy's folder."""
    module = types.ModuleType("dspy")
    module.__file__ = str(tmp_path / "dspy" / "__init__.py")
    monkeypatch.setitem(sys.modules, "dspy", module)
    return str(tmp_path / "dspy" / "react.py")


def raised() -> ValueError:
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(SECRET) from error
    except ValueError as error:
        return error


@pytest.mark.parametrize(("message", "args"), [("Failed %s", (SECRET,)), (f"Ending the trajectory: {SECRET}", ())])
def test_of_a_librarys_message_the_place_is_logged(react: str, message: str, args: Any) -> None:
    assert filtered("dspy.predict.react", react, message, *args) == "text withheld, react.py line 12"


@pytest.mark.parametrize("name", ["dspy_bridge", "dspy.predict.react"])
def test_of_an_exception_its_types_and_places_are_logged(react: str, name: str) -> None:
    text = filtered(name, react if name != "dspy_bridge" else __file__, "error %s", "0123", error=raised())
    assert SECRET not in text and "test_content_filter.py" in text and text.endswith("\nValueError")
    assert "\nKeyError\n\nwhich led to:\n\nTraceback" in text


@pytest.mark.parametrize("name", ["py.warnings", "asyncio"])
def test_only_the_first_line_of_these(name: str) -> None:
    text = filtered(name, __file__, "%s", f"Pydantic serializer warnings:\n  input_value={SECRET!r}")
    assert text == "Pydantic serializer warnings:"


def test_records_of_user_code_are_passed_on_as_they_are() -> None:
    text = filtered("dspy.host", __file__, "mine: %s", SECRET, error=raised())
    assert text.startswith(f"mine: {SECRET}\n") and text.endswith(f"ValueError: {SECRET!s}")
