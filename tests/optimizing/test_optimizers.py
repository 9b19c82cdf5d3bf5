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
from optimizing_lm import answer
from peer import PATIENCE
from plain_optimizers import METRICS, PLAIN, TRAINSET, VALSET, optimize, program

from dspy_bridge.errors import InvalidArgs
from dspy_bridge.optimizing import arguments, optimizers
from dspy_bridge.optimizing.arguments import Given

pytestmark = [
    # optuna's word on MIPROv2's sampler.
    pytest.mark.filterwarnings("ignore:Argument ``multivariate`` is an experimental feature"),
    pytest.mark.filterwarnings("ignore:Implementing custom LMs through BaseLM:DeprecationWarning"),
]


class ScriptedLM(dspy.BaseLM):
    """`optimizing_lm` in this process. `asked`: the requests to it and its copies, with its name."""

    def __init__(self, name: str, asked: list[Any]) -> None:
        super().__init__(name, temperature=None, cache=False)
        self.asked, self._lock = asked, threading.Lock()

    def forward(self, prompt: str | None = None, messages: Any = None, **kwargs: Any) -> ChatCompletion:
        messages, kwargs = messages or [{"role": "user", "content": prompt}], {**self.kwargs, **kwargs}
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


Run = tuple[dict[str, Any], list[str], Any]


def run(compile: Callable[[Callable[[str], Any]], Any]) -> Run:
    """The state that comes out, the requests to all LMs, and the module."""
    asked: list[str] = []

    def lm(name: str) -> ScriptedLM:
        return ScriptedLM(name, asked)

    logging.getLogger("dspy").setLevel(logging.CRITICAL)
    with dspy.context(lm=lm("program"), adapter=dspy.ChatAdapter()):
        module = compile(lm)
    return module.dump_state(), sorted(asked), module


def given(optimizer: str, **more: Any) -> Given:
    return arguments.read(optimize(optimizer, **more))


def ours(given: Given, student: Any = None) -> Run:
    def compile(lm: Any) -> Any:
        lms = {role: lm(role) for role in given.lms}
        valset = None if given.valset is None else VALSET
        return optimizers.compile(given, student or program(), TRAINSET, valset, METRICS, lms)

    optimizers.check(given, len(TRAINSET))
    return run(compile)


def test_each_optimizer_has_its_options_and_is_run_above() -> None:
    assert tuple(optimizers.OPTIONS) == tuple(PLAIN) == tuple(optimizers._CLASSES) == arguments.OPTIMIZERS


def test_a_seed_of_0_is_a_seed() -> None:
    """DSPy's own `compile(seed=0)` takes the default of the constructor, 9."""
    requests = {seed: ours(given("mipro_v2", seed=seed))[1] for seed in (0, 9, None)}
    assert requests[0] != requests[9] == requests[None]


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
    student = Seen(num_threads)
    ours(given(optimizer, num_threads=num_threads), student)
    if num_threads == 1:
        assert student.workers <= {-1, 0}
    else:
        assert student.workers - {-1} == {0, 1}


def test_no_statistics_are_kept() -> None:
    """They hold every candidate and its trials."""
    module = ours(given("mipro_v2"))[2]
    assert not hasattr(module, "trial_logs") and not hasattr(module, "candidate_programs")
    assert not hasattr(ours(given("gepa"))[2], "detailed_results")


def test_demos_that_no_state_could_have_are_refused_before_an_lm_is_asked() -> None:
    """A ReAct has two predictors, and a state has 500 demos at most."""
    react = dspy.ReAct("question -> answer", tools=[])
    for optimizer, options, option in [
        ("labeled_few_shot", {"k": 251}, "k"),
        ("bootstrap_few_shot", {"max_bootstrapped_demos": 251}, "max_bootstrapped_demos"),
        ("mipro_v2", {"max_labeled_demos": 251}, "max_labeled_demos"),
        ("simba", {"bsize": 1, "max_demos": 251}, "max_demos"),
    ]:
        text = f"optimize.options.{option}: expected at most 250: the program has 2 predictors, and a state has at most"
        with pytest.raises(InvalidArgs, match=text):
            ours(arguments.read({"optimizer": optimizer, "options": options}), react)
    assert ours(arguments.read({"optimizer": "labeled_few_shot", "options": {"k": 250}}), react)[1] == []


@pytest.mark.parametrize(
    ("optimizer", "valset_size", "size"),
    [
        ("labeled_few_shot", None, None),
        ("bootstrap_few_shot", None, None),
        ("random_search", None, 20),
        ("random_search", 5, 5),
        ("copro", None, 20),
        ("mipro_v2", 5, None),
        ("mipro_v2", None, None),
        ("simba", None, 20),
        ("gepa", None, 20),
        ("gepa", 5, 5),
    ],
)
def test_the_size_of_a_whole_evaluation(optimizer: str, valset_size: int | None, size: int | None) -> None:
    valset = None if valset_size is None else {"inputs": [{}] * valset_size}
    assert optimizers.scored_on(arguments.read({"optimizer": optimizer, "valset": valset}), 20) == size
