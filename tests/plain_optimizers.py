"""DSPy's seven optimizers as plain DSPy runs them, and the argument `optimize` that asks for the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def on_the_wire(examples: list[Any]) -> dict[str, Any]:
    """`inputs` and `expected`."""
    return {
        "inputs": [{"question": example.question} for example in examples],
        "expected": [{"answer": example.answer} for example in examples],
    }


def program() -> Any:
    return dspy.Predict("question -> answer")


def labeled_few_shot(_lm: LMs, threads: int) -> Any:
    return dspy.LabeledFewShot(k=3).compile(program(), trainset=TRAINSET, sample=False)


def bootstrap_few_shot(lm: LMs, threads: int) -> Any:
    made = dspy.BootstrapFewShot(
        metric=METRICS.score,
        metric_threshold=0.5,
        teacher_settings={"lm": lm("teacher_lm")},
        max_bootstrapped_demos=2,
        max_labeled_demos=3,
        max_rounds=2,
    )
    return made.compile(program(), trainset=TRAINSET)


def random_search(lm: LMs, threads: int) -> Any:
    made = dspy.BootstrapFewShotWithRandomSearch(
        metric=METRICS.score,
        teacher_settings={"lm": lm("teacher_lm")},
        max_bootstrapped_demos=2,
        max_labeled_demos=2,
        num_candidate_programs=5,
        num_threads=threads,
        stop_at_score=75.0,
    )
    return made.compile(program(), trainset=TRAINSET, valset=VALSET, labeled_sample=False)


def copro(lm: LMs, threads: int) -> Any:
    made = dspy.COPRO(prompt_model=lm("prompt_lm"), metric=METRICS.score, breadth=3, depth=2, init_temperature=0.7)
    return made.compile(program(), trainset=TRAINSET, eval_kwargs={"num_threads": threads})


def mipro_v2(lm: LMs, threads: int) -> Any:
    made = dspy.MIPROv2(
        metric=METRICS.score,
        prompt_model=lm("prompt_lm"),
        teacher_settings={"lm": lm("teacher_lm")},
        max_bootstrapped_demos=2,
        max_labeled_demos=1,
        auto=None,
        num_candidates=5,
        num_threads=threads,
        init_temperature=0.7,
        seed=0,
    )
    return made.compile(
        program(),
        trainset=TRAINSET,
        valset=VALSET,
        num_trials=4,
        minibatch_size=3,
        minibatch_full_eval_steps=3,
        view_data_batch_size=4,
        tip_aware_proposer=False,
        program_aware_proposer=False,
    )


def simba(lm: LMs, threads: int) -> Any:
    made = dspy.SIMBA(
        metric=METRICS.simba,
        bsize=4,
        num_candidates=3,
        max_steps=2,
        max_demos=2,
        prompt_model=lm("prompt_lm"),
        teacher_settings={"lm": lm("teacher_lm")},
        num_threads=threads,
        temperature_for_sampling=0.3,
    )
    return made.compile(program(), trainset=TRAINSET, seed=5)


def gepa(lm: LMs, threads: int) -> Any:
    made = dspy.GEPA(
        metric=METRICS.gepa,
        max_metric_calls=30,
        reflection_minibatch_size=2,
        candidate_selection_strategy="current_best",
        reflection_lm=lm("reflection_lm"),
        use_merge=False,
        num_threads=threads,
        seed=7,
    )
    return made.compile(program(), trainset=TRAINSET, valset=VALSET)


PLAIN: dict[str, Callable[[LMs, int], Any]] = {
    "labeled_few_shot": labeled_few_shot,
    "bootstrap_few_shot": bootstrap_few_shot,
    "random_search": random_search,
    "copro": copro,
    "mipro_v2": mipro_v2,
    "simba": simba,
    "gepa": gepa,
}
# The same settings as the argument `optimize`, without the LMs and the threads.
OPTIMIZE: dict[str, dict[str, Any]] = {
    "labeled_few_shot": {"options": {"k": 3, "sample": False}},
    "bootstrap_few_shot": {
        "options": {"max_bootstrapped_demos": 2, "max_labeled_demos": 3, "max_rounds": 2, "metric_threshold": 0.5}
    },
    "random_search": {
        "options": {
            "max_bootstrapped_demos": 2,
            "max_labeled_demos": 2,
            "num_candidate_programs": 5,
            "stop_at_score": 0.75,
            "labeled_sample": False,
        },
        "valset": on_the_wire(VALSET),
    },
    "copro": {"options": {"breadth": 3, "depth": 2, "init_temperature": 0.7}},
    "mipro_v2": {
        "options": {
            "auto": None,
            "num_candidates": 5,
            "num_trials": 4,
            "max_bootstrapped_demos": 2,
            "max_labeled_demos": 1,
            "init_temperature": 0.7,
            "minibatch_size": 3,
            "minibatch_full_eval_steps": 3,
            "view_data_batch_size": 4,
            "tip_aware_proposer": False,
            "program_aware_proposer": False,
        },
        "valset": on_the_wire(VALSET),
        "seed": 0,
    },
    "simba": {
        "options": {
            "bsize": 4,
            "num_candidates": 3,
            "max_steps": 2,
            "max_demos": 2,
            "temperature_for_sampling": 0.3,
        },
        "seed": 5,
    },
    "gepa": {
        "options": {
            "max_metric_calls": 30,
            "reflection_minibatch_size": 2,
            "candidate_selection_strategy": "current_best",
            "use_merge": False,
        },
        "valset": on_the_wire(VALSET),
        "seed": 7,
    },
}
ROLES: dict[str, list[str]] = {
    "labeled_few_shot": [],
    "bootstrap_few_shot": ["teacher_lm"],
    "random_search": ["teacher_lm"],
    "copro": ["prompt_lm"],
    "mipro_v2": ["prompt_lm", "teacher_lm"],
    "simba": ["prompt_lm", "teacher_lm"],
    "gepa": ["reflection_lm"],
}


def optimize(optimizer: str, lm: LMs = lambda role: role, num_threads: int = 2, **more: Any) -> dict[str, Any]:
    """The argument `optimize`. `lm(role)`: what is given of it."""
    lms = {role: lm(role) for role in ROLES[optimizer]}
    return {"optimizer": optimizer, **OPTIMIZE[optimizer], **lms, "num_threads": num_threads, **more}
