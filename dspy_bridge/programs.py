"""A program definition to a DSPy module, one call of it, and its prediction to plain values. Imports DSPy."""

from __future__ import annotations

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pydantic

from dspy_bridge import models, signatures
from dspy_bridge.errors import InvalidArgs, OutputInvalid

# Modules with only a sync `forward` run here. Not on the loop's own executor: every async LM call of DSPy passes
# through that one, and code that blocks would stop them all.
MAX_SYNC_THREADS = 64
_MODULES = {"predict": dspy.Predict, "chain_of_thought": dspy.ChainOfThought}


class Program:
    """A loaded program. Calls of it may overlap: DSPy's modules keep no state of a call."""

    def __init__(self, definition: dict[str, Any], lms: models.Models) -> None:
        """`definition`: the arguments of `create_program`. Raises `InvalidArgs`."""
        program_type = definition.get("program_type", "predict")
        if not isinstance(program_type, str) or program_type not in _MODULES:
            raise InvalidArgs(f"program_type: expected one of {', '.join(_MODULES)}")
        contract = signatures.build(definition["signature"])
        if program_type == "chain_of_thought" and "reasoning" in contract.inputs:
            raise InvalidArgs("signature.inputs: chain_of_thought writes the field 'reasoning'; choose another name")
        adapter = definition.get("adapter")
        self._adapter = None if adapter is None else models.adapter(adapter)
        lm = definition.get("lm")
        self._lm = None if lm is None else lms.lm(lm)
        self._lms = lms
        self._contract = contract
        self._module = _MODULES[program_type](contract.signature)
        self._config = definition.get("config") or {}
        for predictor in self._module.predictors():
            predictor.config = dict(self._config)

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
        if config:
            values["config"] = config
        settings = self._lms.call_settings(self._lm if lm is None else self._lms.lm(lm), self._adapter)
        try:
            with dspy.context(**settings):
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
            given = [name for name, value in (("config", config or self._config), ("lm", lm or self._lm)) if value]
            if given and isinstance(error, (AttributeError, TypeError, ValueError)):
                # DSPy checks LM settings where it uses them, with Python's own errors.
                raise InvalidArgs(f"{' or '.join(given)}: {error}") from error
            raise
        outputs = dict(prediction.items())
        for name, constraint in self._contract.outputs.items():
            try:
                constraint.validate_python(outputs.get(name))
            except pydantic.ValidationError as error:
                raise OutputInvalid(f"the LM's answer did not fit the signature: {name}: {_reason(error)}") from None
        return outputs

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


async def run(module: dspy.Module, values: dict[str, Any]) -> dspy.Prediction:
    """One call of a module: on the loop where it can, in a worker thread where it has only a sync `forward`."""
    if hasattr(module, "aforward"):
        return await module.acall(**values)
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_threads(), lambda: context.run(module, **values))


_pool: ThreadPoolExecutor | None = None


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(MAX_SYNC_THREADS, "dspy_bridge-sync")
    return _pool


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
