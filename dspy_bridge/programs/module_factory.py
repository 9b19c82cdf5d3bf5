"""Creates the DSPy module of a program type, and the runner that calls it. Imports DSPy."""

from __future__ import annotations

import importlib
import inspect
from typing import Annotated, Any, Literal

import dspy
import pydantic

from dspy_bridge.errors import InvalidArgs, NotAllowed
from dspy_bridge.lm.dspy_setup import LMs
from dspy_bridge.programs import agents, conversations, remote_tools, scores
from dspy_bridge.programs.runners import CodeRunner, Runner, Sandboxes, ScoredRunner, ToolCallRunner
from dspy_bridge.signatures import media, validation
from dspy_bridge.signatures.validation import Contract

# Program type to DSPy's class.
TYPES = {
    "predict": "Predict",
    "chain_of_thought": "ChainOfThought",
    "react": "ReAct",
    "best_of_n": "BestOfN",
    "refine": "Refine",
    "multi_chain_comparison": "MultiChainComparison",
    "rlm": "RLM",
}
# Each run is at least one LM call; more than this is a mistake.
_COUNT = Annotated[int, pydantic.Field(ge=1, le=1000)]
_NUMBER = Annotated[float, pydantic.Field(allow_inf_nan=False)]
_SCORED = {
    "n": _COUNT,
    "threshold": _NUMBER,
    "fail_count": _COUNT,
    "reward": dict[str, Any],
    "module": Literal["predict", "chain_of_thought", "react"],
}
# The settings of the constructors of DSPy's modules that may be chosen; N and M in lower case.
OPTIONS: dict[str, dict[str, Any]] = {
    "predict": {},
    "chain_of_thought": {},
    "react": {"max_iters": _COUNT},
    "best_of_n": _SCORED,
    "refine": _SCORED,
    # Each of the M adds a field, and DSPy's time is quadratic: 0.1 s for 100, 18 s for 1000, while other creates wait.
    "multi_chain_comparison": {"m": Annotated[int, pydantic.Field(ge=1, le=100)], "temperature": _NUMBER},
    "rlm": {"max_iters": _COUNT, "max_llm_calls": _COUNT, "max_output_chars": pydantic.PositiveInt, "sub_lm": Any},
}
# Their results have the conversation, if they are given one.
CONVERSE = frozenset(("predict", "chain_of_thought", "react", "best_of_n", "refine"))
_TAKE_TOOLS = frozenset(("predict", "chain_of_thought", "react", "rlm"))
# Names that DSPy's modules need for fields of their own, and parameters of their functions.
_OWN_FIELDS = {
    "chain_of_thought": {"reasoning"},
    "react": {
        *("trajectory", "next_thought", "next_tool_name", "next_tool_args", "tool_calls"),
        *("max_iters", "reasoning", "termination_reason"),
    },
    "refine": {"hint_"},
    "multi_chain_comparison": {"rationale", *(f"reasoning_attempt_{number}" for number in range(1, 101))},
    "rlm": {"trajectory", "final_reasoning", "variables_info", "repl_history", "iteration", "interpreter_factory"},
}
_OWN_ARGUMENTS = {
    ("react", "inputs"): {"module", "tools"},
    ("react", "outputs"): {"self", "history"},
    ("rlm", "outputs"): {"self"},
}


