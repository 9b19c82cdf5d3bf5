"""A conversation goes on with what the run before has returned, under the name of the input of the type history."""

from __future__ import annotations

import json
from typing import Any

import dspy
import pytest
from lm_server import chat, script, tool_calls, written
from plain_programs import ADAPTERS, search
from reacts import env
from shared_peers import shared_peer
from tool_host import execute

SIGNATURE = "past: dspy.History, question -> answer"
TOOL = {"name": "search", "description": "Looks something up.", "args": {"query": "str", "limit": "int"}}
ARGS = {"query": "a", "limit": 1}
REWARD = {"reward": {"field": "answer", "equals": "Paris"}, "n": 2}
OFFLINE = {"DSPY_BRIDGE_LM": "offline/echo"}
TYPED = "past: history, picture: image, when: date | None, question -> answer, snippet: code, notes: list[str]"
CAT = "https://example.org/cat.png"
AS_STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def create(peer: Any, **program: Any) -> None:
    reply = peer.call("create_program", {"id": "chat", "signature": SIGNATURE, **program})
    assert reply["success"], reply


def run(peer: Any, question: str, stream: bool = False, **inputs: Any) -> Any:
    """The result of a run. In a stream the conversation has no chunks."""
    peer.request("execute_program", {"program_id": "chat", "inputs": {"question": question, **inputs}}, stream=stream)
    while "success" not in (frame := peer.receive()):
        if "tool_call" in frame:
            call = frame["tool_call"]
            result = {"call_id": call["call_id"], "success": True, "result": search(**call["args"])}
            peer.send({"tool_result": result})
        assert frame.get("stream", {}).get("field") != "past"
    assert frame["success"], frame
    return frame["result"]


@AS_STREAM
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["predict", "chain_of_thought", "best_of_n"])
def test_the_next_prompt_is_that_of_plain_dspy(start_lm: Any, kind: str, adapter: str, stream: bool) -> None:
    thought = {"reasoning": "I know it."} if kind == "chain_of_thought" else {}
    server = start_lm(script(written(adapter, **thought, answer="Paris")))
    plain = (dspy.ChainOfThought if thought else dspy.Predict)(SIGNATURE)
    with dspy.context(lm=dspy.LM("openai/stub", **server.options()), adapter=ADAPTERS[adapter]()):
        first = plain(question="Where?", past=dspy.History(messages=[]))
        plain(question="And?", past=dspy.History(messages=[{"question": "Where?", **first}]))
    options = REWARD if kind == "best_of_n" else {}
    with shared_peer() as peer:
        lm = {"model": "openai/stub", **server.options()}
        create(peer, program_type=kind, adapter=adapter, lm=lm, options=options)
        second = run(peer, "And?", stream, past=run(peer, "Where?", stream)["past"])
    expected = [request["messages"] for request in server.requests]
    assert expected[2:] == expected[:2]
    assert second["past"] == [{"question": question, **thought, "answer": "Paris"} for question in ("Where?", "And?")]


