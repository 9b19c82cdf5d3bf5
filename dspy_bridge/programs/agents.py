"""DSPy's ReAct: by trajectory, as in DSPy 3.4, or by history, as `ReActV2` there and `ReAct` in 3.5. Imports DSPy.

Both kinds take the input `history` and the config of a call, and give one shape of results.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import dspy
import pydantic

from dspy_bridge.errors import InvalidArgs, OutputInvalid, SetupFailed
from dspy_bridge.lm import lm_call
from dspy_bridge.programs import conversations
from dspy_bridge.programs.conversations import SUBMIT
from dspy_bridge.programs.remote_tools import AgentTool, RemoteTool, failure, read_argument
from dspy_bridge.signatures.validation import Contract

_HISTORY = "history"
_UNFIT = "the LM's answer did not fit the signature: "


def extra_inputs() -> dict[str, Any]:
    """The conversation, which a signature may declare."""
    return {_HISTORY: dspy.History}


def chosen(wanted: str | None) -> Any:
    """DSPy's class: its ReAct, or that of a version, `v1` or `v2`. Raises `SetupFailed` if DSPy has it no longer."""
    if wanted == "v2" and hasattr(dspy, "ReActV2"):
        return dspy.ReActV2
    if wanted is not None and by_history(dspy.ReAct) != (wanted == "v2"):
        raise SetupFailed(f"DSPY_BRIDGE_REACT: DSPy {dspy.__version__} has no ReAct {wanted}")
    return dspy.ReAct


def version(wanted: str | None) -> str | None:
    """That of the class, as the setting has it; None if DSPy has none of the wanted version."""
    try:
        return "v2" if by_history(chosen(wanted)) else "v1"
    except SetupFailed:
        return None


@functools.cache
def by_history(kind: Any) -> bool:
    """Whether that class asks its LM with the history of the conversation: what its predictors take tells it."""
    predictors = kind("question -> answer", tools=[]).predictors()
    return any(field.annotation is dspy.History for one in predictors for field in one.signature.input_fields.values())


def make(
    kind: Any, contract: Contract, tools: list[RemoteTool], max_iters: dict[str, int], files_dir: str | None
) -> dspy.Module:
    """The module of a `react` program, whose contract gets the input of its conversation."""
    name = contract.conversation or _HISTORY
    contract.inputs[name] = conversations.validator(contract)
    contract.optional.add(name)
    takes_content = not by_history(kind)
    agents_tools = [AgentTool(tool, files_dir, takes_content=takes_content) for tool in tools]
    agent = _agent_of(kind)(contract.signature, tools=agents_tools, **max_iters)
    agent.conversation = name
    for predictor in agent.predictors():
        predictor.__class__ = Step
    ends = next(reversed(agent.tools))
    # DSPy would show the LM tracebacks with local paths of arguments that do not fit.
    agent.tools[ends] = _Ending(agent.tools[ends], contract if ends == SUBMIT else None)
    return agent


