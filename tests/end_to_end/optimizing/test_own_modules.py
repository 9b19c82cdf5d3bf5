"""Programs of all kinds are optimized: agents, attempts, and modules of your own, sync, async and with threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_server import Answer, chat
from optimizing_host import JUDGE, Desk, first_of, lm_answer
from peer import ROOT

HOST = '''
import asyncio, contextvars, dspy, threading
from dspy.utils.parallelizer import ParallelExecutor

class Sync(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.inner = dspy.Predict(signature)
    def forward(self, question):
        return dspy.Prediction(answer=self.inner(question=question).answer)

class Async(dspy.Module):
    def __init__(self, signature):
        super().__init__()
        self.inner = dspy.Predict(signature)
    async def aforward(self, question):
        await asyncio.sleep(0)
        return dspy.Prediction(answer=(await self.inner.acall(question=question)).answer)

class Threads(Sync):
    """In a thread that has this one's context."""
    def forward(self, question):
        found, context = [], contextvars.copy_context()
        thread = threading.Thread(target=lambda: found.append(context.run(self.inner, question=question)))
        thread.start()
        thread.join()
        return dspy.Prediction(answer=found[0].answer)

class Parallel(Sync):
    """In threads of DSPy's."""
    def forward(self, question):
        return dspy.Parallel(num_threads=2)([(self.inner, {"question": question})] * 2)[0]

class Patience(Sync):
    """Its answer is how long an example may take until DSPy runs it again, in seconds."""
    def forward(self, question):
        self.inner(question=question)
        executor = ParallelExecutor(num_threads=2)
        executor.execute(lambda item: item, [1, 2])
        return dspy.Prediction(answer=str(executor.timeout))

class OftenRaises(Sync):
    """Its own code fails for all answers but two."""
    def forward(self, question):
        answer = self.inner(question=question).answer
        if not question.endswith(("0", "11")):
            raise ValueError("cannot use " + question)
        return dspy.Prediction(answer=answer)
'''
SIGNATURE = "question -> answer"


@pytest.fixture(scope="module")
def desk_env(folder: Path) -> dict[str, str]:
    return {"DSPY_BRIDGE_ALLOW_MODULES": "host", "PYTHONPATH": f"{ROOT}:{folder}"}


def loads(desk: Desk, result: dict[str, Any], **definition: Any) -> None:
    """A program with the state that was found runs."""
    desk.create("better", state=result["state"], **definition)
    reply = desk.reply_to(
        desk.peer.request("execute_program", {"program_id": "better", "inputs": {"question": "word 1"}}), TOOLS
    )
    assert reply["success"], reply


TOOLS = {
    "judge": lambda example, prediction, **_: prediction["answer"] == example["answer"],
    "search": lambda query: f"found {query}",
}
WAYS = first_of("gepa", "bootstrap_few_shot", "random_search", "simba")


@pytest.mark.parametrize("kind", ["Sync", "Async", "Threads", "Parallel"])
@pytest.mark.parametrize("optimizer", first_of("random_search", "gepa"))
def test_own_modules(desk: Desk, kind: str, optimizer: str) -> None:
    definition = {"program_type": f"host:{kind}"}
    desk.create(**definition)
    reply = desk.run(optimizer, JUDGE, num_threads=4, meta=True)
    assert reply["success"], reply
    assert reply["result"]["lm_calls"] == len(desk.server.requests)
    assert reply["result"]["metric_calls"] > 0
    loads(desk, reply["result"], **definition)


def test_no_example_is_run_twice_because_it_takes_long(desk: Desk) -> None:
    """DSPy does so after 120 s: the application pays twice."""
    desk.create(program_type="host:Patience")
    seen = set()

    def judge(prediction: dict[str, Any], **_: Any) -> int:
        seen.add(prediction["answer"])
        return 1

    assert desk.run("random_search", JUDGE, {"judge": judge})["success"]
    assert seen == {"0"}
    assert desk.execute()["result"] == {"answer": "120"}


def test_a_module_that_fails_for_many_examples_is_optimized(desk: Desk) -> None:
    """More than ten, while others succeed: by one thread the failures of each candidate follow one another."""
    desk.create(program_type="host:OftenRaises")
    examples = [{"question": f"word {number}"} for number in (*range(11), 11, *range(12, 20))]
    reply = desk.run(
        "random_search", {"tool": "judge"}, {"judge": lambda **_: 1}, inputs=examples, wanted=None, num_threads=1
    )
    # word 0, word 10 and word 11.
    assert reply["success"] and reply["result"]["score"] == pytest.approx(3 / len(examples)), reply


def agent_lm(request: dict[str, Any]) -> Answer:
    """Calls the tool once, then finishes; what an optimizer asks it answers as ever."""
    text = request["messages"][-1]["content"]
    if "next_tool_name" in text and "[[ ## trajectory ## ]]" in text:
        searched = "found" in text
        args = "{}" if searched else '{"query": "it"}'
        return chat(next_thought="so", next_tool_name="finish" if searched else "search", next_tool_args=args)
    return lm_answer(request)


def calling_lm(request: dict[str, Any]) -> Answer:
    """Calls the tool next to its answer."""
    text = request["messages"][-1]["content"]
    if "[[ ## tool_calls ## ]]" in text.rpartition("Respond with")[2]:
        return chat(answer="WORD 1", tool_calls='{"tool_calls": [{"name": "search", "args": {"query": "it"}}]}')
    return lm_answer(request)


SEARCH = {"name": "search", "description": "Searches.", "args": {"query": {"type": "string"}}}


@pytest.mark.parametrize("optimizer", WAYS)
def test_an_answer_that_cannot_be_read_counts_with_0(desk: Desk, optimizer: str) -> None:
    """Also one with some of the fields, for which DSPy's own code for GEPA fails."""
    some = '{"answer": "x", "certain": "perhaps"}'
    desk.serve(lambda request: some if "certain" in str(request) else lm_answer(request))
    desk.create(signature="question -> answer, certain: bool")
    reply = desk.run(optimizer, {"tool": "judge"}, {"judge": lambda **_: 1})
    assert reply["success"], reply
    assert desk.asked == [] and reply["result"]["score"] in (0, None)


REWARDED = {"options": {"n": 2, "threshold": 1.0, "reward": {"field": "answer", "equals": "WORD 1"}}}
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "react": ({"tools": [SEARCH], "options": {"max_iters": 3}}, agent_lm),
    "predict": ({"tools": [SEARCH]}, calling_lm),
    "best_of_n": (REWARDED, lm_answer),
    "refine": (REWARDED, lm_answer),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", WAYS)
def test_programs_of_other_types(desk: Desk, kind: str, optimizer: str) -> None:
    """Their tools are called as in any run."""
    definition, lm = KINDS[kind]
    desk.serve(lm)
    desk.create(program_type=kind, **definition)
    reply = desk.run(optimizer, JUDGE, {**TOOLS, "judge": lambda **_: 0.5}, num_threads=4)
    assert reply["success"], reply
    assert ("tools" in definition) == any(call["name"] == "search" for call in desk.asked)
    loads(desk, reply["result"], program_type=kind, **definition)