@AS_STREAM
@pytest.mark.agents
def test_so_is_that_of_an_agent(start_lm: Any, react: str, stream: bool) -> None:
    """By trajectory DSPy makes no turns: what it is given has the trajectory as text, with the answer at its end."""
    end = {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": {}}
    answer = {"reasoning": "t", "answer": "Paris"}
    look = chat(next_thought="t", next_tool_name="search", next_tool_args=json.dumps(ARGS))
    server = start_lm(script(*[look, chat(**end), chat(**answer)] * 4))
    adapter = dspy.ChatAdapter()
    with dspy.context(lm=dspy.LM("openai/stub", **server.options()), adapter=adapter):
        if react == "v2":
            plain: Any = dspy.ReActV2("question -> answer", tools=[search])
            history = plain(question="Where?").history
        else:
            plain = dspy.ReAct(SIGNATURE.replace("past", "history"), tools=[search])
            steps = {"thought_0": "t", "tool_name_0": "search", "tool_args_0": ARGS, "observation_0": search(**ARGS)}
            plain(question="Where?", history=dspy.History(messages=[]))
            told = {**steps, "answer": "Paris"}
            text = adapter.format_user_message_content(dspy.Signature(f"{', '.join(told)} -> x"), told)
            history = dspy.History(messages=[{"question": "Where?", "trajectory": text, **end, **answer}])
        plain(question="And?", history=history)
    with shared_peer(env=env()) as peer:
        lm = {"model": "openai/stub", **server.options()}
        create(peer, program_type="react", tools=[TOOL], adapter="chat", lm=lm)
        first = run(peer, "Where?", stream)["past"]
        second = run(peer, "And?", stream, past=first)
        twice = {"id": "x", "signature": "past: history, q -> past", "program_type": "react"}
        assert peer.call("create_program", twice)["error"].startswith("signature.outputs: react has a field 'past'")
    # By trajectory the names of all inputs are in DSPy's instructions.
    asked = [request["messages"][0 if react == "v2" else 1 :] for request in server.requests]
    runs = len(asked) // 4
    assert asked[3 * runs :] == asked[runs : 2 * runs]
    assert second["past"][: len(first)] == first and "history" not in second
    assert [turn.get("question") for turn in second["past"]] == ["Where?", None, "And?", None]


@pytest.mark.agents
def test_values_of_all_types_go_in_again(tmp_path: Any) -> None:
    """As the client wrote them: what a path names is read again, and is not in the reply."""
    (tmp_path / "cat.png").write_bytes(b"\x89PNG")
    agent = {"tools": [TOOL], "options": {**REWARD, "module": "react"}}
    kinds = {"predict": {}, "chain_of_thought": {"tools": [TOOL]}, "best_of_n": {"options": REWARD}, "refine": agent}
    with shared_peer(env={**OFFLINE, **env(), "DSPY_BRIDGE_FILES_DIR": str(tmp_path)}) as peer:
        for kind, more in kinds.items():
            create(peer, signature=TYPED, program_type=kind, **more)
            past: list[Any] = []
            for picture in ({"base64": "iVBORw0KGgo=", "mime": "image/png"}, {"path": "cat.png"}, CAT):
                asked = {"picture": picture, "when": "2026-03-01", "question": "q"}
                given, past = past, run(peer, past=past or None, **asked)["past"]
                assert past[: len(given)] == given and past[len(given)].items() >= asked.items(), kind
                assert past[-1]["snippet"].startswith("echo: ") and past[-1].keys() >= {"answer", "notes"}


@pytest.mark.parametrize("native", [True, False], ids=["native", "text"])
def test_an_lm_sees_what_its_tools_gave(start_lm: Any, native: bool) -> None:
    called = json.dumps([{"name": "search", "args": ARGS}])
    asks = tool_calls(("search", json.dumps(ARGS))) if native else chat(answer="?", tool_calls=called)
    server = start_lm(script(asks, chat(answer="Paris", tool_calls="[]")))
    lm = {"model": "openai/stub", "supports": ["function_calling"], **server.options()}
    with shared_peer() as peer:
        create(peer, tools=[TOOL], lm=lm, adapter={"name": "chat", "native_tools": native})
        (first,) = past = run(peer, "Where?")["past"]
        assert first["tool_calls"][0]["result"] == search(**ARGS) and ("answer" in first) is not native
        run(peer, "And?", past=run(peer, "Where?", past=past)["past"])
        wrong = {"program_id": "chat", "inputs": {"question": "", "past": [{"tool_calls": 5}]}}
        assert peer.call("execute_program", wrong)["error"].startswith("inputs.past: turn[0].tool_calls: Input should")
    told = [message for message in server.requests[1]["messages"] if "text of a document" in str(message)]
    assert [message["role"] for message in told] == ["tool" if native else "user"]


def test_where_it_is_and_where_not() -> None:
    """In each result of a batch; of several answers it has the first. It is no score's, and no other program type's."""
    asked = {"program_id": "chat", "inputs": [{"question": "a"}], "expected": [{"answer": "echo: a"}]}
    with shared_peer("--max-frame-bytes", "200000", env=OFFLINE) as peer:
        create(peer, config={"n": 2})
        past = [{"question": "a", "answer": "echo: a"}]
        assert run(peer, "a") == {"answer": "echo: a", "past": past, "completions": [{"answer": "echo: a"}] * 2}
        create(peer)
        reply = peer.call("execute_program", {**asked, "metric": {"field": "answer", "match": "f1"}})
        assert (reply["result"]["score"], reply["result"]["results"][0]["result"]["past"]) == (1, past)
        reply = peer.call("execute_program", {**asked, "metric": {"field": "past", "match": "f1"}})
        assert reply["error"] == "metric.field: expected one of answer"
        # Twice as long as the request.
        reply, _ = execute(peer, {"program_id": "chat", "inputs": {"question": "x" * 90_000}}, {})
        assert reply["error_type"] == "frame_too_large"
        create(peer, program_type="multi_chain_comparison", options={"m": 1})
        compared = run(peer, "a", completions=[{"reasoning": "r", "answer": "b"}])
        create(peer, signature="past: list[history], question -> answer")
        assert compared.keys() | run(peer, "a", past=[]).keys() == {"rationale", "answer"}
