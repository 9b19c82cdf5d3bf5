"""Loads and dumps a program's state, as DSPy's `save` writes it, and its demos. JSON only, no pickle. Imports DSPy."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata as packages
from typing import Annotated, Any

import dspy
import jiter
import pydantic
from typing_extensions import NotRequired, TypedDict

from dspy_bridge.errors import InvalidArgs, NotAllowed
from dspy_bridge.lm.adapters import choice
from dspy_bridge.logs import redaction
from dspy_bridge.signatures import media, validation

# A larger file is not a state.
MAX_STATE_BYTES = 64 * 1024 * 1024
# Of a predictor. DSPy writes them into each prompt, on the event loop: 500 take 16 to 60 ms.
MAX_DEMOS = 500
# The settings that are taken from a saved LM. An allow list: a state must not send prompts to another address, and
# providers have many names for that.
_LM_SETTINGS = frozenset(
    (
        *("model", "model_type", "cache", "num_retries", "rollout_id", "timeout", "use_developer_role"),
        *("temperature", "max_tokens", "max_completion_tokens", "top_p", "top_k", "min_p", "n", "stop", "seed"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "top_logprobs"),
        *("reasoning_effort", "thinking", "verbosity"),
    )
)


class _Signature(TypedDict):
    instructions: str
    fields: list[dict[str, str]]


@pydantic.with_config(extra="forbid")
class _Saved(TypedDict):
    """A predictor's state. DSPy sets any other key as an attribute, even over methods."""

    traces: list[Any]
    train: list[Any]
    demos: Annotated[list[dict[str, Any]], pydantic.Field(max_length=MAX_DEMOS)]
    signature: _Signature
    lm: NotRequired[dict[str, Any] | None]
    fields: NotRequired[Any]


_SAVED = pydantic.TypeAdapter(_Saved)
_CLOUDPICKLE = ".".join(packages.version("cloudpickle").split(".")[:2])


def read(definition: dict[str, Any], state_dir: str | None) -> dict[str, Any] | None:
    """The state in a `create_program`, if any. Raises `InvalidArgs` or `NotAllowed`."""
    state, path = definition.get("state"), definition.get("state_path")
    if state is not None and path is not None:
        raise InvalidArgs("state, state_path: expected one of them")
    where = "state" if path is None else "state_path"
    if path is not None:
        if state_dir is None:
            raise NotAllowed("state_path: DSPY_BRIDGE_STATE_DIR names the folder for states; it is not set")
        try:
            _, content = media.read_file(state_dir, path, MAX_STATE_BYTES, "DSPY_BRIDGE_STATE_DIR")
        except ValueError as error:
            raise validation.describe("state_path", error) from None
        try:
            state = jiter.from_json(content)
        except ValueError:
            raise InvalidArgs("state_path: expected JSON, as DSPy's save writes it") from None
    if not isinstance(state, dict | None):
        raise InvalidArgs(f"{where}: expected an object, as DSPy's save writes it")
    return state


def load(module: dspy.Module, state: dict[str, Any]) -> dict[str, Any] | None:
    """Load a state into a module; returns the settings of its saved LM, if any. Raises `InvalidArgs`."""
    wanted = dict(module.named_parameters())
    flat = isinstance(module, dspy.Predict)
    state = {name: value for name, value in state.items() if name != "metadata"}
    if state.keys().isdisjoint(_Saved.__annotations__) if flat else state.keys() != wanted.keys():
        expected = ", ".join(_Saved.__annotations__ if flat else wanted) or "nothing"
        text = f"state: of another program: expected {expected}, got {', '.join(state) or 'nothing'}"
        if "react" in state and "react" in wanted:
            text += "; DSPy's ReAct is another one than that which it was made with: optimize the program again"
        raise InvalidArgs(text)
    given = {"self": state} if flat else state
    for name, parameter in wanted.items():
        _check(given[name], parameter.signature.fields, "state" if flat else f"state.{name}")
    found = [saved["lm"] for saved in given.values() if saved.get("lm") is not None]
    lms = [{name: value for name, value in lm.items() if name in _LM_SETTINGS} for lm in found]
    if any(lm != lms[0] for lm in lms) or len(lms) not in (0, len(given)):
        raise InvalidArgs("state: its predictors have different LMs; expected one, or none")
    # A predictor's own LM would win over that of a call.
    without = {name: {**saved, "lm": None} for name, saved in given.items()}
    try:
        module.load_state(without["self"] if flat else without)
        for predictor in module.predictors():
            # An error shows now, not in each run.
            choice.default().format_demos(predictor.signature, predictor.demos)
    except Exception as error:
        raise InvalidArgs(f"state: DSPy cannot load it: {type(error).__name__}: {error}") from error
    return lms[0] if lms else None


def dump(module: dspy.Module, lm: dict[str, Any] | None) -> dict[str, Any]:
    """What DSPy's `save` writes, without secrets; `lm`: the result of `load`."""

    def clean(saved: dict[str, Any]) -> dict[str, Any]:
        return {**saved, "lm": lm or redaction.without_secrets(saved.get("lm"))}  # DSPy only leaves out `api_key`

    state = module.dump_state()
    # DSPy writes a single Predict without its name.
    state = clean(state) if isinstance(module, dspy.Predict) else {name: clean(saved) for name, saved in state.items()}
    python = ".".join(platform.python_version_tuple()[:2])
    versions = {"python": python, "dspy": dspy.__version__, "cloudpickle": _CLOUDPICKLE}
    return {**state, "metadata": {"dependency_versions": versions}}


def read_demos(
    demos: object, module: dspy.Module, signature: type[dspy.Signature], files_dir: str | None = None
) -> None:
    """Set the demos of a `create_program` on the predictors that write the program's outputs.

    `files_dir`: the folder for paths in them. Raises `InvalidArgs` or `NotAllowed`.
    """
    if not isinstance(demos, list):
        raise InvalidArgs('demos: expected a list of objects such as {"question": "…", "answer": "…"}')
    if len(demos) > MAX_DEMOS:
        raise InvalidArgs(f"demos: expected at most {MAX_DEMOS}")
    outputs = signature.output_fields.keys()
    predictors = [found for found in module.predictors() if outputs <= found.signature.output_fields.keys()]
    if not predictors:
        raise InvalidArgs("demos: no predictor of this module writes the signature's outputs; give a state instead")
    fields = media.validators(predictors[-1].signature.fields, files_dir)
    for index, demo in enumerate(demos):
        if not isinstance(demo, dict) or not demo:
            raise InvalidArgs(f"demos[{index}]: expected an object of fields")
    read = [validation.read_values(demo, fields, f"demos[{index}]") for index, demo in enumerate(demos)]
    for predictor in predictors:
        predictor.demos = [dict(demo) for demo in read]


def _check(saved: object, fields: Mapping[str, Any], where: str) -> None:
    """Whether a predictor with these fields can have the state. DSPy writes no names of fields but in demos."""
    try:
        checked = _SAVED.validate_python(saved, strict=True)
    except pydantic.ValidationError as error:
        raise validation.describe(where, error) from None
    expected = f"expected {len(fields)} fields ({', '.join(fields)})"
    count = len(checked["signature"]["fields"])
    if count != len(fields):
        raise InvalidArgs(f"{where}.signature: of another signature: {expected}, got {count}")
    for index, demo in enumerate(checked["demos"]):
        # An optimizer's demos may lack fields, and have some of the training set's.
        if demo.keys().isdisjoint(fields):
            raise InvalidArgs(f"{where}.demos[{index}]: of another signature: {expected}")
