"""A program definition to a DSPy module, one call of it, and its prediction to plain values. Imports DSPy."""

from __future__ import annotations

from typing import Any

import dspy

from dspy_bridge.caller import Caller
from dspy_bridge.errors import BridgeError, InvalidArgs, OutputInvalid
from dspy_bridge.lm import connections, dspy_setup, field_markers
from dspy_bridge.lm.usage import Meter
from dspy_bridge.logs import redaction
from dspy_bridge.programs import module_factory, remote_tools, saved_state
from dspy_bridge.runtime import large_inputs
from dspy_bridge.runtime.worker_threads import WorkerThreads
from dspy_bridge.signatures import builder
from dspy_bridge.streaming.stream import Stream


class Program:
    """A loaded program. Calls of it may overlap: DSPy's modules keep no state of a call."""

    def __init__(self, definition: dict[str, Any], lms: dspy_setup.Models, threads: WorkerThreads) -> None:
        """`definition`: the arguments of `create_program`. Raises `InvalidArgs` or `NotAllowed`."""
        self._lms = lms
        self._threads = threads
        left_out = module_factory.extra_inputs(definition)
        self._contract = builder.build(definition["signature"], files_dir=lms.settings.files_dir, left_out=left_out)
        signature = self._contract.signature
        adapter = definition.get("adapter")
        self._adapter = None if adapter is None else lms.adapter(adapter)
        lm = definition.get("lm")
        self._lm = None if lm is None else lms.pool(lm)
        self._runner = module_factory.build(definition, signature, lms)
        self._of_dspy = definition.get("program_type", "predict") in module_factory.TYPES
        module = self._runner.module
        state = saved_state.read(definition, lms.settings.state_dir)
        self._saved_lm = None if state is None else saved_state.load(module, state)
        if self._saved_lm is not None and self._lm is None:
            self._lm = lms.saved_pool(self._saved_lm)
        if definition.get("demos") is not None:
            saved_state.read_demos(definition["demos"], module, signature, lms.settings.files_dir)
        self._config = definition.get("config") or {}
        redaction.learn(self._config)
        for predictor in module.predictors():
            predictor.config = {**predictor.config, **self._config}
        self._text_fields = [name for name, field in signature.output_fields.items() if field.annotation is str]

    def state(self) -> dict[str, Any]:
        """What DSPy's `save` writes."""
        return saved_state.dump(self._runner.module, self._saved_lm)

    async def call(
        self,
        inputs: dict[str, Any],
        config: dict[str, Any] | None,
        lm: dict[str, Any] | None,
        call: Caller,
        *,
        stream: bool,
        limit: int = large_inputs.LARGE,
    ) -> dict[str, Any]:
        """Run on `inputs` and give the output fields; `stream`: tell of it meanwhile; `limit`: what is large.

        Raises `BridgeError`, or whatever a defect raises.
        """
        runner = self._runner
        values = await self._read(inputs, call, limit)
        if config and not runner.takes_config:
            raise InvalidArgs("config: this type of program takes none per call; give it with the program")
        redaction.learn([self._config, config])
        if config:
            values["config"] = config
        remote_tools.asking.set(call)
        try:
            with self._lms.context(self._lm if lm is None else self._lms.pool(lm), runner.adapter(self._adapter)):
                outputs = await self._run(values, call, stream)
        except Exception as error:
            if connections.ran_out(error):
                await connections.close_idle()
            raise self._known(error, config, lm) from error
        # An LM that calls tools, natively, writes nothing else.
        if not outputs.get("tool_calls"):
            self._contract.check_outputs(outputs)
        return outputs

    async def _read(self, inputs: dict[str, Any], call: Caller, limit: int) -> dict[str, Any]:
        """As `_checked`, where that holds up nobody else; notes whether they are large."""
        may_name_files = self._lms.settings.files_dir is not None and any(
            isinstance(value, (dict, list)) for value in inputs.values()
        )
        small = call.size < large_inputs.NEVER_LARGE or not large_inputs.is_large(inputs, limit)
        if small and not may_name_files:
            return self._checked(inputs)
        values, are_large = await large_inputs.in_thread(lambda: _weighed(self._checked(inputs), limit))
        # Of a host's own module nobody knows whether its `forward` does what its `aforward` does.
        large_inputs.here.set(are_large and (self._of_dspy or not self._runner.on_loop))
        return values

    def _checked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The values that the module is called with. Raises `InvalidArgs` or `NotAllowed`, naming all that is wrong."""
        extra = self._runner.extra
        wrong: list[BridgeError] = []
        try:
            self._runner.check(inputs)
        except InvalidArgs as error:
            wrong.append(error)
        values = self._contract.check({name: value for name, value in inputs.items() if name not in extra}, wrong)
        values.update((name, inputs[name]) for name in extra)
        return {name: _without_types(value) for name, value in values.items()}

    async def _run(self, values: dict[str, Any], call: Caller, stream: bool) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        told = None
        if stream:
            told = Stream(self._runner.module, self._text_fields, call, on_loop=self._runner.on_loop)
            settings = told.settings()
        if isinstance(call.meter, Meter):
            settings["usage_tracker"] = call.meter.tracker
            settings["callbacks"] = [*settings.get("callbacks", dspy.settings.callbacks), call.meter]
        if not settings:
            return self._outputs(await self._runner.run(values, self._threads))
        with dspy.context(**settings):
            outputs = self._outputs(await self._runner.run(values, self._threads))
            if told is not None:
                await told.finish(outputs)
            return outputs

    def _outputs(self, prediction: Any) -> dict[str, Any]:
        if isinstance(prediction, (dspy.Prediction, dict)):
            return dict(prediction.items())
        fields = list(self._contract.signature.output_fields)
        if len(fields) == 1:
            return {fields[0]: prediction}
        kind = type(prediction).__name__
        raise OutputInvalid(f"the module returned {kind}; expected a dspy.Prediction with {', '.join(fields)}")

    def _known(self, error: Exception, config: dict[str, Any] | None, lm: dict[str, Any] | None) -> Exception:
        """The error of ours for one that came out of DSPy, or itself."""
        known = dspy_setup.translate(error)
        if known is not None:
            return known
        unfit = InvalidArgs(f"inputs: DSPy cannot write them into a prompt: {error}")
        way = _way(error)
        if _came_through(way, "dspy.adapters", "format"):
            return unfit
        read = any(
            name == "parse" and module.startswith(("dspy.adapters", "dspy_bridge.lm.guarded_adapters"))
            for module, name in way
        )
        if read and (
            isinstance(error, RecursionError) or any(module.partition(".")[0] in _JSON_READERS for module, _ in way)
        ):
            return OutputInvalid(
                f"the LM's answer could not be read: {type(error).__name__}, as of what is nested too deeply"
            )
        second = self._adapter if isinstance(self._adapter, dspy.TwoStepAdapter) else None
        settings = (("config", config or self._config), ("lm", lm or self._lm), ("adapter", second))
        given = [name for name, value in settings if value]
        if given and self._of_dspy and _is_of_settings(error, way):
            return InvalidArgs(f"{' or '.join(given)}: {error}")
        # From the prompt to a provider's request, settings of the LM included.
        if _came_through(way, "dspy.clients.execution", "_canonical"):
            return unfit
        return error


def _weighed(values: dict[str, Any], limit: int) -> tuple[dict[str, Any], bool]:
    return values, large_inputs.is_large(values, limit)


def _without_types(value: Any) -> Any:
    """Texts of a request are texts: an image among them is an object by now."""
    if isinstance(value, dspy.History):
        turns = field_markers.changed(value.messages, field_markers.without_types)
        return value if turns is value.messages else dspy.History(messages=turns)
    return field_markers.changed(value, field_markers.without_types)


# What DSPy's adapters read JSON with. Of what is nested too deeply they raise errors of their own.
_JSON_READERS = ("json", "json_repair")
# Where DSPy checks settings of an LM. Should it name one otherwise, what is wrong with them becomes `internal`.
_CHECKS = (
    ("dspy.predict.predict", "_forward_preprocess"),
    ("dspy.clients.execution", "prepare"),
    ("dspy.clients.execution", "_select_engine"),
)
# Where it calls an LM with settings as keyword arguments: by package and function.
_CALLS = (("dspy.adapters", ("acall", "__call__")), ("dspy.clients.engines", ("complete_legacy",)))


def _is_of_settings(error: Exception, way: list[tuple[str, str]]) -> bool:
    """Whether DSPy refused settings of an LM, which it does with Python's own errors.

    An LM's or an adapter's code may raise the same, with contents in the text: that is a defect.
    """
    module, function = way[-1]
    if isinstance(error, TypeError) and any(module.startswith(where) and function in names for where, names in _CALLS):
        return True
    known = isinstance(error, (AttributeError, TypeError, ValueError, OverflowError))
    return known and module.startswith("dspy.") and any(_came_through(way, *check) for check in _CHECKS)


def _way(error: Exception) -> list[tuple[str, str]]:
    """The module and function of each frame that it came through, that which raised it last."""
    way = []
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        way.append((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        traceback = traceback.tb_next
    return way


def _came_through(way: list[tuple[str, str]], package: str, function: str) -> bool:
    """Whether it was raised below that function of DSPy's, which takes less than the types of inputs allow."""
    return any(name == function and module.startswith(package) for module, name in way)
