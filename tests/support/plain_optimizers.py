"""DSPy's seven optimizers as plain DSPy runs them, and the argument `optimize` that asks for the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import dspy
from optimizing_lm import QUESTIONS, expected

# An LM by its name: that of a role.
LMs = Callable[[str], Any]


class Metrics:
    """Exact match, as the optimizers call it."""

    def score(self, example: Any, prediction: Any, trace: Any = None) -> float:
        return float(example.answer == prediction.answer)

    def simba(self, example: Any, prediction: Any) -> float:
        return self.score(example, prediction)

    def gepa(self, gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        score = self.score(gold, pred)
        return score if pred_name is None else dspy.Prediction(score=score, feedback=feedback(gold.answer))


def feedback(answer: str) -> str:
    return f"expected {answer}"


METRICS = Metrics()
EXAMPLES = [dspy.Example(question=asked, answer=expected(asked)).with_inputs("question") for asked in QUESTIONS]
TRAINSET, VALSET = EXAMPLES[:8], EXAMPLES[8:]
_BOOTSTRAP = {"max_bootstrapped_demos": 2, "max_labeled_demos": 2}


NOTHING: Mapping[str, Any] = MappingProxyType({})


class Case(NamedTuple):
    """An optimizer's class, the options of its constructor and of `compile`, and where DSPy takes what is ours."""

    cls: Any
    options: dict[str, Any]
    compile: Mapping[str, Any] = NOTHING
    metric: Any = METRICS.score
    # By role: the constructor's keyword.
    roles: Mapping[str, str] = NOTHING
    valset: bool = False
    seed: Mapping[str, int] = NOTHING
    # Of which call `num_threads` is an argument.
    threads: str | None = "constructor"


_PROMPT, _TEACHER = {"prompt_lm": "prompt_model"}, {"teacher_lm": "teacher_settings"}
CASES = {
    "labeled_few_shot": Case(dspy.LabeledFewShot, {"k": 3}, {"sample": False}, threads=None),
    "bootstrap_few_shot": Case(
        dspy.BootstrapFewShot,
        {"max_bootstrapped_demos": 2, "max_labeled_demos": 3, "max_rounds": 2, "metric_threshold": 0.5},
        roles=_TEACHER,
        threads=None,
    ),
    "random_search": Case(
        dspy.BootstrapFewShotWithRandomSearch,
        {**_BOOTSTRAP, "num_candidate_programs": 5, "stop_at_score": 75.0},
        {"labeled_sample": False},
        roles=_TEACHER,
        valset=True,
    ),
    "copro": Case(
        dspy.COPRO, {"breadth": 3, "depth": 2, "init_temperature": 0.7}, roles=_PROMPT, threads="eval_kwargs"
    ),
    "mipro_v2": Case(
        dspy.MIPROv2,
        {"auto": None, "num_candidates": 5, **_BOOTSTRAP, "max_labeled_demos": 1, "init_temperature": 0.7},
        {
            "num_trials": 4,
            "minibatch_size": 3,
            "minibatch_full_eval_steps": 3,
            "view_data_batch_size": 4,
            "tip_aware_proposer": False,
            "program_aware_proposer": False,
        },
        roles={**_PROMPT, **_TEACHER},
        valset=True,
        seed={"constructor": 0},
    ),
    "simba": Case(
        dspy.SIMBA,
        {"bsize": 4, "num_candidates": 3, "max_steps": 2, "max_demos": 2, "temperature_for_sampling": 0.3},
        metric=METRICS.simba,
        roles={**_PROMPT, **_TEACHER},
        seed={"compile": 5},
    ),
    "gepa": Case(
        dspy.GEPA,
        {
            "max_metric_calls": 30,
            "reflection_minibatch_size": 2,
            "use_merge": False,
            "candidate_selection_strategy": "current_best",
        },
        metric=METRICS.gepa,
        roles={"reflection_lm": "reflection_lm"},
        valset=True,
        seed={"constructor": 7},
    ),
}
ROLES = {name: list(case.roles) for name, case in CASES.items()}


def on_the_wire(examples: list[Any]) -> dict[str, Any]:
    """`inputs` and `expected`."""
    return {
        "inputs": [{"question": example.question} for example in examples],
        "expected": [{"answer": example.answer} for example in examples],
    }


def program() -> Any:
    return dspy.Predict("question -> answer")


def plain(optimizer: str, lm: LMs, threads: int) -> Any:
    """The program as plain DSPy optimizes it."""
    case = CASES[optimizer]
    made, compiled = dict(case.options), {**case.compile, "trainset": TRAINSET}
    if optimizer != "labeled_few_shot":
        made["metric"] = case.metric
    for role, keyword in case.roles.items():
        made[keyword] = {"lm": lm(role)} if keyword == "teacher_settings" else lm(role)
    if case.threads == "eval_kwargs":
        compiled["eval_kwargs"] = {"num_threads": threads}
    elif case.threads is not None:
        made["num_threads"] = threads
    if case.valset:
        compiled["valset"] = VALSET
    for call, seed in case.seed.items():
        (made if call == "constructor" else compiled)["seed"] = seed
    return case.cls(**made).compile(program(), **compiled)


def optimize(optimizer: str, lm: LMs = lambda role: role, num_threads: int = 2, **more: Any) -> dict[str, Any]:
    """The argument `optimize`. `lm(role)`: what is given of it."""
    case = CASES[optimizer]
    options = {**case.options, **case.compile}
    if "stop_at_score" in options:
        options["stop_at_score"] = 0.75  # a mean here, in percent in DSPy
    given: dict[str, Any] = {"optimizer": optimizer, "options": options, "num_threads": num_threads}
    if case.valset:
        given["valset"] = on_the_wire(VALSET)
    for seed in case.seed.values():
        given["seed"] = seed
    return {**given, **{role: lm(role) for role in case.roles}, **more}
