"""withholding: what a record says of contents is cut off, what helps to find a defect stays."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from dspy_bridge.logs import content_filter

SECRET = "a secret of the caller's"


@pytest.fixture(autouse=True)
def dspy_is_not_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once another test has imported DSPy, its logger passes nothing on."""
    logger = logging.getLogger("dspy")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.NOTSET)


def filtered(record: logging.LogRecord) -> str:
    return logging.Formatter("%(message)s").format(content_filter.without_contents(record))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module in DSPy's folder: `log(logger, value)` and functions that raise."""
    folder = tmp_path / "dspy"
    folder.mkdir()
    path = folder / "react.py"
    path.write_text(
        "def plain(logger, value):\n"
        "    logger.warning('It just went wrong.')\n"
        "def f_string(logger, value):\n"
        "    logger.warning(f'Ending the trajectory: {value}')\n"
        "def percent(logger, value):\n"
        "    logger.warning('Failed %s for %5d%% of %r', value, 3, value)\n"
        "def lines(logger, value):\n"
        "    logger.warning(\n"
        "        f'Ending here: {value}'\n"
        "    )\n"
        "def only(logger, value):\n"
        "    logger.warning(value)\n"
        "def exception(logger, value):\n"
        "    try:\n"
        "        raise ValueError(f'Cannot read {value}')\n"
        "    except ValueError:\n"
        "        logger.exception('No luck')\n"
    )
    module = types.ModuleType("dspy")
    module.__file__ = str(folder / "__init__.py")
    monkeypatch.setitem(sys.modules, "dspy", module)
    names: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return types.SimpleNamespace(**names)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        ("plain", "It just went wrong."),
        ("f_string", "Ending the trajectory: …"),
        ("percent", "Failed … for …% of …"),
        ("lines", "Ending here: …"),
        ("only", "…"),
    ],
)
def test_of_a_librarys_message_only_what_its_source_says_is_told(
    library: Any, caplog: pytest.LogCaptureFixture, function: str, wanted: str
) -> None:
    getattr(library, function)(logging.getLogger("dspy.predict.react"), SECRET)
    (record,) = caplog.records
    assert filtered(record) == wanted
    assert record.name == "dspy.predict.react" and content_filter.without_contents(record) is not record


def test_a_traceback_keeps_its_places_and_its_fixed_words(library: Any, caplog: pytest.LogCaptureFixture) -> None:
    library.exception(logging.getLogger("dspy.predict.react"), SECRET)
    text = filtered(caplog.records[0])
    assert text.startswith("No luck\nTraceback") and text.endswith("ValueError: Cannot read …")
    assert "react.py" in text and SECRET not in text


class Silent(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


def fail(kind: str) -> None:
    if kind == "value":
        raise ValueError(SECRET)
    if kind == "key":
        {}[SECRET]
    if kind == "int":
        int(SECRET)
    if kind == "silent":
        raise Silent
    if kind == "type of its own":
        raise TypeError(f"no good: {SECRET}")
    if kind == "type":
        len(5)  # type: ignore[arg-type]
    if kind == "attribute":
        SECRET.nothing  # type: ignore[attr-defined]  # noqa: B018
    if kind == "cause":
        try:
            fail("value")
        except ValueError as error:
            raise RuntimeError("outer") from error


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("value", "\nValueError: …"),
        ("key", "\nKeyError: …"),
        ("int", "\nValueError: …"),
        ("silent", "\nSilent: …"),
        ("type of its own", "\nTypeError: no good: …"),
        ("type", "\nTypeError: object of type 'int' has no len()"),
        ("attribute", "\nAttributeError: 'str' object has no attribute 'nothing'"),
        ("cause", "\nRuntimeError: outer"),
    ],
)
def test_a_defects_traceback_holds_no_contents(caplog: pytest.LogCaptureFixture, kind: str, end: str) -> None:
    try:
        fail(kind)
    except Exception:
        logging.getLogger("dspy_bridge").error("internal error %s", "0123", exc_info=True)
    text = filtered(caplog.records[0])
    assert text.startswith("internal error 0123\nTraceback") and text.endswith(end)
    assert SECRET not in text and "test_content_filter.py" in text
    assert ("which led to" in text) == (kind == "cause")


def test_an_exception_that_was_never_raised_has_no_place() -> None:
    assert content_filter.traceback_of(ValueError(SECRET)).endswith("ValueError: …")


def test_a_circle_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert content_filter.traceback_of(first).count("Traceback") == 2


@pytest.mark.parametrize("name", ["py.warnings", "asyncio"])
def test_only_the_first_line_of_these(caplog: pytest.LogCaptureFixture, name: str) -> None:
    logging.getLogger(name).error("%s", f"Pydantic serializer warnings:\n  input_value={SECRET!r}")
    assert filtered(caplog.records[0]) == "Pydantic serializer warnings:"


def test_a_hosts_own_records_are_its_own_business(caplog: pytest.LogCaptureFixture) -> None:
    try:
        fail("value")
    except ValueError:
        logging.getLogger("dspy.host").exception("mine: %s", SECRET)
    (record,) = caplog.records
    assert content_filter.without_contents(record) is record
