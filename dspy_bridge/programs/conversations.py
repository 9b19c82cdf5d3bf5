"""Conversations, such as `history`: as clients have them, and as DSPy's two kinds of ReAct take them. Imports DSPy.

For clients it is a list of turns, one for each answer of the LM: the inputs, where a question begins; of an agent
`next_thought`; `tool_calls`, each with its `result` or `error`; and the outputs, where it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import dspy
import pydantic
from typing_extensions import NotRequired, TypedDict

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.lm.adapters import field_markers, guarded_adapters
from dspy_bridge.programs.remote_tools import Failure, observed
from dspy_bridge.signatures import dspy_types, validation
from dspy_bridge.signatures.validation import Contract

Turn = dict[str, Any]
# The tools by which an agent ends: that of DSPy's ReAct by history, and that of the one by trajectory.
SUBMIT, FINISH = "submit", "finish"


@pydantic.with_config(extra="forbid")
class _Call(TypedDict):
    name: str
    id: NotRequired[str]
    args: NotRequired[dict[str, Any]]
    result: NotRequired[Any]
    error: NotRequired[str]


class _Step(TypedDict):
    next_thought: NotRequired[str | None]
    tool_calls: NotRequired[list[_Call]]


_STEP = pydantic.TypeAdapter(_Step)


def validator(contract: Contract, made: Callable[[list[Turn]], Any] = list) -> pydantic.TypeAdapter[Any]:
    """The validator of a conversation. It raises `InvalidArgs`, too, which names the turn and the field."""
    return pydantic.TypeAdapter(Annotated[Any, pydantic.AfterValidator(lambda given: made(_read(contract, given)))])


def _read(contract: Contract, value: Any) -> list[Turn]:
    if isinstance(value, dict) and set(value) == {"messages"}:
        value = value["messages"]
    if not isinstance(value, list | None):
        raise InvalidArgs("expected a list of turns, as a result has it")
    turns = [_turn(contract, turn, f"turn[{index}]") for index, turn in enumerate(value or ())]
    return field_markers.changed(turns, field_markers.without_types)  # type: ignore[no-any-return]


def _turn(contract: Contract, turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict) or not turn:
        raise InvalidArgs(f"{where}: expected an object with fields of the signature, next_thought or tool_calls")
    step = {name: turn[name] for name in ("next_thought", "tool_calls") if name in turn}
    fields = {name: value for name, value in turn.items() if name not in step}
    try:
        _STEP.validate_python(step, strict=True)
    except pydantic.ValidationError as error:
        raise validation.describe(where, error) from None
    for index, call in enumerate(step.get("tool_calls", ())):
        if ("result" in call) == ("error" in call):
            raise InvalidArgs(f"{where}.tool_calls[{index}]: expected one of result and error")
    return {**turn, **(contract.turn(fields, where) if fields else {})}


def gone_on(given: Any, asked: Turn, outputs: dict[str, Any], of_agent: list[Turn] | None) -> list[Turn]:
    """The conversation that the next run goes on with. `of_agent`: as that run of an agent has made it.

    `given`, and `asked`, the inputs of this run's turn, stay as the client wrote them: a path does not become content.
    """
    given = given["messages"] if isinstance(given, dict) else given or []
    turns = [dspy_types.for_replies(turn) for turn in ([outputs] if of_agent is None else of_agent[len(given) :])]
    # What was not answered is absent, as its type may not take null: for DSPy it is the same.
    turns = [{name: value for name, value in turn.items() if value is not None} for turn in turns]
    turns[0] = {**asked, **turns[0], **asked}
    return [*given, *turns]


def to_history(turns: list[Turn], outputs: Iterable[str] | None = None) -> dspy.History:
    """Each turn as it was. `outputs`: those of a ReAct by history, for which a turn that has them ends by `submit`."""
    messages = []
    for number, turn in enumerate(turns):
        message = {name: value for name, value in turn.items() if value is not None}
        if "next_thought" in message:
            message["next_thought"] = dspy.Reasoning(content=message["next_thought"])
        calls = message.pop("tool_calls", [])
        done = {name: turn[name] for name in outputs or () if name in turn}
        if done and all(call["name"] != SUBMIT for call in calls):
            submit = {"name": SUBMIT, "args": done, "result": done}
            calls = [*(call for call in calls if call["name"] != FINISH), submit]
        if calls:
            message["tool_calls"] = _calls(calls, number)
        elif outputs is None and "tool_calls" in turn:
            message["tool_calls"] = dspy.ToolCalls(tool_calls=[])
        messages.append(message)
    return dspy.History(messages=messages)


def _calls(calls: list[Turn], number: int) -> dspy.ToolCalls:
    """Calls with their results, in DSPy's form; `number`: of the turn, for the ids of those without one."""
    made, results = [], []
    for index, call in enumerate(calls):
        id = call.get("id", f"call_{number}_{index}")
        made.append(dspy.ToolCalls.ToolCall(id=id, name=call["name"], args=call.get("args", {})))
        value = call["error"] if "error" in call else observed(call["result"])
        results.append({"call_id": id, "name": call["name"], "value": value, "is_error": "error" in call})
    return dspy.ToolCalls(tool_calls=made, tool_call_results=dspy.ToolCallResults(tool_call_results=results))


