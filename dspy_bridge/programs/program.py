"""A loaded program: its DSPy module, its runs, and their outputs as plain values. Imports DSPy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import dspy

from dspy_bridge.dispatch import replies
from dspy_bridge.dispatch.call import Call
from dspy_bridge.errors import BridgeError, InvalidArgs, OutputInvalid
from dspy_bridge.lm import dspy_errors, dspy_setup, lm_call, lm_options
from dspy_bridge.lm.adapters import corrections, field_markers
from dspy_bridge.lm.budgets import Budget
from dspy_bridge.lm.journal import Journal
from dspy_bridge.lm.metering import endings
from dspy_bridge.lm.transport import routes
from dspy_bridge.logs import redaction
from dspy_bridge.programs import agents, conversations, module_factory, saved_state, scores
from dspy_bridge.runtime import large_inputs
from dspy_bridge.runtime.worker_threads import WorkerThreads
from dspy_bridge.signatures import builder, dspy_types
from dspy_bridge.streaming.stream import Stream

# The longest text of an error in a status of a stream, in characters.
_MOST_TOLD = 300


class Program:
    """A loaded program, whose runs may overlap. `of_dspy`: whether its module is DSPy's own."""

    def __init__(self, definition: dict[str, Any], lms: dspy_setup.LMs, threads: WorkerThreads) -> None:
        """`definition`: the arguments of `create_program`. Raises `InvalidArgs` or `NotAllowed`."""
        self._lms = lms
        self._threads = threads
        left_out = module_factory.extra_inputs(definition)
        self._contract = builder.build(definition["signature"], files_dir=lms.settings.files_dir, left_out=left_out)
        signature = self._contract.signature
        lm = definition.get("lm")
        self._lm_given: object = lm
        self._lm = None if lm is None else lms.lm(lm)
        self.runner = module_factory.build(definition, self._contract, lms)
        adapter = definition.get("adapter")
        self._adapter = None if adapter is None else lms.adapter(adapter, self.runner.native_tools)
        self.of_dspy = definition.get("program_type", "predict") in module_factory.TYPES
        converses = definition.get("program_type", "predict") in module_factory.CONVERSE
        self._conversation = self._contract.conversation if converses else None
        module = self.runner.module
        state = saved_state.read(definition, lms.settings.state_dir)
        self._saved_lm = None if state is None else saved_state.load(module, state)
        if self._saved_lm is not None and self._lm is None:
            self._lm_given = self._saved_lm
            self._lm = lms.lm(self._saved_lm, "state.lm")
        if definition.get("demos") is not None:
            saved_state.read_demos(definition["demos"], module, signature, lms.settings.files_dir)
        config, self._allow_truncated = endings.take_allowed(definition.get("config"))
        self._config, self._of_lm = lm_options.read_config(config)
        if not routes.has_litellm():
            self._lms.refuse_litellm(self._chosen_lm({}, None)[1], self._config)
        redaction.learn(self._of_lm)
        for predictor in module.predictors():
            predictor.config = {**predictor.config, **self._config}

    def state(self, module: dspy.Module | None = None) -> dict[str, Any]:
        """What DSPy's `save` writes; of `module`, if it is given: one that an optimizer has made of the program's."""
        return saved_state.dump(self.runner.module if module is None else module, self._saved_lm)

    def metric(self, given: dict[str, Any]) -> scores.Metric:
        """That of the argument `metric`. Raises `InvalidArgs`."""
        return scores.Metric(given, self._contract.signature, self._lms.settings.files_dir)

    def examples(
        self, metric: scores.Metric, inputs: list[Any], expected: list[Any] | None, where: str
    ) -> list[tuple[dspy.Example, dict[str, Any]]]:
        """For an optimizer: each with what the metric gets of it. `where`: of the lists, in errors."""
        examples = []
        read = metric.examples(inputs, expected, f"{where}expected")
        for index, (item, (given, outputs)) in enumerate(zip(inputs, read, strict=True)):
            here = f"{where}inputs[{index}]"
            if not isinstance(item, dict):
                raise InvalidArgs(f"{here}: expected an object of the signature's input fields")
            try:
                values = self._checked(item)
            except BridgeError as error:
                raise type(error)(str(error).replace("inputs", here, 1)) from None
            others = {name: value for name, value in given.items() if name not in item}
            example = dspy.Example({**values, **others, **outputs}).with_inputs(*values)
            examples.append((example, given))
        return examples

    def outputs(self, prediction: Any) -> dict[str, Any]:
        """The output fields of what the module returned. Raises `OutputInvalid`."""
        fields = list(self._contract.signature.output_fields)
        if isinstance(prediction, (dspy.Prediction, dict)):
            outputs = dspy_types.for_replies(prediction)
        elif len(fields) == 1:
            outputs = {fields[0]: prediction}
        else:
            expected = f"expected a dspy.Prediction with {', '.join(fields)}"
            raise OutputInvalid(f"the module returned {type(prediction).__name__}; {expected}", by_lm=False)
        # An LM that calls tools natively writes no other output.
        if not outputs.get("tool_calls"):
            self._contract.check_outputs(outputs)
        return outputs

    @contextmanager
    def optimizing(self, lm: object, run: lm_call.RunContext) -> Iterator[None]:
        """The settings of an optimization; `lm` as in `call`. Raises `LMNotConfigured` or `InvalidArgs`."""
        run.refuses_cut_off = not self._allow_truncated
        found = self._lm_for({}, lm)[1] or dspy.settings.lm
        self._gives_all({}, found, "while it is optimized")
        # Optimizers write into its settings.
        with self._lms.context(found and found.copy(), self.runner.adapter(self._adapter), run):
            yield

    def lm(self, given: object, where: str) -> dspy.BaseLM:
        """Another LM for an optimization, which may change its settings. Raises `InvalidArgs`."""
        return self._lms.lm(given, where).copy()

    async def call(
        self,
        inputs: dict[str, Any],
        config: dict[str, Any] | None,
        lm: object,
        call: Call,
        *,
        stream: bool,
        ends: float | None = None,
        attempts: int = 1,
        large: bool = False,
        budget: Budget | None = None,
        index: int | None = None,
        journal: Journal | None = None,
    ) -> dict[str, Any]:
        """Run on `inputs` and return the output fields. `large`: whether these are large.

        `ends`: when an item of a batch ends, in seconds of `time.monotonic`; None for the deadline of the call.
        `attempts`: how often an LM is asked at most for each answer, if it does not fit. `index`: that of an item.
        Raises `BridgeError`; any other exception is a defect.
        """
        runner = self.runner
        values = await self._read(inputs, large)
        config, allowed = endings.take_allowed(config)
        if config and not runner.takes_config:
            raise InvalidArgs("config: this type of program takes none per call; give it with the program")
        settings, own_lm = self._lm_for(config, lm)
        if settings:
            values["config"] = settings
        two_step = isinstance(self._adapter, dspy.TwoStepAdapter)
        of_dspy = {"config": config or self._config, "lm": lm or self._lm, "adapter": two_step}
        # The arguments that became settings of DSPy's modules.
        given = [name for name, value in of_dspy.items() if value and self.of_dspy]
        run = lm_call.RunContext(call.ends if ends is None else ends, call)
        run.refuses_cut_off = not (self._allow_truncated if allowed is None else allowed)
        run.budget, run.item, run.journal = budget, index, journal
        gives_all = self._gives_all(settings, own_lm, "in a stream" if stream else runner.one_answer)
        try:
            with self._lms.context(own_lm, runner.adapter(self._adapter), run):
                prediction, outputs = await self._run(values, run, stream, attempts)
            if (name := self._conversation) is not None:
                asked = self._contract.asked({**values, **inputs})
                outputs = {**outputs, name: conversations.gone_on(inputs.get(name), asked, outputs, outputs.get(name))}
            if gives_all:
                answers = prediction.completions
                outputs = {**outputs, "completions": [self.outputs(answers[at]) for at in range(len(answers))]}
        except (Exception, lm_call.Ended) as error:
            if run.over is not None:
                raise run.over from None
            if not isinstance(error, Exception):
                raise
            raise dspy_errors.translate(error, given) from error
        if run.over is not None:  # the module has swallowed it
            raise run.over
        return outputs

    def _attempts(self, most: int, say: Callable[[OutputInvalid], object]) -> corrections.Attempts:
        """How a run asks again for answers that do not fit."""

        def fits(signature: Any, fields: dict[str, Any]) -> None:
            # A module of the user's may have a predictor with outputs of the same names, which mean something else.
            if self.of_dspy and self._contract.signature.output_fields.keys() <= signature.output_fields.keys():
                self.outputs(fields)
            agents.check_answer(fields)

        return corrections.Attempts(most, fits, lambda error: dspy_errors.translate(error, []), say)

    def _gives_all(self, settings: dict[str, Any], lm: dspy.BaseLM | None, one: str | None) -> bool:
        """Whether a run gives all of several answers, with these settings for DSPy. `one`: when a run gives only one.

        Raises `InvalidArgs`. Modules of the user's give what they like.
        """
        options = {**getattr(lm or dspy.settings.lm, "kwargs", {}), **self._config, **settings}
        if not self.of_dspy or (options.get("n") or 1) == 1:
            return False
        if "completions" in self._contract.signature.output_fields:
            one = "with an output named completions"
        if one is not None:
            raise InvalidArgs(f"n: this program gives one answer {one}; expected 1, got {options['n']}")
        return True

    def _lm_for(self, config: dict[str, Any], lm: object) -> tuple[dict[str, Any], dspy.BaseLM | None]:
        """The call's settings for DSPy, and its LM: None for the default one. Raises `LMNotConfigured`, too."""
        settings, chosen = self._chosen_lm(config, lm)
        if config or lm is not None:
            self._lms.refuse_litellm(chosen, {**self._config, **settings})
        return settings, chosen

    def _chosen_lm(self, config: dict[str, Any], lm: object) -> tuple[dict[str, Any], dspy.BaseLM | None]:
        redaction.learn([self._of_lm, config])
        settings, of_lm = lm_options.read_config(config)
        of_lm = {**self._of_lm, **of_lm}
        if of_lm:
            changed = self._lms.changed_lm(self._lm_given if lm is None else lm, of_lm)
            if changed is not None:
                return settings, changed
            if not self.runner.takes_config:
                names = ", ".join(of_lm)
                raise InvalidArgs(f"config: {names}: set in the LM by your DSPY_BRIDGE_INIT, or give an lm")
            return {**settings, **of_lm}, None
        return settings, self._lm if lm is None else self._lms.lm(lm)

    async def _read(self, inputs: dict[str, Any], large: bool) -> dict[str, Any]:
        """As `_checked`, in a thread where that may take long."""
        if not large and (self._lms.settings.files_dir is None or not large_inputs.names_file(inputs)):
            return self._checked(inputs)
        # The `forward` of a user's module may do something else than its `aforward`.
        large_inputs.here.set(self.of_dspy or not self.runner.on_loop)
        return await large_inputs.in_thread(lambda: self._checked(inputs))

    def _checked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The values for the module. Raises `InvalidArgs` or `NotAllowed`, naming everything that is wrong."""
        return {name: _without_types(value) for name, value in self._contract.check(inputs).items()}

    async def _run(
        self, values: dict[str, Any], run: lm_call.RunContext, stream: bool, attempts: int
    ) -> tuple[Any, dict[str, Any]]:
        with ExitStack() as stack:
            streaming = None
            if stream:
                streaming = Stream(self.runner.module, self._contract.signature, run.call, on_loop=self.runner.on_loop)
                stack.enter_context(dspy.context(**streaming.settings()))
                run.stream = streaming
                run.on_asking_again = functools.partial(_say, run.call, streaming)
            if attempts > 1:
                run.attempts = self._attempts(attempts, run.on_asking_again)
            prediction = await self.runner.run(values, self._threads)
            outputs = self.outputs(prediction)
            if streaming is not None:
                await streaming.finish(outputs)
            return prediction, outputs


def _say(call: Call, streaming: Stream, error: OutputInvalid) -> None:
    streaming.begin_anew()
    wrong = replies.one_line(redaction.redact(str(error)), _MOST_TOLD)
    call.stream_item_threadsafe({"status": f"asking again: {wrong}"})


def _without_types(value: Any) -> Any:
    """Strings that look like DSPy's custom types stay strings: real images are objects by now."""
    if isinstance(value, dspy.History):
        turns = field_markers.changed(value.messages, field_markers.without_types)
        return value if turns is value.messages else dspy.History(messages=turns)
    return field_markers.changed(value, field_markers.without_types)
