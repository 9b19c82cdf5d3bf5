"""`execute_program` with `optimize`: each optimizer gives what the same code gives in plain Python."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from conftest import lm_env
from lm_server import LMServer
from optimizing_lm import answer
from peer import Peer
from plain_optimizers import CASES, EXAMPLES, METRICS, TRAINSET, feedback, on_the_wire, optimize, plain, program
from tool_host import Tools, execute

MODEL = "openai/stub-model"


def reply(request: dict[str, Any]) -> str:
    return answer(request["messages"], request.get("temperature"))


def exact(example: Any, prediction: Any, purpose: str, predictor: Any = None) -> dict[str, Any]:
    """The metric of `plain_optimizers`."""
    score = float(example["answer"] == prediction["answer"])
    return {"score": score, "feedback": feedback(example["answer"])} if purpose == "feedback" else {"score": score}


TOOLS: Tools = {"exact": exact}
METRIC = {"tool": "exact"}


@pytest.fixture(scope="module")
def lm() -> Iterator[LMServer]:
    server = LMServer(reply)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def module_peer(lm: LMServer) -> Iterator[Peer]:
    with Peer(env=lm_env(lm)) as peer:
        yield peer


@pytest.fixture
def peer(module_peer: Peer, lm: LMServer) -> Iterator[Peer]:
    lm.serve(reply)
    assert module_peer.call("create_program", {"id": "qa", "signature": "question -> answer"})["success"]
    yield module_peer
    assert module_peer.call("cleanup")["success"]


def wire_lms(lm: LMServer) -> Any:
    return lambda role: {"model": f"openai/{role}", **lm.options()}


def run(peer: Peer, given: dict[str, Any], program_id: str = "qa", **args: Any) -> dict[str, Any]:
    args = {"program_id": program_id, **on_the_wire(TRAINSET), "metric": METRIC, **args}
    return execute(peer, {**args, "optimize": given}, TOOLS)[0]


def optimized(peer: Peer, given: dict[str, Any], **args: Any) -> dict[str, Any]:
    done = run(peer, given, **args)
    assert done["success"], done
    result: dict[str, Any] = done["result"]
    return result


def score(peer: Peer, program_id: str, examples: list[Any] = EXAMPLES) -> float:
    args = {"program_id": program_id, **on_the_wire(examples), "metric": METRIC}
    done, _ = execute(peer, args, TOOLS)
    assert done["success"] and done["result"]["failed"] == 0, done
    found: float = done["result"]["score"]
    return found


def without_metadata(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "metadata"}


def requests(lm: LMServer) -> list[str]:
    return sorted(json.dumps(request, sort_keys=True) for request in lm.requests)


def in_python(optimizer: str, lm: LMServer) -> tuple[dict[str, Any], float, list[str]]:
    """The state, its score on all examples, and what LMs were asked for the state."""

    def of_role(role: str) -> Any:
        return dspy.LM(f"openai/{role}", **lm.options())

    lm.serve(reply)
    logging.getLogger("dspy").setLevel(logging.CRITICAL)
    with dspy.context(lm=dspy.LM(MODEL, **lm.options()), adapter=dspy.ChatAdapter()):
        module = plain(optimizer, of_role, 2)
        asked = requests(lm)
        found = dspy.Evaluate(devset=EXAMPLES, metric=METRICS.score, num_threads=2)(module).score
    return module.dump_state(), found, asked


@pytest.mark.filterwarnings("ignore:Argument ``multivariate`` is an experimental feature")
@pytest.mark.parametrize("optimizer", CASES)
def test_its_state_loads_and_scores_as_that_of_the_same_code_in_python(
    peer: Peer, lm: LMServer, optimizer: str
) -> None:
    result = optimized(peer, optimize(optimizer, wire_lms(lm)))
    asked = requests(lm)
    assert peer.call("create_program", {"id": "better", "signature": "question -> answer", "state": result["state"]})[
        "success"
    ]
    found = score(peer, "better")
    state, wanted, plainly_asked = in_python(optimizer, lm)
    assert without_metadata(result["state"]) == json.loads(json.dumps(state))
    assert round(100 * found, 2) == wanted
    assert asked == plainly_asked
    assert state != program().dump_state() and result["lm_calls"] == len(asked)


@pytest.mark.parametrize(
    ("optimizer", "purposes"),
    [
        ("labeled_few_shot", set()),
        ("bootstrap_few_shot", {"bootstrap"}),
        ("random_search", {"bootstrap", "score"}),
        ("copro", {"score"}),
        ("mipro_v2", {"bootstrap", "score"}),
        ("simba", {"score"}),
        ("gepa", {"score", "feedback"}),
    ],
)
def test_the_metric_is_told_what_a_score_is_for(peer: Peer, lm: LMServer, optimizer: str, purposes: set[str]) -> None:
    args = {"program_id": "qa", **on_the_wire(TRAINSET), "metric": METRIC}
    done, asked = execute(peer, {**args, "optimize": optimize(optimizer, wire_lms(lm))}, TOOLS)
    assert done["success"] and done["result"]["metric_calls"] == len(asked)
    assert {given["purpose"] for _, given in asked} == purposes
    for _, given in asked:
        predictor = given.get("predictor")
        if given["purpose"] == "feedback":
            inputs = {"question": given["example"]["question"]}
            assert predictor == {"name": "self", "inputs": inputs, "outputs": given["prediction"]}
        else:
            assert predictor is None


BY_DSPY = "optimize: DSPy's "
REFUSED = [
    ({"optimizer": "copro", "options": {"bredth": 2}}, "optimize.options: unknown key 'bredth'; did you mean breadth?"),
    ({"optimizer": "copro", "prompt_lm": 1}, "optimize.prompt_lm: expected text such as"),
    ({"optimizer": "copro", "prompt_lm": {"model": "openai/x", "modle": 1}}, "optimize.prompt_lm.modle: "),
    ({"optimizer": "random_search", "valset": {"inputs": [{}]}}, "optimize.valset.inputs[0].question: "),
    ({"optimizer": "copro", "options": {"breadth": 1}}, f"{BY_DSPY}copro refuses it: Breadth must be greater than 1"),
    ({"optimizer": "gepa", "options": {"auto": "light"}}, f"{BY_DSPY}gepa refuses it: "),
    ({"optimizer": "gepa", "reflection_lm": "openai/x"}, f"{BY_DSPY}gepa refuses it: Exactly one of "),
    ({"optimizer": "simba"}, f"{BY_DSPY}simba refuses it: Trainset too small: 8 < 32"),
    ({"optimizer": "mipro_v2", "options": {"num_trials": 3}}, f"{BY_DSPY}mipro_v2 refuses it: "),
    ({"optimizer": "mipro_v2", "options": {"auto": None}}, f"{BY_DSPY}mipro_v2 refuses it: "),
    (
        {"optimizer": "mipro_v2", "options": {"auto": None, "num_candidates": 2, "num_trials": 3}},
        f"{BY_DSPY}mipro_v2 refuses it: Minibatch size cannot exceed the size of the valset",
    ),
]


@pytest.mark.parametrize(("given", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_is_wrong_is_named_before_an_lm_is_asked(peer: Peer, lm: LMServer, given: Any, text: str) -> None:
    reply = run(peer, given)
    assert (reply["success"], reply["error_type"]) == (False, "invalid_args")
    assert reply["error"].startswith(text)
    assert lm.requests == []
