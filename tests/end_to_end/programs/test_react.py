"""What DSPy's two kinds of ReAct have in common: the shape of results, the conversation, how they end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from lm_server import chat, completion, event, pieces, script
from plain_programs import search
from reacts import calls
from shared_peers import shared_peer
from tool_host import ToolError, execute

SEARCH = {"name": "search", "description": "Looks something up.", "args": {"query": {"type": "str"}, "limit": "int"}}
AGENT = {"id": "x", "signature": "question -> answer, n: int", "program_type": "react", "tools": [SEARCH]}
LOOK = ("search", {"query": "a", "limit": 1})
END = ("submit", {"answer": "yes, it is", "n": 2})
TOOLS = {"search": search}
BY_TRAJECTORY = [
    chat(next_thought="look", next_tool_name="search", next_tool_args=json.dumps(LOOK[1])),
    chat(next_thought="enough", next_tool_name="finish", next_tool_args="{}"),
    chat(reasoning="enough", **END[1]),
]


def native(*named: tuple[str, Any]) -> tuple[int, dict[str, Any]]:
    """An answer that calls tools natively."""
    body = completion("stub", "")
    made = [{"name": name, "arguments": json.dumps(args)} for name, args in named]
    message = body["choices"][0]["message"]
    message["content"] = None
    message["tool_calls"] = [{"id": f"c{n}", "type": "function", "function": made[n]} for n in range(len(made))]
    return 200, body


@pytest.fixture
def agent(start_lm: Any, react: str) -> Iterator[Any]:
    """Runs an agent whose LM gives these answers: the reply, its frames, and the LM's requests."""
    with shared_peer(env={} if react == "v1" else {"DSPY_BRIDGE_REACT": react}) as peer:

        def run(
            answers: list[Any],
            tools: Any = TOOLS,
            inputs: Any = None,
            args: Any = None,
            stream: bool = False,
            **create: Any,
        ) -> Any:
            server = start_lm(script(*answers))
            supports = create.pop("supports", ["none"])
            lm = {"model": "openai/stub", "supports": supports, **server.options()}
            reply = peer.call("create_program", {**AGENT, "lm": lm, **create})
            assert reply["success"], reply
            asked = {"program_id": "x", "inputs": {"question": "Why?", **(inputs or {})}, **(args or {})}
            if stream:
                peer.request("execute_program", asked, stream=True)
                frames = [peer.receive()]
                while "stream" in frames[-1]:
                    frames.append(peer.receive())
                return [frame["stream"] for frame in frames[:-1]], frames[-1]
            reply, _ = execute(peer, asked, tools)
            return reply, server.requests

        run.peer = peer  # type: ignore[attr-defined]
        yield run


def by_history(test: Any) -> Any:
    """A test of the ReAct by history alone."""
    return pytest.mark.parametrize("react", ["v2"], indirect=True)(test)


@pytest.mark.agents
def test_the_shape_of_a_result(agent: Any, react: str) -> None:
    reply, _ = agent(BY_TRAJECTORY)
    result = reply["result"]
    assert list(result) == ["trajectory", "reasoning", "answer", "n", "history", "termination_reason"]
    found, end = {"found": ["a", "text of a document"], "limit": 1}, ("finish" if react == "v1" else "submit")
    steps = [result["trajectory"][f"{key}_0"] for key in ("thought", "tool_name", "tool_args", "observation")]
    assert steps == ["look", *LOOK, found] and len(result["trajectory"]) == 8
    assert (result["reasoning"], result["answer"], result["n"]) == ("enough", "yes, it is", 2)
    assert result["termination_reason"] == result["trajectory"]["tool_name_1"] == end
    first, last = result["history"]
    called = {"id": "call_0_0", "name": "search", "args": LOOK[1], "result": found}
    assert first == {"question": "Why?", "next_thought": "look", "tool_calls": [called]}
    assert (last["tool_calls"][0]["name"], last["answer"], last["n"]) == (end, "yes, it is", 2)


