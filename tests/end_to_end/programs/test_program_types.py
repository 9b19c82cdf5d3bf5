"""Program types: DSPy's modules with their options. A loopback LM records the prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import lm_env
from lm_server import chat, script
from peer import PATIENCE, Peer
from shared_peers import shared_peer
from tool_host import ToolError, execute

CREATE = {"id": "x", "signature": "question -> answer"}
ASK = {"program_id": "x", "inputs": {"question": "Why?"}}
OOPS = (500, {"error": {"message": "oops"}})
SCORE = {"reward": {"tool": "score"}}
YES = {"reward": {"field": "answer", "equals": "yes"}}
SECRET = "a secret of the caller's"


def prompts(server: Any) -> list[str]:
    return [json.dumps(request["messages"], ensure_ascii=False) for request in server.requests]


def score(inputs: dict[str, Any], outputs: dict[str, Any]) -> float:
    return {"no": 0, "perhaps": 0.5, "yes": 1}[outputs["answer"]]


def test_best_of_n_stops_at_the_threshold(start_lm: Any) -> None:
    """Each attempt is a separate LM call, not answered by a cache."""
    server = start_lm(script(*(chat(answer=answer) for answer in ("no", "perhaps", "yes"))))
    with Peer(env=lm_env(server, cache=True, temperature=0)) as peer:
        options = {**SCORE, "n": 5, "threshold": 0.5}
        assert peer.call("create_program", {**CREATE, "program_type": "best_of_n", "options": options})["success"]
        reply, asked = execute(peer, {**ASK, "config": {"top_p": 0.5}}, {"score": score})
        assert reply["result"] == {"answer": "perhaps"}
    assert asked == [
        ("score", {"inputs": {"question": "Why?"}, "outputs": {"answer": answer}}) for answer in ("no", "perhaps")
    ]
    assert [(request["temperature"], request["top_p"]) for request in server.requests] == [(1.0, 0.5)] * 2


@pytest.mark.parametrize("program_type", ["best_of_n", "refine"])
def test_the_best_is_taken_where_none_is_good_enough(start_lm: Any, program_type: str) -> None:
    answers = {"best_of_n": ("no", "perhaps", "no"), "refine": ("no", "advice", "perhaps", "advice", "no")}
    advice = chat(discussion="d", advice='{"inner": "be bolder"}')
    said = [advice if answer == "advice" else chat(answer=answer) for answer in answers[program_type]]
    server = start_lm(script(*said))
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {**CREATE, "program_type": program_type, "options": {**SCORE, "N": 3}})
        reply, asked = execute(peer, ASK, {"score": score})
        assert reply["result"] == {"answer": "perhaps"} and len(asked) == 3
    assert len(server.requests) == len(said)


def test_refine_gives_the_lm_its_advice(start_lm: Any) -> None:
    advice = chat(discussion="d", advice='{"inner": "be bolder"}')
    server = start_lm(script(chat(answer="no"), advice, chat(answer="yes")))
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {**CREATE, "program_type": "refine", "options": YES})
        assert peer.call("execute_program", ASK)["result"] == {"answer": "yes"}
    first, advising, second = prompts(server)
    assert 'answer == \\"yes\\"' in advising.replace("\\\\", "\\") and "class Predict" in advising
    assert "be bolder" in second and "be bolder" not in first


@pytest.mark.agents
def test_they_run_other_modules_too(start_lm: Any) -> None:
    """A ReAct with a tool. The reward may be declared among the tools, but is not a tool for the LM."""
    step = chat(next_thought="t", next_tool_name="search", next_tool_args='{"q": "a"}')
    finish = chat(next_thought="t", next_tool_name="finish", next_tool_args="{}")
    server = start_lm(script(step, finish, chat(reasoning="r", answer="yes")))
    with shared_peer(env=lm_env(server)) as peer:
        search = {"name": "search", "args": {"q": {"type": "str"}}}
        options = {**SCORE, "module": "react"}
        create = {**CREATE, "program_type": "refine", "options": options, "tools": [search, {"name": "score"}]}
        assert peer.call("create_program", create)["success"]
        reply, asked = execute(peer, ASK, {"search": lambda q: f"found {q}", "score": score})
        assert reply["result"]["answer"] == "yes"
    assert [name for name, _ in asked] == ["search", "score"]
    assert asked[1][1]["outputs"]["trajectory"]["observation_0"] == "found a"
    assert "found a" in prompts(server)[1] and "score" not in prompts(server)[0]


def giving(reward: Any) -> Any:
    def give(**_: Any) -> Any:
        if isinstance(reward, ToolError):
            raise reward
        return reward

    return give


NUMBER = 'expected a number, a boolean or {"score": number, "feedback": text} as the score'
FAILURES = [
    (OOPS, 1, {"error_type": "lm_error", "retryable": True}),
    ((401, {"error": {"message": "oops"}}), 1, {"error_type": "lm_error", "retryable": False}),
    (SECRET, 1, {"error_type": "output_invalid"}),
    (chat(answer="no"), ToolError(SECRET), {"error_type": "tool_error", "error": f"score: {SECRET}"}),
    (chat(answer="no"), SECRET, {"error_type": "tool_error", "error": f"score: {NUMBER}"}),
    (chat(answer="no"), None, {"error_type": "tool_error"}),
    (chat(answer="no"), [1], {"error_type": "tool_error"}),
    (chat(answer="no"), 10**400, {"error_type": "tool_error"}),
]


@pytest.mark.parametrize("program_type", ["best_of_n", "refine"])
def test_where_every_attempt_fails_the_last_failure_is_told(start_lm: Any, program_type: str) -> None:
    """DSPy's message about it has no contents."""
    with Peer() as peer:
        for answer, reward, wanted in FAILURES:
            lm = {"model": "openai/stub", **start_lm(answer).options()}
            options = {**SCORE, "n": 3}
            peer.call("create_program", {**CREATE, "program_type": program_type, "options": options, "lm": lm})
            reply, _ = execute(peer, ASK, {"score": giving(reward)})
            assert not reply["success"] and {name: reply.get(name) for name in wanted} == wanted, reply
        _, _, log = peer.finish()
    assert SECRET not in log and "oops" not in log


