"""Checks the inputs of a call and the outputs of an LM. Imports DSPy."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

import dspy
import pydantic

from dspy_bridge.errors import BridgeError, InvalidArgs, NotAllowed, OutputInvalid, refuse_unknown, step
from dspy_bridge.signatures import media

# Outputs that DSPy's modules add to a signature's: a history may contain whole answers.
_OF_MODULES = frozenset(("reasoning", "rationale", "trajectory", "final_reasoning", "tool_calls"))
# DSPy takes an LM's text for a union with `str` as it is: so null is written by most, and by DSPy's own demos.
_NULL = ("null", "None")


class Contract:
    """A signature with the validators of its fields.

    `inputs`: name to a validator, None if any value is valid; `optional`: those of them that are absent if they are not
    given. `outputs`: as `inputs`, for constrained ones only. `conversation`: the input that is it.
    """

    conversation: str | None = None

    def __init__(self, signature: type[dspy.Signature], defaults: dict[str, Any], files_dir: str | None) -> None:
        """`defaults`: those of optional inputs."""
        self.signature = signature
        self._kinds = {name: field.rebuild_annotation() for name, field in signature.fields.items()}
        self._files_dir = files_dir
        self._defaults = defaults
        self.inputs = {name: _validator_of(self._kinds[name], files_dir, self.turn) for name in signature.input_fields}
        self.optional: set[str] = set()
        outputs = {name: self._kinds[name] for name in signature.output_fields}
        # DSPy checks an answer without the constraints of Annotated.
        constrained = {name: kind for name, kind in outputs.items() if get_origin(kind) is Annotated}
        self.outputs = {name: pydantic.TypeAdapter(kind) for name, kind in constrained.items()}
        self._nullable = [name for name, kind in outputs.items() if _is_text_or_null(kind)]

    def check(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The validated inputs. Errors do not quote values.

        Raises `InvalidArgs` or `NotAllowed`, which names all missing and invalid inputs and the first unknown ones.
        """
        unknown = [name for name in inputs if name not in self.inputs]
        # Some of them: a client may send any number.
        wrong: list[BridgeError] = [InvalidArgs(f"inputs{step(name)}: unknown field") for name in unknown[:20]]
        values, misnamed = {}, bool(unknown)
        for name, validator in self.inputs.items():
            if name in self.optional and name not in inputs:
                continue
            missing = name not in inputs and name not in self._defaults and name != self.conversation
            value = inputs[name] if name in inputs else copy.deepcopy(self._defaults.get(name))
            value = [] if value is None and name == self.conversation else value
            try:
                if validator is not None:
                    value = validator.validate_python(value)
                elif missing:
                    raise ValueError
            except (TypeError, ValueError) as error:
                misnamed = misnamed or missing
                wrong.append(InvalidArgs(f"inputs.{name}: missing") if missing else describe(f"inputs.{name}", error))
            except BridgeError as error:  # of a turn of a history
                wrong.append(type(error)(f"inputs.{name}: {error}"))
            else:
                if not missing:
                    values[name] = value
        if wrong:
            expected = f"; expected {', '.join(self.inputs) or 'no inputs'}" if misnamed else ""
            kind = NotAllowed if any(isinstance(error, NotAllowed) for error in wrong) else InvalidArgs
            raise kind("; ".join(map(str, wrong)) + expected)
        return values

    def check_outputs(self, outputs: dict[str, Any]) -> None:
        """Validate, in place, constraints that DSPy does not check. Raises `OutputInvalid`, which names the field."""
        for name in self._nullable:
            if isinstance(outputs.get(name), str) and outputs[name].strip() in _NULL:
                outputs[name] = None
        for name, constraint in self.outputs.items():
            try:
                outputs[name] = constraint.validate_python(outputs.get(name))
            except pydantic.ValidationError as error:
                text = f"the LM's answer did not fit the signature: {describe(name, error)}"
                raise OutputInvalid(text, name) from None

    @functools.cached_property
    def _of_turns(self) -> dict[str, pydantic.TypeAdapter[Any] | None]:
        kinds = {name: kind for name, kind in self._kinds.items() if kind is not dspy.History}
        return {name: _validator_of(kind, self._files_dir) for name, kind in kinds.items()}

    def asked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Those of a run that its turn of a history has."""
        return {name: value for name, value in inputs.items() if name in self._of_turns}

    def turn(self, turn: dict[str, Any], where: str) -> dict[str, Any]:
        """A validated turn of a history. Raises `InvalidArgs` or `NotAllowed`, naming the field."""
        of_modules = {name: value for name, value in turn.items() if name in _OF_MODULES - self._of_turns.keys()}
        others = {name: value for name, value in turn.items() if name not in of_modules}
        if not others:
            raise InvalidArgs(f"{where}: expected at least one of {', '.join(self._of_turns)}")
        return {**of_modules, **read_values(others, self._of_turns, where)}


def _is_text_or_null(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_origin(annotation) in (Union, types.UnionType) and {str, type(None)} <= set(get_args(annotation))


def _writable(value: Any) -> Any:
    if value is None:
        raise media.unfit("expected text")
    if isinstance(value, list) and any(isinstance(item, _NOT_IN_LISTS) for item in value):
        raise media.unfit(
            "expected text; a list with numbers, booleans or null (an Erlang charlist is one) needs a type "
            "such as list[int]"
        )
    return value


# DSPy writes any value into the prompt. But None would be the word "None", and it takes the items of a list for texts.
_TEXT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(Annotated[Any, pydantic.AfterValidator(_writable)])
_NOT_IN_LISTS = (int, float, type(None))


def _validator_of(
    annotation: Any, files_dir: str | None, turn: media.Turn | None = None
) -> pydantic.TypeAdapter[Any] | None:
    """The validator for an input of that type; None if any value is valid."""
    if annotation is str:
        return _TEXT
    return None if annotation is Any else pydantic.TypeAdapter(media.accepting(annotation, files_dir, turn))


def describe(where: str, error: Exception) -> BridgeError:
    """An error of a validator as one of ours, without the value, which pydantic's text quotes."""
    if not isinstance(error, pydantic.ValidationError):
        return (NotAllowed if getattr(error, "type", "") == media.NOT_ALLOWED else InvalidArgs)(f"{where}: {error}")
    found = error.errors(include_url=False, include_input=False, include_context=False)
    refused = next((one for one in found if one["type"] == media.NOT_ALLOWED), None)
    first = refused or found[0]
    # Not pydantic's name for a member of a union.
    place = "".join(step(part) for part in first["loc"] if not str(part).startswith("function-"))
    text = f"{where}{place}: {first['msg']}"
    return InvalidArgs(text) if refused is None else NotAllowed(text)


def read_values(
    given: dict[str, Any], types: Mapping[str, pydantic.TypeAdapter[Any] | None], where: str, strict: bool | None = None
) -> dict[str, Any]:
    """The values, each as its type has it; None: any value is valid. Raises `InvalidArgs` or `NotAllowed`."""
    refuse_unknown(given, types, where)
    read = {}
    for name, value in given.items():
        validator = types[name]
        try:
            read[name] = value if validator is None else validator.validate_python(value, strict=strict)
        except (TypeError, ValueError) as error:
            raise describe(f"{where}.{name}", error) from None
    return read


def read_options(given: dict[str, Any], types: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of options, without conversions. Raises `InvalidArgs`, naming the option."""
    return read_values(given, {name: pydantic.TypeAdapter(kind) for name, kind in types.items()}, where, strict=True)