@pytest.mark.agents
def test_a_conversation_goes_on(agent: Any) -> None:
    """Also with turns of other programs, with those of the other ReAct, and if the signature declares it."""
    reply, _ = agent(BY_TRAJECTORY)
    given = [{"question": "First?", "answer": "one", "n": 1}, *reply["result"]["history"]]
    given[1]["tool_calls"].append({"name": "gone", "error": "Unknown tool: gone"})
    reply, requests = agent(
        BY_TRAJECTORY, inputs={"history": given}, signature="history: dspy.History, question -> answer, n: int"
    )
    history = reply["result"]["history"]
    assert history[: len(given)] == given and [turn.get("question") for turn in history[3:]] == ["Why?", None]
    for text in ("First?", "one", "text of a document", "yes, it is", "Unknown tool: gone"):
        assert text in str(requests[0]["messages"][1:-1]) and text not in str(requests[0]["messages"][-1])


@by_history
@pytest.mark.parametrize("how", ["chat", "json", "xml", "native"])
def test_it_goes_on_as_with_dspys_own_history(agent: Any, start_lm: Any, how: str) -> None:
    """The prompts are the same, to the byte."""
    answers: list[Any] = (
        [native(LOOK, LOOK), native(END)] if how == "native" else [written(how, LOOK), written(how, END)]
    )
    adapter = {"chat": dspy.ChatAdapter, "xml": dspy.XMLAdapter}.get(how, dspy.JSONAdapter)()
    server = start_lm(script(*answers * 2))
    lm = dspy.LM("openai/gpt-4o-mini" if how == "native" else "openai/stub", **server.options())
    plain = dspy.ReActV2("question -> answer, n: int", tools=[search])
    with dspy.context(lm=lm, adapter=adapter):
        first = plain(question="Why?")
        plain(question="And?", history=first.history)
    expected, name = [request["messages"] for request in server.requests], "json" if how == "native" else how
    supports = ["function_calling"] if how == "native" else ["none"]
    reply, before = agent(answers, adapter=name, supports=supports)
    before, inputs = list(before), {"question": "And?", "history": reply["result"]["history"]}
    _, after = agent(answers, adapter=name, supports=supports, inputs=inputs)
    assert [request["messages"] for request in (*before, *after)] == expected and len(expected) == 4


def written(adapter: str, *named: tuple[str, Any]) -> str:
    """An answer by history in the adapter's format."""
    made = {"tool_calls": [{"name": name, "args": args} for name, args in named]}
    if adapter == "json":
        return json.dumps({"next_thought": "t", "tool_calls": made})
    return (
        calls(*named)
        if adapter == "chat"
        else f"<next_thought>t</next_thought><tool_calls>{json.dumps(made)}</tool_calls>"
    )


# What is wrong with a history, and where.
WRONG: list[tuple[Any, str]] = [
    ("x", ": expected a list of turns"),
    ([5], ": turn[0]: expected an object"),
    ([{}], ": turn[0]: expected an object"),
    ([{"question": "q"}, {"qestion": "q"}], ": turn[1]: unknown key 'qestion'"),
    ([{"question": "q", "n": "many"}], ": turn[0].n: Input should be a valid integer"),
    ([{"next_thought": 5}], ": turn[0].next_thought: Input should be a valid string"),
    ([{"tool_calls": {}}], ": turn[0].tool_calls: Input should be a valid list"),
]
CALL = {"name": "f", "result": 1}
# The same of one of its calls.
WRONG_CALLS: list[tuple[Any, str]] = [
    ({"result": 1}, ".name: Field required"),
    ({**CALL, "id": 5}, ".id: Input should be a valid string"),
    ({**CALL, "args": []}, ".args: Input should be a valid dict"),
    ({**CALL, "error": "e"}, ": expected one of result and error"),
    ({"name": "f"}, ": expected one of result and error"),
    ({**CALL, "x": 1}, ".x: Extra inputs"),
]
WRONG += [([{"tool_calls": [CALL, call]}], f": turn[0].tool_calls[1]{text}") for call, text in WRONG_CALLS]
RESERVED: list[tuple[dict[str, Any], str]] = [
    (
        {"signature": "history: str, q -> a"},
        "signature.inputs: 'history' is the conversation",
    ),
    ({"signature": "tools -> a"}, "signature.inputs: react has a field 'tools'"),
    ({"signature": "q -> history"}, "signature.outputs: react has a field 'history'"),
    ({"signature": "q -> termination_reason"}, "signature.outputs: react has a field 'termination_reason'"),
    *(({"tools": [{"name": name}]}, f"tools[0].name: '{name}' is taken") for name in ("submit", "finish")),
]


