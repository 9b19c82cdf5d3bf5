"""A program's learned state, in and out: what DSPy's `save` writes, and demos. JSON only, no pickle. Imports DSPy."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from typing import Any

import dspy
import jiter
import pydantic
from dspy.utils.saving import get_dependency_versions

from dspy_bridge import media, redaction
from dspy_bridge.errors import InvalidArgs, NotAllowed

# A state holds texts: a larger file is something else.
MAX_STATE_BYTES = 64 * 1024 * 1024
MAX_DEMOS = 10_000
# What DSPy writes of a predictor; it would set any other key as an attribute, methods included.
_KEYS = frozenset(("traces", "train", "demos", "signature", "lm", "fields"))
_KEY_NAMES = ", ".join(sorted(_KEYS))
# Where an LM is, and what it is told beside the prompt: a state that somebody gave must not send prompts elsewhere.
_NOT_FROM_STATES = frozenset(("api_base", "base_url", "model_list", "headers", "extra_headers"))
# What DSPy writes for a field without a description.
_NO_DESCRIPTION = re.compile(r"\$\{(\w+)\}")


def read(definition: dict[str, Any], state_dir: str | None) -> dict[str, Any] | None:
    """The state that a `create_program` gives, if any. Raises `InvalidArgs` or `NotAllowed`."""
    state, path = definition.get("state"), definition.get("state_path")
    if state is not None and path is not None:
        raise InvalidArgs("state, state_path: expected one of them")
    if path is not None:
        state, where = _read_file(path, state_dir), "state_path"
    else:
        where = "state"
    if state is not None and not isinstance(state, dict):
        raise InvalidArgs(f"{where}: expected an object, as DSPy's save writes it")
    return state


def _read_file(path: object, state_dir: str | None) -> Any:
    if not isinstance(path, str) or not path or "\0" in path:
        raise InvalidArgs("state_path: expected text")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise InvalidArgs("state_path: no name that a file can have") from None
    if state_dir is None:
        raise NotAllowed("state_path: DSPY_BRIDGE_STATE_DIR names the folder for states; it is not set")
    folder = os.path.realpath(state_dir)
    # Links and .. are followed first: what counts is where the file is.
    found = os.path.realpath(os.path.join(folder, path))
    if os.path.commonpath((folder, found)) != folder:
        raise NotAllowed("state_path: expected a file under DSPY_BRIDGE_STATE_DIR")
    try:
        # A pipe would be waited for.
        descriptor = os.open(found, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_STATE_BYTES:
                raise InvalidArgs(f"state_path: expected a file of at most {MAX_STATE_BYTES} bytes")
            with open(descriptor, "rb", closefd=False) as file:
                return jiter.from_json(file.read(MAX_STATE_BYTES))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InvalidArgs(f"state_path: cannot be read: {error.strerror}") from None
    except ValueError:
        raise InvalidArgs("state_path: expected JSON, as DSPy's save writes it") from None


def load(module: dspy.Module, state: dict[str, Any]) -> dict[str, Any] | None:
    """Give a module its state; returns the state of the LM that it was saved with, if any. Raises `InvalidArgs`."""
    wanted = dict(module.named_parameters())
    state = {name: value for name, value in state.items() if name != "metadata"}
    if _is_flat(module):
        if state.keys().isdisjoint(_KEYS):
            raise InvalidArgs(f"state: of another program: expected {_KEY_NAMES}, got {_names(state)}")
    elif state.keys() != wanted.keys():
        raise InvalidArgs(f"state: of another program: expected {_names(wanted)}, got {_names(state)}")
    given = _by_predictor(module, state)
    for name, parameter in wanted.items():
        _check(given[name], parameter, "state" if _is_flat(module) else f"state.{name}")
    lms = [_without_place(saved["lm"]) for saved in given.values() if saved.get("lm") is not None]
    if any(lm != lms[0] for lm in lms) or len(lms) not in (0, len(given)):
        raise InvalidArgs("state: its predictors have different LMs; expected one, or none")
    # Which LM it is called with is the program's business: one of a predictor's own would win over a call's.
    without = {name: {**saved, "lm": None} for name, saved in given.items()}
    try:
        module.load_state(without["self"] if _is_flat(module) else without)
        for predictor in module.predictors():
            # Now rather than with every execute.
            dspy.ChatAdapter().format_demos(predictor.signature, predictor.demos)
    except Exception as error:
        raise InvalidArgs(f"state: DSPy cannot load it: {type(error).__name__}: {error}") from error
    return lms[0] if lms else None


def dump(module: dspy.Module, lm: dict[str, Any] | None) -> dict[str, Any]:
    """What DSPy's `save` writes to a file; `lm`: what `load` gave."""
    state: dict[str, Any] = module.dump_state()
    if lm is not None:
        given = {name: {**saved, "lm": lm} for name, saved in _by_predictor(module, state).items()}
        state = given["self"] if _is_flat(module) else given
    return {**state, "metadata": {"dependency_versions": get_dependency_versions()}}


