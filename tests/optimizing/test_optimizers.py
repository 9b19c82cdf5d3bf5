"""optimizing.optimizers: each of the seven runs as DSPy's own call does, with the settings that were given."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from lm_server import completion
from openai.types.chat import ChatCompletion
from optimizing_lm import GOOD, QUESTIONS, answer, expected
from peer import PATIENCE

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.optimizing import optimizers
from dspy_bridge.optimizing.arguments import Given

pytestmark = [
    # optuna's word on MIPROv2's sampler.
    pytest.mark.filterwarnings("ignore:Argument ``multivariate`` is an experimental feature"),
    # DSPy 3.3 knows no other way to write an LM.
    pytest.mark.filterwarnings("ignore:Implementing custom LMs through BaseLM:DeprecationWarning"),
]


class ScriptedLM(dspy.BaseLM):
    """`optimizing_lm` in this process. `asked`: the requests to it and its copies, with its name."""

    def __init__(self, name: str, asked: list[Any]) -> None:
        super().__init__(name, cache=False)
        self.asked, self._lock = asked, threading.Lock()

    def forward(self, prompt: str | None = None, messages: Any = None, **kwargs: Any) -> ChatCompletion:
        messages = messages or [{"role": "user", "content": prompt}]
        with self._lock:
            self.asked.append(repr((self.model, messages, sorted(kwargs.items(), key=repr))))
        made = completion(self.model, answer(messages, kwargs.get("temperature")))
        made["choices"] = [{**made["choices"][0], "index": index} for index in range(kwargs.get("n") or 1)]
        return ChatCompletion.model_validate(made)

    def __deepcopy__(self, _memo: Any) -> ScriptedLM:
        return self

    def copy(self, **kwargs: Any) -> ScriptedLM:
        made = ScriptedLM(self.model, self.asked)
        made._lock, made.kwargs = self._lock, {**self.kwargs, **kwargs}
        return made


class Metrics:
    def score(self, example: Any, prediction: Any, trace: Any = None) -> bool:
        return bool(example.answer == prediction.answer)

    def simba(self, example: Any, prediction: Any) -> float:
        return float(example.answer == prediction.answer)

    def gepa(self, gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        return dspy.Prediction(score=float(gold.answer == pred.answer), feedback=f"expected {gold.answer}")


METRICS = Metrics()
EXAMPLES = [dspy.Example(question=asked, answer=expected(asked)).with_inputs("question") for asked in QUESTIONS]
TRAINSET, VALSET = EXAMPLES[:8], EXAMPLES[8:]

Run = tuple[dict[str, Any], list[str], Any]


def run(compile: Callable[[Callable[[str], Any]], Any], student: Any = None) -> Run:
    """The state that comes out, the requests to all LMs, and the module."""
    asked: list[str] = []

    def lm(name: str) -> ScriptedLM:
        return ScriptedLM(name, asked)

    logging.getLogger("dspy").setLevel(logging.CRITICAL)
    with dspy.context(lm=lm("program"), adapter=dspy.ChatAdapter()):
        module = compile(lm)
    return module.dump_state(), sorted(asked), module


def ours(given: Given, student: Any = None, valset: Any = None, trainset: Any = TRAINSET) -> Run:
    def compile(lm: Any) -> Any:
        lms = {role: lm(role) for role in given.lms}
        return optimizers.compile(given, student or program(), trainset, valset, METRICS, lms)

    optimizers.check(given, len(trainset))
    return run(compile)


def program() -> Any:
    return dspy.Predict("question -> answer")


def labeled(_lm: Any) -> Any:
    return dspy.LabeledFewShot(k=3).compile(program(), trainset=TRAINSET, sample=False)


def bootstrap(lm: Any) -> Any:
    made = dspy.BootstrapFewShot(
        metric=METRICS.score,
        metric_threshold=0.5,
        teacher_settings={"lm": lm("teacher_lm")},
        max_bootstrapped_demos=2,
        max_labeled_demos=3,
        max_rounds=2,
    )
    return made.compile(program(), trainset=TRAINSET)


def random_search(lm: Any) -> Any:
    made = dspy.BootstrapFewShotWithRandomSearch(
        metric=METRICS.score,
        teacher_settings={"lm": lm("teacher_lm")},
        max_bootstrapped_demos=2,
        max_labeled_demos=2,
        num_candidate_programs=5,
        num_threads=2,
        stop_at_score=75.0,
    )
    return made.compile(program(), trainset=TRAINSET, valset=VALSET, labeled_sample=False)


def copro(lm: Any) -> Any:
    made = dspy.COPRO(prompt_model=lm("prompt_lm"), metric=METRICS.score, breadth=3, depth=2, init_temperature=0.7)
    return made.compile(program(), trainset=TRAINSET, eval_kwargs={"num_threads": 2})


def mipro(lm: Any) -> Any:
    made = dspy.MIPROv2(
        metric=METRICS.score,
        prompt_model=lm("prompt_lm"),
        teacher_settings={"lm": lm("teacher_lm")},
        max_bootstrapped_demos=2,
        max_labeled_demos=1,
        auto=None,
        num_candidates=5,
        num_threads=2,
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


def simba(lm: Any) -> Any:
    made = dspy.SIMBA(
        metric=METRICS.simba,
        bsize=4,
        num_candidates=3,
        max_steps=2,
        max_demos=2,
        prompt_model=lm("prompt_lm"),
        teacher_settings={"lm": lm("teacher_lm")},
        num_threads=2,
        temperature_for_sampling=0.3,
    )
    return made.compile(program(), trainset=TRAINSET, seed=5)


def gepa(lm: Any) -> Any:
    made = dspy.GEPA(
        metric=METRICS.gepa,
        max_metric_calls=30,
        reflection_minibatch_size=2,
        candidate_selection_strategy="current_best",
        reflection_lm=lm("reflection_lm"),
        use_merge=False,
        num_threads=2,
        seed=7,
    )
    return made.compile(program(), trainset=TRAINSET, valset=VALSET)


CALLS = {
    "labeled_few_shot": (labeled, Given("labeled_few_shot", {"k": 3, "sample": False})),
    "bootstrap_few_shot": (
        bootstrap,
        Given(
            "bootstrap_few_shot",
            {"max_bootstrapped_demos": 2, "max_labeled_demos": 3, "max_rounds": 2, "metric_threshold": 0.5},
            lms={"teacher_lm": "x"},
        ),
    ),
    "random_search": (
        random_search,
        Given(
            "random_search",
            {
                "max_bootstrapped_demos": 2,
                "max_labeled_demos": 2,
                "num_candidate_programs": 5,
                "stop_at_score": 0.75,
                "labeled_sample": False,
            },
            valset=([], None),
            lms={"teacher_lm": "x"},
            num_threads=2,
        ),
    ),
    "copro": (
        copro,
        Given("copro", {"breadth": 3, "depth": 2, "init_temperature": 0.7}, lms={"prompt_lm": "x"}, num_threads=2),
    ),
    "mipro_v2": (
        mipro,
        Given(
            "mipro_v2",
            {
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
            valset=(list(VALSET), None),
            lms={"prompt_lm": "x", "teacher_lm": "x"},
            seed=0,
            num_threads=2,
        ),
    ),
    "simba": (
        simba,
        Given(
            "simba",
            {"bsize": 4, "num_candidates": 3, "max_steps": 2, "max_demos": 2, "temperature_for_sampling": 0.3},
            lms={"prompt_lm": "x", "teacher_lm": "x"},
            seed=5,
            num_threads=2,
        ),
    ),
    "gepa": (
        gepa,
        Given(
            "gepa",
            {
                "max_metric_calls": 30,
                "reflection_minibatch_size": 2,
                "candidate_selection_strategy": "current_best",
                "use_merge": False,
            },
            valset=(list(VALSET), None),
            lms={"reflection_lm": "x"},
            seed=7,
            num_threads=2,
        ),
    ),
}


@pytest.mark.parametrize("optimizer", CALLS)
def test_it_gives_the_state_of_dspys_own_call_with_the_same_requests(optimizer: str) -> None:
    plain, given = CALLS[optimizer]
    state, asked, _ = run(plain)
    got, got_asked, _ = ours(given, valset=VALSET if given.valset is not None else None)
    assert got == state
    assert got_asked == asked
    # Else it would be shown of nothing.
    assert state != program().dump_state()
    assert {lm for lm in given.lms if f"'{lm}'" in "".join(asked)} == set(given.lms)


def test_each_optimizer_has_its_options_and_is_run_above() -> None:
    from dspy_bridge.optimizing import arguments, options

    assert tuple(options.OPTIONS) == tuple(CALLS) == tuple(optimizers._OPTIMIZERS) == arguments.OPTIMIZERS


def test_a_seed_of_0_is_a_seed() -> None:
    """DSPy's own `compile(seed=0)` takes the default of the constructor, 9."""
    _, given = CALLS["mipro_v2"]
    requests = {
        seed: ours(Given("mipro_v2", given.options, valset=given.valset, lms=given.lms, seed=seed), valset=VALSET)[1]
        for seed in (0, 9)
    }
    default = ours(Given("mipro_v2", given.options, valset=given.valset, lms=given.lms), valset=VALSET)[1]
    assert requests[0] != requests[9] == default