@pytest.mark.agents
def test_what_is_wrong_is_an_argument_error(agent: Any) -> None:
    agent(BY_TRAJECTORY)
    for history, text in WRONG:
        reply = agent.peer.call("execute_program", {"program_id": "x", "inputs": {"question": "q", "history": history}})
        assert reply["error_type"] == "invalid_args", reply
        assert reply["error"].startswith(f"inputs.history{text}"), reply
    for part, text in RESERVED:
        reply = agent.peer.call("create_program", {**AGENT, **part})
        assert reply["error_type"] == "invalid_args" and reply["error"].startswith(text), reply


@by_history
def test_what_an_lm_may_do_wrong_is_told_to_it(agent: Any) -> None:
    """An error is marked as such, and no text has a path of this machine."""

    def fails(**_: Any) -> Any:
        raise ToolError("no net")

    wrong = [LOOK, ("nowhere", {}), ("search", {"self": 1, "query": [1]}), ("submit", {"answer": 5, "n": 2})]
    reply, requests = agent([calls(*wrong), calls(END)], {"search": fails})
    errors = [call["error"] for call in reply["result"]["history"][0]["tool_calls"]]
    assert errors[:2] == ["Execution error in search: no net", "Unknown tool: nowhere"]
    assert errors[3] == "Execution error in submit: Arg answer is invalid: Input should be a valid string"
    told = str(requests[1]["messages"])
    assert told.count('"is_error": true') == 4 and ".py" not in told + str(reply) and "Traceback" not in told
    assert reply["result"]["termination_reason"] == "submit" and reply["result"]["n"] == 2


@by_history
@pytest.mark.parametrize("way", ["text", "native"])
def test_an_lm_that_does_not_submit(agent: Any, way: str) -> None:
    """It is asked once more, and with `attempts` again; no tool runs for that."""
    write, supports = (calls, ["none"]) if way == "text" else (native, ["function_calling"])
    options = {"options": {"max_iters": 1}, "supports": supports, "adapter": "chat" if way == "text" else "json"}
    short = ("submit", {"answer": "a"})
    for last, text in ((LOOK, "it has no call of submit"), (short, "missing n; expected answer, n")):
        reply, _ = agent([write(LOOK), write(last)], **options)
        assert reply["error_type"] == "output_invalid" and text in reply["error"], reply
        reply, requests = agent([write(LOOK), write(last), write(END)], args={"attempts": 2}, **options)
        assert reply["result"]["termination_reason"] == "forced_submit" and len(requests) == 3
        assert f"This answer did not fit: {text}" in requests[2]["messages"][-1]["content"]
    reply, _ = agent([write(END, ("submit", {"answer": "no", "n": 3}))], **options)
    assert "it has submit twice, with different values" in reply["error"]


@pytest.mark.agents
def test_the_config_of_a_call_holds(agent: Any) -> None:
    args = {"config": {"temperature": 0.3}}
    _, requests = agent(BY_TRAJECTORY, args=args, config={"temperature": 0.1, "top_p": 0.5})
    assert {(request["temperature"], request["top_p"]) for request in requests} == {(0.3, 0.5)}


def streamed(how: str, *named: tuple[str, Any]) -> Any:
    """An answer to a request with `stream`; a native one is a single call, in pieces."""
    if how != "native":
        return written(how, *named)
    (name, args) = named[0]
    head = {"index": 0, "id": "c", "type": "function", "function": {"name": name, "arguments": ""}}
    tail = [{"index": 0, "function": {"arguments": piece}} for piece in pieces(json.dumps(args))]
    return iter([event("stub", {"role": "assistant", "tool_calls": [call]}, None) for call in (head, *tail)])


