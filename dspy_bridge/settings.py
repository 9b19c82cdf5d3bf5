"""The settings of the peer: read once from the environment and the command line, checked before anything starts."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    T = TypeVar("T")

ADAPTERS = ("chat", "json", "xml")
LOG_LEVELS = ("debug", "info", "warning", "error")


class SettingError(Exception):
    """A setting that cannot be read. The message names it and what was expected, never its value."""


class Setting:
    """One setting: its environment variable is DSPY_BRIDGE_NAME, its flag `--name`."""

    def __init__(self, read: Callable[[str], Any], default: str, help: str) -> None:
        self.read = read
        self.default = default
        self.help = help

    def __set_name__(self, _owner: type, name: str) -> None:
        self.name = name
        self.variable = f"DSPY_BRIDGE_{name.upper()}"
        self.flag = "--" + name.replace("_", "-")


def _setting(read: Callable[[str], T], default: str, help: str) -> T:
    return Setting(read, default, help)  # type: ignore[return-value]  # its value takes its place


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) >= least):
            raise ValueError(f"expected a whole number of at least {least}")
        return int(text)

    return read


def _one_of(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return text.lower()

    return read


def _text(text: str) -> str | None:
    return text or None


def _react(text: str) -> str | None:
    return _one_of("v1", "v2")(text) if text else None


def _adapter(text: str) -> str | None:
    return _one_of(*ADAPTERS)(text) if text else None


def _object(text: str) -> dict[str, Any]:
    if text == "{}":
        return {}
    import jiter

    try:
        value = jiter.from_json(text.encode(), allow_inf_nan=False)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object of keyword arguments for dspy.LM")
    return value


def _dotted(text: str, expected: str) -> str:
    if not all(part.isidentifier() for part in text.replace(":", ".", 1).split(".")):
        raise ValueError(f"expected {expected}")
    return text


def _function(text: str) -> str | None:
    # Without a colon there is no name.
    return _dotted(text if ":" in text else "", "package.module:function") if text else None


def _prefixes(text: str) -> tuple[str, ...]:
    prefixes = (prefix.strip() for prefix in text.split(",") if prefix.strip())
    return tuple(_dotted(prefix, "a list such as my_app.programs,my_app.other:Class") for prefix in prefixes)


def _folder(text: str) -> str | None:
    if text and os.path.exists(text) and not os.path.isdir(text):
        raise ValueError("expected a folder")
    return os.path.abspath(text) if text else None


def _flag(text: str) -> bool:
    return _one_of("0", "1", "false", "true")(text) in ("1", "true")


class Settings:
    """The values of all settings, checked."""

    lm = _setting(_text, "", "the default LM as DSPy names it (openai/gpt-4o-mini); offline/echo needs no network")
    lm_options = _setting(_object, "{}", "JSON keyword arguments of dspy.LM; in the environment, as ps shows flags")
    adapter = _setting(_adapter, "", f"the default adapter: {', '.join(ADAPTERS)}; DSPy's own choice if unset")
    react = _setting(
        _react, "", "DSPy's ReAct by trajectory (v1) or by history (v2); that of the installed DSPy if unset"
    )
    strict_fields = _setting(_flag, "1", "0: if an answer has a field twice, DSPy's choice is taken, silently")
    warm = _setting(_flag, "0", "1: LiteLLM, if an LM needs it, is imported when that is known, not in its first call")
    max_in_flight = _setting(_whole(1), "256", "programs running at once; more wait for a slot")
    max_queue = _setting(_whole(0), "10000", "runs that wait for a slot; more are refused as overloaded")
    max_optimizes = _setting(_whole(1), "2", "programs being optimized at once; more are refused as overloaded")
    cache_entries = _setting(_whole(0), "10000", "LM answers kept in memory; 0: none")
    disk_cache = _setting(_folder, "", "a folder for DSPy's disk cache; off if unset")
    init = _setting(_function, "", "package.module:function called once DSPy is imported, before the first program")
    allow_modules = _setting(_prefixes, "", "prefixes of package.module:Class that may be program types; none if unset")
    allow_code = _setting(_flag, "0", "1: program types that run code which an LM wrote are allowed")
    files_dir = _setting(_folder, "", "a folder whose files image, audio and file inputs may name; none if unset")
    state_dir = _setting(_folder, "", "a folder whose files state_path may name; none if unset")
    max_frame_bytes = _setting(_whole(1), str(64 * 1024 * 1024), "the longest frame, in bytes, either way")
    max_lm_bytes = _setting(_whole(1), str(32 * 1024 * 1024), "the longest answer of an LM, in bytes, unpacked")
    history_bytes = _setting(_whole(0), str(1024 * 1024), "the most that history may take in a reply, in bytes")
    drain_ms = _setting(_whole(0), "5000", "how long work goes on after the end of input, in ms")
    log_level = _setting(_one_of(*LOG_LEVELS), "info", f"{', '.join(LOG_LEVELS)}")
    log_frames = _setting(_flag, "0", "1: log records are sent as frames instead of to stderr")

    def __init__(self, texts: Mapping[str, str]) -> None:
        """`texts`: setting name to its text; an absent or empty one takes its default. Raises `SettingError`."""
        for setting in SETTINGS:
            text = texts.get(setting.name, "").strip() or setting.default
            try:
                value = setting.read(text)
            except ValueError as error:
                raise SettingError(f"{setting.variable} ({setting.flag}): {error}") from None
            setattr(self, setting.name, value)


SETTINGS = tuple(setting for setting in vars(Settings).values() if isinstance(setting, Setting))


def load(environment: Mapping[str, str], flags: Mapping[str, str]) -> Settings:
    """Flags win over the environment. Raises `SettingError`."""
    texts = {s.name: environment[s.variable] for s in SETTINGS if s.variable in environment}
    return Settings({**texts, **flags})