class _Ending(dspy.Tool):  # type: ignore[misc]
    """The tool by which an agent ends. Arguments that it does not have are ignored."""

    def __init__(self, tool: dspy.Tool, contract: Contract | None) -> None:
        fields = {} if contract is None else contract.signature.output_fields
        super().__init__(tool.func, name=tool.name, desc=tool.desc, args=tool.args, arg_types=tool.arg_types)
        kinds = {name: field.rebuild_annotation() for name, field in fields.items()}
        # On the function: copies of the module share it.
        self.func.declared = {name: pydantic.TypeAdapter(kind) for name, kind in kinds.items()}

    def read(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments as values of their types. Raises `ValueError`."""
        declared = self.func.declared
        if missing := [name for name in declared if name not in arguments]:
            raise ValueError(f"missing {', '.join(missing)}; expected {', '.join(declared)}")
        return {name: read_argument(name, validator, arguments[name]) for name, validator in declared.items()}

    def __call__(self, /, **arguments: Any) -> Any:
        try:
            return self.func(**self.read(arguments))
        except ValueError as error:
            run = _current.get()
            run.wrong = f"{self.name}: {error}"
            # The LM is asked again: what was streamed of these arguments is void.
            lm_call.run().on_asking_again(OutputInvalid(run.wrong))
            return failure(self.name, error)

    async def acall(self, /, **arguments: Any) -> Any:
        return self(**arguments)


class _Run:
    """One run of an agent. `forced`: the LM is asked to end now. `wrong`: what was, with the last call of `submit`."""

    forced = False
    wrong = "it has no call of submit"

    def __init__(self, agent: Any, values: dict[str, Any]) -> None:
        self._agent = agent
        self.config = values.pop("config", None) or {}
        self._given = values.pop(agent.conversation, None) or []
        self._inputs = dict(values)
        self._traced = len(dspy.settings.trace or ())
        self._history: Any = None
        if agent.by_history:
            self._history = values[_HISTORY] = conversations.to_history(self._given, agent.signature.output_fields)
        elif self._given:
            values[_HISTORY] = conversations.for_trajectory(self._given, agent.signature)
        self.values = values

    def result(self, prediction: Any) -> dspy.Prediction:
        """The prediction, in the shape of both kinds."""
        outputs = {name: prediction[name] for name in self._agent.signature.output_fields if name in prediction}
        if self._agent.by_history:
            turns = conversations.of_history(self._history.messages[len(self._given) :])
            trajectory, reason = conversations.to_trajectory(turns), prediction.termination_reason
            thoughts = [turn["next_thought"] for turn in turns if turn.get("next_thought")]
            reasoning = thoughts[-1] if thoughts else None
        else:
            trajectory, reasoning = prediction.trajectory, prediction.reasoning
            turns = conversations.of_trajectory(trajectory, len(self._given))
            turns = [{**self._inputs, **turns[0]}, *turns[1:]]
            turns[-1] |= outputs
            reason = self._how_it_ended(trajectory)
        shape = {"trajectory": trajectory, "reasoning": reasoning, **outputs}
        shape[self._agent.conversation] = [*self._given, *turns]
        return dspy.Prediction(**shape, termination_reason=reason)

    def _how_it_ended(self, trajectory: dict[str, Any]) -> str:
        if conversations.FINISH in [value for key, value in trajectory.items() if key.startswith("tool_name_")][-1:]:
            return conversations.FINISH
        # Else the LM named no valid tool, or its context was full.
        return "max_iters" if f"tool_name_{self._agent.max_iters - 1}" in trajectory else "stopped"

    def clean_trace(self) -> None:
        """What demos are made of: each step with the history before it, which DSPy extends, and without its tools."""
        traced = list(dspy.settings.trace or ())[self._traced :] if self._agent.by_history else []
        steps = [inputs for predictor, inputs, _ in traced if predictor is self._agent.react]
        for number, inputs in enumerate(steps, len(self._given)):
            inputs.pop("tools", None)
            inputs[_HISTORY] = dspy.History(messages=self._history.messages[:number])

    def translated(self, error: ValueError) -> Exception:
        """The error of ours for one that DSPy's class itself raises: the LM did not end with the outputs."""
        *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") not in [kind.__module__ for kind in type(self._agent).__mro__]:
            return error
        return OutputInvalid(f"{_UNFIT}{self.wrong}")

    def check(self, calls: Any) -> None:
        """Raises `OutputInvalid` for calls with which the run cannot end, if it has to."""
        if not self.forced:
            return
        ends = _ends(calls)
        try:
            if not ends:
                raise ValueError(_Run.wrong)
            self._agent.tools[SUBMIT].read(ends[-1])
        except ValueError as error:
            raise OutputInvalid(f"{_UNFIT}{error}") from None


def _ends(calls: Any) -> list[Any]:
    """The arguments of each call of `submit`."""
    return [] if calls is None else [call.args for call in calls.tool_calls if call.name == SUBMIT]


def _refuse_two_ends(calls: Any) -> None:
    """As adapters refuse a field that an answer has twice."""
    ends = _ends(calls)
    if getattr(dspy.settings.adapter, "strict", True) and any(args != ends[0] for args in ends):
        raise OutputInvalid(f"{_UNFIT}it has {SUBMIT} twice, with different values")


# The run of an agent in this context.
_current: ContextVar[Any] = ContextVar("agent", default=None)


def check_answer(fields: dict[str, Any]) -> None:
    """For `attempts`: raises `OutputInvalid` if an agent cannot end with this answer, and has to."""
    run = _current.get()
    if run is not None:
        run.check(fields.get("tool_calls"))


class Step(dspy.Predict):  # type: ignore[misc]
    """A predictor of an agent."""

    @property
    def submits(self) -> bool:
        """Whether the outputs are arguments of a tool call in its answers."""
        return _HISTORY in self.signature.input_fields

    def forward(self, **given: Any) -> Any:
        return self._checked(super().forward(**self._prepared(given)))

    async def aforward(self, **given: Any) -> Any:
        return self._checked(await super().aforward(**self._prepared(given)))

    def _prepared(self, given: dict[str, Any]) -> dict[str, Any]:
        run = _current.get()
        if run is None:
            return given
        own = given.get("config", {})
        run.forced = "tool_choice" in own
        if run.config:
            given["config"] = {**run.config, **own}
        if self.submits:
            conversations.mark_failures(given[_HISTORY])
        elif _HISTORY in given:
            given["signature"] = _with_history(self.signature, self.signature.instructions)
        return given

    def _checked(self, prediction: Any) -> Any:
        run = _current.get()
        if run is not None and self.submits:
            _refuse_two_ends(prediction.tool_calls)
        return prediction


@functools.lru_cache(256)
def _with_history(signature: Any, _instructions: str) -> Any:
    return signature.prepend(_HISTORY, dspy.InputField(), dspy.History)


class _Agent:
    """What is added to DSPy's class. `conversation`: the name of the input and of the result that is it."""

    by_history = False

    def forward(self, **values: Any) -> Any:
        with self._running(values) as run:
            return run.result(super().forward(**run.values))  # type: ignore[misc]

    async def aforward(self, **values: Any) -> Any:
        with self._running(values) as run:
            return run.result(await super().aforward(**run.values))  # type: ignore[misc]

    @contextmanager
    def _running(self, values: dict[str, Any]) -> Iterator[_Run]:
        run = _Run(self, values)
        token = _current.set(run)
        try:
            yield run
        except ValueError as error:
            raise run.translated(error) from error
        finally:
            _current.reset(token)
            run.clean_trace()


@functools.cache
def _agent_of(kind: Any) -> Any:
    """A subclass, whose source optimizers read as that of `kind`."""
    names = {name: getattr(kind, name) for name in ("__qualname__", "__module__", "__doc__")}
    return type(kind.__name__, (_Agent, kind), {**names, "by_history": by_history(kind)})


def refuse_labeled_demos(module: dspy.Module) -> None:
    """Raises `InvalidArgs` if demos with the program's inputs and outputs would not reach a prompt."""
    if any(getattr(predictor, "submits", False) for predictor in module.predictors()):
        text = "labeled_few_shot gives demos with the outputs, which no prompt of a ReAct by history has"
        raise InvalidArgs(f"optimize.optimizer: {text}; bootstrap_few_shot makes demos of its steps")