class Seen(dspy.Module):
    """A program that notes which thread of a pool runs it: 0, 1 and so on; -1 for any other thread.

    A thread of a pool waits until `most` have been seen.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.inner = program()
        self.workers: set[int] = set()
        self.most, self.all_seen = most, threading.Event()

    def forward(self, question: str) -> Any:
        name = threading.current_thread().name
        if "ThreadPool" in name:
            self.workers.add(int(name.rpartition("_")[2]))
            if len(self.workers - {-1}) == self.most:
                self.all_seen.set()
            self.all_seen.wait(PATIENCE)
        else:
            self.workers.add(-1)
        return self.inner(question=question)

    def deepcopy(self) -> Seen:
        return self._with(self.inner.deepcopy())

    def reset_copy(self) -> Seen:
        return self._with(self.inner.reset_copy())

    def _with(self, inner: Any) -> Seen:
        made = Seen(self.most)
        made.inner, made.workers, made.all_seen = inner, self.workers, self.all_seen
        return made


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("optimizer", ["random_search", "copro", "mipro_v2", "simba", "gepa"])
def test_num_threads_threads_run_the_program(optimizer: str, num_threads: int) -> None:
    """By default DSPy has 8. One is at times a pool of its own, at times the thread that compiles."""
    given = CALLS[optimizer][1]
    options, valset = given.options, VALSET if given.valset is not None else None
    one = Given(optimizer, options, valset=given.valset, lms=given.lms, seed=given.seed, num_threads=num_threads)
    student = Seen(num_threads)
    ours(one, student, valset=valset)
    if num_threads == 1:
        assert student.workers <= {-1, 0}
    else:
        assert student.workers - {-1} == {0, 1}


def test_no_statistics_are_kept() -> None:
    """They hold every candidate and its trials."""
    _, given = CALLS["mipro_v2"]
    module = ours(given, valset=VALSET)[2]
    assert not hasattr(module, "trial_logs") and not hasattr(module, "candidate_programs")
    _, given = CALLS["gepa"]
    assert not hasattr(ours(given, valset=VALSET)[2], "detailed_results")


def test_demos_that_no_state_could_have_are_refused_before_an_lm_is_asked() -> None:
    """A ReAct has two predictors, and a state has 500 demos at most."""
    react = dspy.ReAct("question -> answer", tools=[])
    for given, option in [
        (Given("labeled_few_shot", {"k": 251}), "k"),
        (Given("bootstrap_few_shot", {"max_bootstrapped_demos": 251}), "max_bootstrapped_demos"),
        (Given("random_search", {"max_labeled_demos": 251}), "max_labeled_demos"),
        (Given("mipro_v2", {"max_labeled_demos": 251}), "max_labeled_demos"),
        (Given("simba", {"bsize": 1, "max_demos": 251}), "max_demos"),
    ]:
        text = f"optimize.options.{option}: expected at most 250: the program has 2 predictors, and a state has at most"
        with pytest.raises(InvalidArgs, match=text):
            ours(given, react)
    assert ours(Given("labeled_few_shot", {"k": 250}), react)[1] == []


def test_what_dspys_constructor_refuses_is_an_option_and_what_compile_raises_is_not() -> None:
    class Fails(dspy.Module):
        def deepcopy(self) -> Any:
            raise ValueError("of the run")

    class OneArgument(Metrics):
        gepa = Metrics.simba

    given = CALLS["gepa"][1]
    lms = {"reflection_lm": ScriptedLM("x", [])}
    with pytest.raises(InvalidArgs, match=r"optimize\.options: DSPy refuses them: GEPA metric must accept five"):
        optimizers.compile(given, program(), TRAINSET, None, OneArgument(), lms)
    with pytest.raises(ValueError, match="of the run"):
        optimizers.compile(Given("copro"), Fails(), TRAINSET, None, METRICS, {})


def test_a_better_instruction_is_found() -> None:
    for optimizer in ("copro", "mipro_v2", "gepa"):
        state = ours(CALLS[optimizer][1], valset=None if optimizer == "copro" else VALSET)[0]
        assert state["signature"]["instructions"] == GOOD


@pytest.mark.parametrize(
    ("optimizer", "options", "valset_size", "size"),
    [
        ("labeled_few_shot", {}, None, None),
        ("bootstrap_few_shot", {}, None, None),
        ("random_search", {}, None, 20),
        ("random_search", {}, 5, 5),
        ("copro", {}, None, 20),
        ("mipro_v2", {}, 5, None),
        ("mipro_v2", {}, None, None),
        ("simba", {}, None, 20),
        ("gepa", {}, None, 20),
        ("gepa", {}, 5, 5),
    ],
)
def test_the_size_of_a_whole_evaluation(
    optimizer: str, options: dict[str, Any], valset_size: int | None, size: int | None
) -> None:
    assert optimizers.scored_on(Given(optimizer, options), 20, valset_size) == size