def extra_inputs(definition: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the program's type in addition to the signature's, which may declare them too, with these types."""
    if _is_agent(definition):
        return agents.extra_inputs()
    return {"completions": Any} if definition.get("program_type") == "multi_chain_comparison" else {}


def _is_agent(definition: dict[str, Any]) -> bool:
    program_type, options = definition.get("program_type"), definition.get("options")
    inner = options.get("module") if isinstance(options, dict) else None
    return program_type == "react" or (program_type in ("best_of_n", "refine") and inner == "react")


def build(definition: dict[str, Any], contract: Contract, lms: LMs) -> Runner:
    """The runner of a `create_program`. Raises `InvalidArgs`, naming the field, and `NotAllowed`."""
    signature = contract.signature
    program_type = definition.get("program_type", "predict")
    if program_type == "flex":
        why = "its state is source code, which optimizers write; this peer loads none"
        raise NotAllowed(f"program_type: flex is not offered: {why}; rlm also runs code that an LM wrote")
    if not isinstance(program_type, str) or (program_type not in TYPES and ":" not in program_type):
        raise InvalidArgs(f"program_type: expected one of {', '.join(TYPES)}, or package.module:Class")
    given = definition.get("options")
    if not isinstance(given, dict | None):
        raise InvalidArgs("options: expected an object of the module's settings")
    if program_type == "rlm" and not lms.settings.allow_code:
        raise NotAllowed("program_type: rlm runs code that an LM wrote; DSPY_BRIDGE_ALLOW_CODE=1 allows it")
    _check_fields(program_type, contract)
    taken = {"finish", *signature.input_fields, *signature.output_fields, *_OWN_FIELDS.get(program_type, ())}
    if _is_agent(definition):
        taken.add("submit")
    tools = remote_tools.read(definition.get("tools"), taken)
    if program_type not in TYPES:
        return Runner(_user_module(program_type, signature, given or {}, tools, lms), takes_config=False)
    # DSPy's own spelling is N and M.
    lower = {name.lower() if len(name) == 1 else name: value for name, value in (given or {}).items()}
    chosen = validation.read_options(lower, OPTIONS[program_type], "options")
    if "module" in chosen:
        _check_fields(chosen["module"], contract)
    return _make(program_type, contract, chosen, tools, lms)


def _make(
    program_type: str, contract: Contract, chosen: dict[str, Any], tools: list[remote_tools.RemoteTool], lms: LMs
) -> Runner:
    signature = contract.signature
    kind = getattr(dspy, TYPES[program_type])
    if program_type in ("best_of_n", "refine"):
        if "reward" not in chosen:
            raise InvalidArgs("options.reward: missing")
        reward = scores.Reward(chosen.pop("reward"), signature)
        # The reward is not a tool for the LM, even if it is declared as one.
        tools = [tool for tool in tools if tool.name != reward.tool]
        inner, count = chosen.pop("module", "predict"), chosen.pop("n", 3)
        # DSPy has no defaults for these.
        chosen = {"threshold": 1.0, **chosen, "N": count}
        if tools and inner != "react":
            raise InvalidArgs(f"tools: {program_type} of {inner} takes none but its reward")
        return ScoredRunner(kind, _make(inner, contract, {}, tools, lms).module, reward, chosen)
    if tools and program_type not in _TAKE_TOOLS:
        raise InvalidArgs(f"tools: {program_type} takes none")
    if program_type == "multi_chain_comparison":
        count = chosen.pop("m", 3)
        contract.inputs["completions"] = _completions(count, list(signature.output_fields)[-1])
        return Runner(kind(signature, M=count, **chosen))
    if program_type == "react":
        if not tools:
            raise InvalidArgs("tools: react needs at least one; chain_of_thought is the program type without tools")
        return Runner(agents.make(agents.chosen(lms.settings.react), contract, tools, chosen, lms.settings.files_dir))
    if program_type == "rlm":
        if "sub_lm" in chosen:
            chosen["sub_lm"] = lms.lm(chosen["sub_lm"], "options.sub_lm")
        for tool in tools:
            if odd := [arg for arg in tool.args if not remote_tools.is_parameter(arg)]:
                raise InvalidArgs(f"tools: {tool.name}: {odd[0]!r} is no name of a Python argument, which rlm needs")
        try:
            module = kind(signature, tools=list(tools), interpreter_factory=Sandboxes(), **chosen)
        except (TypeError, ValueError) as error:
            # A tool or a field must not shadow a function of the sandbox.
            raise InvalidArgs(f"signature, tools: {error}") from None
        return CodeRunner(module, takes_config=False)
    if tools and contract.conversation is not None:
        contract.inputs[contract.conversation] = conversations.validator(contract, conversations.to_history)
    return ToolCallRunner(kind, signature, tools) if tools else Runner(kind(signature, **chosen), one_answer=None)


def _completions(count: int, answer: str) -> pydantic.TypeAdapter[Any]:
    """The validator of what a MultiChainComparison compares."""

    def check(given: Any) -> Any:
        fit = isinstance(given, list) and len(given) == count
        for one in given if fit else ():
            fit = fit and isinstance(one, dict) and answer in one
            fit = fit and isinstance(one.get("rationale", one.get("reasoning")), str)
        if not fit:
            raise media.unfit(f"expected a list of {count} objects with reasoning and {answer}")
        return given

    return pydantic.TypeAdapter(Annotated[Any, pydantic.AfterValidator(check)])


def _check_fields(program_type: str, contract: Contract) -> None:
    inputs = [*contract.signature.input_fields, contract.conversation]
    for where, fields in (("inputs", inputs), ("outputs", contract.signature.output_fields)):
        own = {*_OWN_FIELDS.get(program_type, ()), *_OWN_ARGUMENTS.get((program_type, where), ())}
        if where == "outputs":
            own = (own | {contract.conversation}) - {"reasoning"}  # this one is the same field
        for name in fields:
            if name in own:
                text = f"{program_type} has a field {name!r} of its own; choose another name"
                raise InvalidArgs(f"signature.{where}: {text}")


def _user_module(
    path: str, signature: type[dspy.Signature], given: dict[str, Any], tools: list[remote_tools.RemoteTool], lms: LMs
) -> dspy.Module:
    """A user's module, `package.module:Class`: its constructor gets what it has parameters for."""
    allowed = lms.settings.allow_modules
    if not any(path == prefix or path.startswith((f"{prefix}.", f"{prefix}:")) for prefix in allowed):
        raise NotAllowed(f"program_type: {path} is not covered by DSPY_BRIDGE_ALLOW_MODULES")
    module, _, name = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidArgs(f"program_type: {path} cannot be loaded: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, dspy.Module)):
        raise InvalidArgs(f"program_type: {path} is not a dspy.Module")
    constructor = inspect.signature(inspect.getattr_static(kind, "__init__"))
    ours = {"signature": signature, "tools": list(tools)}
    arguments = {**given, **{name: value for name, value in ours.items() if name in constructor.parameters}}
    if tools and "tools" not in arguments:
        raise InvalidArgs(f"tools: the constructor of {path} takes none")
    try:
        constructor.bind(None, **arguments)
    except TypeError as error:
        raise InvalidArgs(f"options: the constructor of {path}: {error}") from None
    return kind(**arguments)