@pytest.mark.parametrize("adapter", ["json", {"name": "two_step", "extraction_model": {"model": "offline/echo"}}])
def test_refine_keeps_the_adapter_that_was_chosen(start_lm: Any, adapter: Any) -> None:
    """Also if DSPy creates another one of its class without arguments."""
    server = start_lm(script('{"answer": "no"}', '{"discussion": "d", "advice": {"inner": "a"}}', '{"answer": "yes"}'))
    with shared_peer(env=lm_env(server)) as peer:
        create = {**CREATE, "program_type": "refine", "options": {**YES, "n": 2}, "adapter": adapter}
        assert peer.call("create_program", create)["success"]
        reply = peer.call("execute_program", ASK)
        assert reply["success"], reply
    assert len(server.requests) == 3 and "## completed ##" not in prompts(server)[0]


COMPLETIONS = [{"reasoning": f"because of {n}", "answer": n} for n in range(3)]


@pytest.mark.parametrize("signature", ["question -> answer", "question -> hint, answer"])
def test_multi_chain_comparison_compares_what_it_is_given(start_lm: Any, signature: str) -> None:
    """By the last output field; `rationale` is accepted for `reasoning`."""
    server = start_lm(chat(rationale="all told", hint="h", answer="2"))
    with shared_peer(env=lm_env(server)) as peer:
        create = {"id": "x", "signature": signature, "program_type": "multi_chain_comparison"}
        options = {"m": 4, "temperature": 0.25}
        assert peer.call("create_program", {**create, "options": options})["success"]
        completions = [*COMPLETIONS, {"rationale": "why not", "answer": 2, "more": None}]
        asked = {**ASK, "inputs": {"question": "Why?", "completions": completions}}
        result = peer.call("execute_program", asked)["result"]
        assert (result["rationale"], result["answer"]) == ("all told", "2")
    (request,) = server.requests
    assert request["temperature"] == 0.25
    assert all(text in prompts(server)[0] for text in ("because of 0", "prediction is 1", "why not"))


@pytest.fixture(scope="module")
def comparing() -> Iterator[Peer]:
    with Peer(env={"DSPY_BRIDGE_LM": "offline/echo"}) as peer:
        peer.call("create_program", {**CREATE, "program_type": "multi_chain_comparison"})
        yield peer


def bad(named: str, error_type: str = "invalid_args", **create: Any) -> Any:
    return pytest.param(create, named, error_type, id=f"{named}-{json.dumps(create)[:60]}")