@by_history
@pytest.mark.parametrize("how", ["chat", "native"])
def test_a_replayed_answer_is_streamed(agent: Any, start_lm: Any, how: str) -> None:
    server = start_lm(lambda _request: streamed(how, END))
    lm = {"model": "openai/stub", "supports": ["function_calling"] if how == "native" else ["none"], **server.options()}
    peer, ask = agent.peer, {"program_id": "x", "inputs": {"question": "Why?"}}
    assert peer.call("create_program", {**AGENT, "lm": lm})["success"]
    journal: list[Any] = []
    for replayed in (False, True):
        peer.request("execute_program", ask, stream=True, journal=list(journal))
        chunks = []
        while "success" not in (frame := peer.receive()):
            journal += [frame["journal"]] if "journal" in frame else []
            chunks += [frame["stream"]] if frame.get("stream", {}).get("field") == "answer" else []
        assert "".join(chunk["chunk"] for chunk in chunks) == "yes, it is"
        assert {chunk.get("replayed", False) for chunk in chunks} == {replayed}
    assert len(server.requests) == 1


@by_history
@pytest.mark.parametrize("how", ["chat", "json", "xml", "native"])
def test_the_answer_is_streamed(agent: Any, how: str) -> None:
    """After one that did not fit, whose chunks are void."""
    options = {"adapter": "json", "supports": ["function_calling"]} if how == "native" else {"adapter": how}
    answers = [streamed(how, ("submit", {"answer": "no", "n": "x"})), streamed(how, END)]
    frames, reply = agent(answers, stream=True, **options)
    statuses = [number for number, frame in enumerate(frames) if "status" in frame]
    again = frames[statuses[0]]["status"]
    assert len(statuses) == 1 and again.startswith(
        "asking again: submit: Arg n is invalid: Input should be a valid int"
    )
    first, last = frames[: statuses[0]], [frame for frame in frames[statuses[0] + 1 :] if frame["field"] == "answer"]
    assert first.pop() == {"field": "answer", "reset": True}
    assert "".join(frame["chunk"] for frame in first) == "no"
    assert "".join(frame["chunk"] for frame in last) == "yes, it is" == reply["result"]["answer"] and len(last) > 2


def test_which_react_it_is_can_be_chosen() -> None:
    for flags, env, version in (((), {}, "v1"), (("--react", "v2"), {}, "v2"), ((), {"DSPY_BRIDGE_REACT": "v2"}, "v2")):
        with shared_peer(*flags, env=env) as peer:
            assert peer.call("create_program", AGENT)["success"]
            assert peer.call("get_stats")["result"]["react"] == version


def test_demos_are_those_of_one_react_alone() -> None:
    """By history they are of its steps. A state of one ReAct is refused by the other, with what is to be done."""
    states: dict[str, Any] = {}
    examples = [{"question": f"q{n}"} for n in range(3)]
    measured = {
        "expected": [{"answer": f"echo: q{n}"} for n in range(3)],
        "metric": {"field": "answer", "match": "equals"},
    }
    asked = {"program_id": "x", "inputs": examples, **measured}
    for version in ("v1", "v2"):
        with shared_peer(env={"DSPY_BRIDGE_LM": "offline/echo", "DSPY_BRIDGE_REACT": version}) as peer:
            assert peer.call("create_program", {**AGENT, "signature": "question -> answer"})["success"]
            reply, _ = execute(peer, {**asked, "optimize": {"optimizer": "bootstrap_few_shot"}}, TOOLS)
            states[version] = reply["result"]["state"]
            again = {**AGENT, "signature": "question -> answer", "state": states[version]}
            assert peer.call("create_program", again)["success"]
            reply, _ = execute(peer, {"program_id": "x", "inputs": examples[0]}, TOOLS)
            assert reply["result"]["answer"] == "echo: q0"
            if version == "v2":
                reply, _ = execute(peer, {**asked, "optimize": {"optimizer": "labeled_few_shot"}}, TOOLS)
                assert reply["error_type"] == "invalid_args" and "no prompt of a ReAct by history" in reply["error"]
                reply = peer.call("create_program", {**again, "state": states["v1"]})
                assert reply["error_type"] == "invalid_args" and "optimize the program again" in reply["error"]
    demos = [demo for demo in states["v2"]["react"]["demos"] if "tool_calls" in demo]
    assert demos and all("submit" not in str(demo["history"]) for demo in demos), "each has what was before it"