def mark_failures(history: dspy.History) -> None:
    """The last results of our tools: an error is a text of its own class until here."""
    for message in history.messages[-1:]:
        for _call, result in _pairs(message.get("tool_calls")):
            result.is_error = result.is_error or isinstance(result.value, Failure)


def _pairs(calls: Any) -> list[tuple[Any, Any]]:
    """Calls in DSPy's form, with their results."""
    results = getattr(calls, "tool_call_results", None)
    return [] if results is None else list(zip(calls.tool_calls, results.tool_call_results, strict=True))


def of_history(messages: list[dict[str, Any]]) -> list[Turn]:
    """The turns of a ReAct by history, from DSPy's form."""
    turns = []
    for message in messages:
        turn: Turn = {}
        for name, value in message.items():
            if isinstance(value, dspy.ToolCalls):
                turn[name] = [
                    _call(call.id, call.name, call.args, result.value, result.is_error)
                    for call, result in _pairs(value)
                ]
            else:
                turn[name] = str(value) if isinstance(value, dspy.Reasoning) else value
        turns.append(turn)
    return turns


def _call(id: str, name: str, args: Any, value: Any, failed: bool = False) -> Turn:
    failed = failed or isinstance(value, Failure)
    return {"id": id, "name": name, "args": args, ("error" if failed else "result"): value}


def of_trajectory(trajectory: dict[str, Any], number: int) -> list[Turn]:
    """The turns of a ReAct by trajectory; `number`: that of the first one. DSPy may have dropped the oldest steps."""
    steps = [key.rpartition("_")[2] for key in trajectory if key.startswith("tool_name_")]
    turns = []
    for index, step in enumerate(steps, number):
        name, args = trajectory[f"tool_name_{step}"], trajectory[f"tool_args_{step}"]
        calls = [_call(f"call_{index}_0", name, args, trajectory[f"observation_{step}"])]
        turns.append({"next_thought": trajectory[f"thought_{step}"], "tool_calls": calls})
    return turns or [{"tool_calls": []}]


def to_trajectory(turns: list[Turn]) -> dict[str, Any]:
    """The steps of a ReAct by trajectory, one for each call of a tool."""
    trajectory: dict[str, Any] = {}
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            number = len(trajectory) // 4
            trajectory[f"thought_{number}"] = turn.get("next_thought")
            trajectory[f"tool_name_{number}"] = call["name"]
            trajectory[f"tool_args_{number}"] = call.get("args", {})
            trajectory[f"observation_{number}"] = call.get("error", call.get("result"))
    return trajectory


def for_trajectory(turns: list[Turn], signature: type[dspy.Signature]) -> dspy.History:
    """For a ReAct by trajectory: one message for each question, for the predictors of its steps and of its outputs.

    The predictor of the steps has none of the outputs, so the trajectory tells it what was answered.
    """
    messages: list[dict[str, Any]] = []
    begun: list[Turn] = []
    for turn in turns:
        begun.append(turn)
        if not turn.keys().isdisjoint(signature.output_fields):
            messages.append(_question(begun, signature))
            begun = []
    if begun:
        messages.append(_question(begun, signature))
    return dspy.History(messages=messages)


def _question(turns: list[Turn], signature: type[dspy.Signature]) -> dict[str, Any]:
    fields = {name: turn[name] for turn in turns for name in signature.fields if name in turn}
    outputs = {name: value for name, value in fields.items() if name in signature.output_fields}
    steps = [
        {**turn, "tool_calls": [call for call in turn.get("tool_calls", ()) if call["name"] not in (SUBMIT, FINISH)]}
        for turn in turns
    ]
    thought = turns[-1].get("next_thought") or ""
    told = {
        "trajectory": guarded_adapters.format_trajectory(None, {**to_trajectory(steps), **outputs}),
        "next_thought": thought,
        "next_tool_name": FINISH,
        "next_tool_args": {},
        "reasoning": thought,
    }
    return {**told, **fields}