def rewarded(reward: Any) -> dict[str, Any]:
    return {"program_type": "best_of_n", "options": {"reward": reward}}


@pytest.mark.parametrize(
    ("create", "named", "error_type"),
    [
        *(bad("program_type", program_type=value) for value in ("", "best", "Predict", 5, None, [], {}, True)),
        *(bad("options", options=value) for value in (5, "n", [], True, [{"n": 1}])),
        bad("DSPY_BRIDGE_ALLOW_CODE", "not_allowed", program_type="rlm"),
        bad("flex is not offered", "not_allowed", program_type="flex"),
        bad("options: unknown key 'n'; expected none", options={"n": 1}),
        bad("options: unknown key 'max_iter'; did you mean max_iters?", program_type="react", options={"max_iter": 0}),
        *(bad("options.max_iters: Input should be ", program_type="react", options={"max_iters": value})
          for value in (0, 1001, 1.5, True, "3", None)),
        *(bad("options.threshold: Input should be ", program_type="best_of_n", options={"threshold": value})
          for value in ("1", True, None, 10**400)),
        bad("options.module: Input should be 'predict', ", program_type="refine", options={**YES, "module": "rlm"}),
        bad("options.m: Input should be less than or equal to 100", program_type="multi_chain_comparison",
            options={"M": 101}),
        bad("options.reward: missing", program_type="best_of_n"),
        *(
            bad("options.reward: expected", **rewarded(reward))
            for reward in ({}, {"tool": "a", "field": "answer"}, {"field": "answer"})
        ),
        *(bad("options.reward.tool", **rewarded({"tool": tool})) for tool in ("", 5)),
        *(
            bad("options.reward.field", **rewarded({"field": field, "equals": 1}))
            for field in ("question", ["answer"])
        ),
        bad("signature.inputs", signature="reasoning -> answer", program_type="chain_of_thought"),
        bad("signature.inputs", signature="trajectory -> answer", program_type="react"),
        bad("signature.outputs", signature="question -> trajectory", program_type="react"),
        bad("signature.inputs", signature="trajectory -> answer", program_type="refine",
            options={**YES, "module": "react"}),
        bad("signature.inputs", signature="hint_ -> answer", program_type="refine", options=YES),
        bad("signature.inputs", signature="reasoning_attempt_1 -> answer", program_type="multi_chain_comparison"),
        bad("signature.outputs", signature="question -> rationale, answer", program_type="multi_chain_comparison"),
        bad("tools: multi_chain_comparison", program_type="multi_chain_comparison", tools=[{"name": "search"}]),
        bad("tools: react needs at least one", program_type="react"),
        bad("tools: react needs at least one", program_type="react", tools=[]),
        *(
            bad("tools: react needs at least one", program_type=kind, tools=[{"name": "score"}],
                options={"reward": {"tool": "score"}, "module": "react"})
            for kind in ("best_of_n", "refine")
        ),
        bad("tools: best_of_n", program_type="best_of_n", options=YES, tools=[{"name": "search"}]),
        bad("tools: refine", program_type="refine", options={**SCORE, "module": "chain_of_thought"},
            tools=[{"name": "search"}, {"name": "score"}]),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_with_the_fields_name(
    comparing: Peer, create: dict[str, Any], named: str, error_type: str
) -> None:
    reply = comparing.call("create_program", {**CREATE, "id": "bad", **create})
    assert reply.get("error_type") == error_type, reply
    assert named in reply["error"] and "\n" not in reply["error"]


@pytest.mark.parametrize(
    ("create", "inputs"),
    [
        ({"program_type": "best_of_n", "options": YES}, {}),
        ({"program_type": "refine", "options": YES}, {}),
        ({"program_type": "multi_chain_comparison"}, {"completions": COMPLETIONS}),
    ],
)
def test_a_deadline_closes_the_request_of_a_module_in_a_thread(start_lm: Any, create: Any, inputs: Any) -> None:
    """And no further attempt is made: the thread returns."""
    server = start_lm(chat(answer="no"))
    server.gate.clear()
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {**CREATE, **create})
        reply = peer.call("execute_program", {**ASK, "inputs": {**ASK["inputs"], **inputs}}, timeout_ms=300)
        assert reply["error_type"] == "timeout"
        assert server.closed_by_client.acquire(timeout=PATIENCE)
        while peer.call("get_stats")["result"]["threads"]["running"]:
            pass
    assert len(server.requests) == 1
