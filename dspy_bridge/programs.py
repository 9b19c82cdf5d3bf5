"""A program definition to a DSPy module, one call of it, and its prediction to plain values. Imports DSPy."""

from __future__ import annotations

from typing import Any

import dspy
import pydantic

from dspy_bridge import models, signatures
from dspy_bridge.errors import InvalidArgs, OutputInvalid
from dspy_bridge.sync_threads import THREADS

_MODULES = {"predict": dspy.Predict, "chain_of_thought": dspy.ChainOfThought}


class Program:
    """A loaded program. Calls of it may overlap: DSPy's modules keep no state of a call."""

    def __init__(self, definition: dict[str, Any], lms: models.Models) -> None:
        """`definition`: the arguments of `create_program`. Raises `InvalidArgs`."""
        program_type = definition.get("program_type", "predict")
        if not isinstance(program_type, str) or (program_type not in _MODULES and ":" not in program_type):
            raise InvalidArgs(f"program_type: expected one of {', '.join(_MODULES)}, or package.module:Class")
        contract = signatures.build(definition["signature"])
        if program_type == "chain_of_thought" and "reasoning" in contract.inputs:
            raise InvalidArgs("signature.inputs: chain_of_thought writes the field 'reasoning'; choose another name")
        adapter = definition.get("adapter")
        self._adapter = None if adapter is None else models.adapter(adapter)
        lm = definition.get("lm")
        self._lm = None if lm is None else lms.pool(lm)
        self._lms = lms
        self._contract = contract
        if program_type in _MODULES:
            self._module = _MODULES[program_type](contract.signature)
        else:
            self._module = models.user_module(program_type, contract.signature, lms.allow_modules)
        self._takes_config = program_type in _MODULES
        self._config = definition.get("config") or {}
        for predictor in self._module.predictors():
            predictor.config = {**predictor.config, **self._config}

    async def call(
        self,
        inputs: dict[str, Any],
        config: dict[str, Any] | None,
        lm: dict[str, Any] | None,
        usage: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Run on `inputs` and give the output fields; `usage` is filled with tokens by model, unless None.

        Raises `BridgeError`, or whatever a defect raises.
        """
        values: dict[str, Any] = self._check(inputs)
        if config and not self._takes_config:
            raise InvalidArgs("config: a module of your own takes none per call; give it with the program")
        if config:
            values["config"] = config
        try:
            with self._lms.context(self._lm if lm is None else self._lms.pool(lm), self._adapter):
                if usage is None:
                    prediction = await run(self._module, values)
                else:
                    with dspy.track_usage() as tracker:
                        try:
                            prediction = await run(self._module, values)
                        finally:
                            usage.update(tracker.get_total_tokens())
        except Exception as error:
            known = models.translate(error)
            if known is not None:
                raise known from error
            unfit = InvalidArgs(f"inputs: DSPy cannot write them into a prompt: {error}")
            if _came_through(error, "dspy.adapters", "format"):
                raise unfit from error
            given = [name for name, value in (("config", config or self._config), ("lm", lm or self._lm)) if value]
            if given and isinstance(error, (AttributeError, TypeError, ValueError, OverflowError)):
                # DSPy checks LM settings where it uses them, with Python's own errors.
                raise InvalidArgs(f"{' or '.join(given)}: {error}") from error
            # From the prompt to a provider's request, settings of the LM included.
            if _came_through(error, "dspy.clients.execution", "_canonical"):
                raise unfit from error
            raise
        outputs = self._outputs(prediction)
        for name, constraint in self._contract.outputs.items():
            try:
                constraint.validate_python(outputs.get(name))
            except pydantic.ValidationError as error:
                raise OutputInvalid(f"the LM's answer did not fit the signature: {name}: {_reason(error)}") from None
        return outputs

    def _outputs(self, prediction: Any) -> dict[str, Any]:
        if isinstance(prediction, (dspy.Prediction, dict)):
            return dict(prediction.items())
        fields = list(self._contract.signature.output_fields)
        if len(fields) == 1:
            return {fields[0]: prediction}
        kind = type(prediction).__name__
        raise OutputInvalid(f"the module returned {kind}; expected a dspy.Prediction with {', '.join(fields)}")

    def _check(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs as DSPy wants them; every missing, unknown and unfit one is named at once."""
        wrong = [f"inputs.{name}: unknown field" for name in inputs if name not in self._contract.inputs]
        values = {}
        for name, validator in self._contract.inputs.items():
            if name not in inputs:
                if validator is None or not _takes_none(validator):
                    wrong.append(f"inputs.{name}: missing")
                continue
            try:
                values[name] = inputs[name] if validator is None else _convert(validator, inputs[name])
            except (pydantic.ValidationError, TypeError, ValueError) as error:
                wrong.append(f"inputs.{name}: {_reason(error)}")
        if wrong:
            expected = ", ".join(self._contract.inputs) or "no inputs"
            raise InvalidArgs(f"{'; '.join(wrong)}; expected {expected}")
        return values


def _came_through(error: Exception, package: str, function: str) -> bool:
    """Whether it was raised below that function of DSPy's, which takes less than the types of inputs allow."""
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == function and frame.f_globals.get("__name__", "").startswith(package):
            return True
        traceback = traceback.tb_next
    return False


async def run(module: dspy.Module, values: dict[str, Any]) -> dspy.Prediction:
    """One call of a module: on the loop where it can, in a worker thread where it has only a sync `forward`."""
    if hasattr(module, "aforward"):
        return await module.acall(**values)
    return await THREADS.run(lambda: module(**values))


def _convert(validator: pydantic.TypeAdapter[Any], value: Any) -> Any:
    kind = validator._type
    if isinstance(value, str) and isinstance(kind, type) and issubclass(kind, dspy.Type):
        return kind(value)  # a URL, a data: URL; DSPy's constructors read no files
    return validator.validate_python(value)


def _takes_none(validator: pydantic.TypeAdapter[Any]) -> bool:
    try:
        validator.validate_python(None)
    except pydantic.ValidationError:
        return False
    return True


def _reason(error: Exception) -> str:
    """What is wrong, without the value: pydantic's own text quotes it."""
    if isinstance(error, pydantic.ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = "".join(f"[{part!r}]" for part in first["loc"])
        return f"{place}{' ' if place else ''}{first['msg']}"
    return str(error)
