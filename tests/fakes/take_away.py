"""For a child process: takes names away from DSPy and others, before DSPy is used, as a later release might.

`TAKEN` holds `module:path`s as `dspy_internals` writes them, separated by spaces; `HOW` is `gone`, or `called` for
functions that stay and take other arguments. The libraries themselves go on, as after a release that renames: their
own code reaches what is gone.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import types
from importlib.abc import MetaPathFinder
from typing import Any


class AtFirstUse(MetaPathFinder):
    """Does it when the module is imported that looks the names up."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "dspy_bridge.lm.dspy_internals":
            sys.meta_path.remove(self)
            for taken in os.environ["TAKEN"].split():
                take(*taken.split(":"), gone=os.environ["HOW"] == "gone")


def take(module: str, path: str, *, gone: bool) -> None:
    owner_path, _, attribute = path.rpartition(".")
    owner = whole = importlib.import_module(module)
    for name in filter(None, owner_path.split(".")):
        owner = getattr(owner, name)
    if not gone or module == "asyncio":
        # Of these the class has parents that would answer for it.
        setattr(owner, attribute, called_otherwise(getattr(owner, attribute)))
    elif owner is whole:
        hide_in_module(module, attribute)
    elif isinstance(owner, type):
        hide_in_class(owner, attribute)
    else:
        hide_setting(type(owner), attribute)


def called_otherwise(function: Any) -> Any:
    return lambda *args, **options: function(*args, **options)


def of_the_bridge() -> bool:
    """Whether the caller's caller, or who called that, is code of dspy_bridge's."""
    return any(sys._getframe(depth).f_globals["__name__"].startswith("dspy_bridge.") for depth in (2, 3))


class View(types.ModuleType):
    """A module as dspy_bridge sees it."""

    def __init__(self, whole: types.ModuleType) -> None:
        super().__init__(whole.__name__)
        self.__dict__.update(_whole=whole, _hidden=set())

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden and of_the_bridge():
            raise AttributeError(name)
        return getattr(self._whole, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._whole, name, value)


def hide_in_module(module: str, attribute: str) -> None:
    """The rest of the library has it still."""
    view = sys.modules[module]
    if not isinstance(view, View):
        view = sys.modules[module] = View(view)
    view._hidden.add(attribute)


def hide_in_class(owner: type, attribute: str) -> None:
    """Instances have it still."""
    owner = next(kind for kind in owner.__mro__ if attribute in vars(kind))
    hidden, before = inspect.getattr_static(owner, attribute), getattr(owner, "__getattr__", None)
    delattr(owner, attribute)

    def __getattr__(self: Any, name: str) -> Any:
        if name == attribute:
            return hidden.__get__(self)
        if before is not None:
            return before(self, name)
        raise AttributeError(name)

    owner.__getattr__ = __getattr__  # type: ignore[attr-defined]


hidden_settings: set[str] = set()


def hide_setting(owner: Any, attribute: str) -> None:
    """DSPy itself has it still."""
    if not hidden_settings:
        before = owner.__getattr__

        def __getattr__(self: Any, name: str) -> Any:
            if name in hidden_settings and of_the_bridge():
                raise AttributeError(name)
            return before(self, name)

        owner.__getattr__ = __getattr__
    hidden_settings.add(attribute)


sys.meta_path.insert(0, AtFirstUse())