def _is_flat(module: dspy.Module) -> bool:
    """Of a Predict alone DSPy writes the one predictor's state, without a name for it."""
    return isinstance(module, dspy.Predict)


def _by_predictor(module: dspy.Module, state: dict[str, Any]) -> dict[str, Any]:
    return {"self": state} if _is_flat(module) else state


def _without_place(lm: dict[str, Any]) -> dict[str, Any]:
    """An LM's state without what says where it is, and without secrets."""
    return {
        name: value
        for name, value in lm.items()
        if name not in _NOT_FROM_STATES and not (isinstance(value, str) and redaction.names_secret(name))
    }


def read_demos(
    demos: object, module: dspy.Module, signature: type[dspy.Signature], files_dir: str | None = None
) -> None:
    """Give the demos of a `create_program` to the predictors that write the program's outputs.

    `files_dir`: the folder that paths in them may lead to. Raises `InvalidArgs` or `NotAllowed`.
    """
    if not isinstance(demos, list):
        raise InvalidArgs('demos: expected a list of objects such as {"question": "…", "answer": "…"}')
    if len(demos) > MAX_DEMOS:
        raise InvalidArgs(f"demos: expected at most {MAX_DEMOS}")
    outputs = signature.output_fields.keys()
    predictors = [found for found in module.predictors() if outputs <= found.signature.output_fields.keys()]
    if not predictors:
        raise InvalidArgs("demos: no predictor of this module writes the signature's outputs; give a state instead")
    fields = {
        name: pydantic.TypeAdapter(media.accepting(field.rebuild_annotation(), files_dir))
        for name, field in predictors[-1].signature.fields.items()
    }
    read = [_demo(demo, fields, f"demos[{index}]") for index, demo in enumerate(demos)]
    for predictor in predictors:
        predictor.demos = [dict(demo) for demo in read]


def _demo(demo: object, fields: Mapping[str, pydantic.TypeAdapter[Any]], where: str) -> dict[str, Any]:
    if not isinstance(demo, dict) or not demo:
        raise InvalidArgs(f"{where}: expected an object of fields")
    read = {}
    for name, value in demo.items():
        if name not in fields:
            raise InvalidArgs(f"{where}.{name}: unknown field; expected {', '.join(fields)}")
        try:
            read[name] = fields[name].validate_python(value)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            raise InvalidArgs(f"{where}.{name}: {first['msg']}") from None
        except (TypeError, ValueError) as error:
            raise InvalidArgs(f"{where}.{name}: {error}") from None
    return read


def _check(saved: object, parameter: Any, where: str) -> None:
    if not isinstance(saved, dict):
        raise InvalidArgs(f"{where}: expected an object")
    for key in saved:
        if key not in _KEYS:
            raise InvalidArgs(f"{where}: unknown key {key!r}; expected {_KEY_NAMES}")
    for key in ("traces", "train", "demos"):
        if not isinstance(saved.get(key), list):
            raise InvalidArgs(f"{where}.{key}: expected a list")
    if not all(isinstance(demo, dict) for demo in saved["demos"]):
        raise InvalidArgs(f"{where}.demos: expected a list of objects")
    if saved.get("lm") is not None and not isinstance(saved["lm"], dict):
        raise InvalidArgs(f"{where}.lm: expected an object or null")
    _check_signature(saved.get("signature"), parameter.signature, f"{where}.signature")
    names = parameter.signature.fields
    for index, demo in enumerate(saved["demos"]):
        # An optimizer's demos may have fewer fields, and some of the training set's besides.
        if not any(name in names for name in demo):
            expected = ", ".join(names)
            raise InvalidArgs(f"{where}.demos[{index}]: for another signature: expected fields of {expected}")


def _check_signature(saved: object, signature: type[dspy.Signature], where: str) -> None:
    fields = saved.get("fields") if isinstance(saved, dict) else None
    if not isinstance(saved, dict) or not isinstance(saved.get("instructions"), str) or not isinstance(fields, list):
        raise InvalidArgs(f"{where}: expected an object with instructions and fields")
    for index, field in enumerate(fields):
        texts = (field.get("prefix"), field.get("description")) if isinstance(field, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise InvalidArgs(f"{where}.fields[{index}]: expected an object with prefix and description, texts")
    # DSPy writes no names; a prefix is made of the name unless somebody chose another, an optimizer for one, and the
    # description names the field where there is none.
    wanted = [field["prefix"] for field in signature.dump_state()["fields"]]
    got = [field["prefix"] for field in fields]
    same = len(got) == len(wanted) and not set(got).isdisjoint(wanted)
    for name, field in zip(signature.fields, fields, strict=False):
        described = _NO_DESCRIPTION.fullmatch(field["description"])
        same = same and (described is None or described[1] == name)
    if not same:
        raise InvalidArgs(f"{where}: of another signature: expected fields {_texts(wanted)}, got {_texts(got)}")


def _names(named: Mapping[str, Any]) -> str:
    return ", ".join(named) or "nothing"


def _texts(texts: list[str]) -> str:
    return ", ".join(text.rstrip(":") for text in texts) or "none"
