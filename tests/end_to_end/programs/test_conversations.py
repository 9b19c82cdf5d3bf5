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
SEARCH = ("search", {"query": "a", "limit": 1})
ANSWERS = [{"reasoning": f"I know {city}.", "answer": city} for city in ("Paris", "Rome")]
OFFLINE = {"DSPY_BRIDGE_LM": "offline/echo"}
TYPED = "past: history, picture: image, when: date | None, question -> answer, snippet: code, notes: list[str]"
PICTURE = {"base64": "iVBORw0KGgo=", "mime": "image/png"}
BY_REWARD = {"reward": {"field": "answer", "equals": "x"}, "n": 2}


def create(peer: Any, **program: Any) -> None:
    reply = peer.call("create_program", {"id": "chat", "signature": SIGNATURE, **program})
    assert reply["success"], reply


def run(peer: Any, question: str, stream: bool = False, args: Any = None, **inputs: Any) -> Any:
    """The result of a run."""
    asked = {"program_id": "chat", "inputs": {"question": question, **inputs}, **(args or {})}
    peer.request("execute_program", asked, stream=stream)
    while "success" not in (frame := peer.receive()):
        if "tool_call" in frame:
            call = frame["tool_call"]
            found = search(**call["args"])
            peer.send({"tool_result": {"call_id": call["call_id"], "success": True, "result": found}})
        else:
            assert frame["stream"].get("field") != "past", "it is no text that an LM writes"
    assert frame["success"], frame
    return frame["result"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["predict", "chain_of_thought", "best_of_n"])
def test_the_next_prompt_is_that_of_plain_dspy(start_lm: Any, kind: str, adapter: str, stream: bool) -> None:
    answers = [
        written(adapter, **(fields if kind == "chain_of_thought" else {"answer": fields["answer"]}))
        for fields in ANSWERS
    ]
    server = start_lm(script(*answers))
    plain = (dspy.ChainOfThought if kind == "chain_of_thought" else dspy.Predict)(SIGNATURE)
    with dspy.context(lm=dspy.LM("openai/stub", **server.options()), adapter=ADAPTERS[adapter]()):
        first = plain(question="Where?", past=dspy.History(messages=[]))
        plain(question="And?", past=dspy.History(messages=[{"question": "Where?", **first}]))
    expected = [request["messages"] for request in server.requests]

    server.serve(script(*answers))
    options = {"n": 1, "reward": {"field": "answer", "equals": "Paris"}} if kind == "best_of_n" else {}
    with shared_peer() as peer:
        lm = {"model": "openai/stub", **server.options()}
        create(peer, program_type=kind, adapter=adapter, lm=lm, options=options)
        first = run(peer, "Where?", stream)
        second = run(peer, "And?", stream, past=first["past"])
    assert [request["messages"] for request in server.requests] == expected and len(expected) == 2
    turns = [{"question": "Where?", **first}, {"question": "And?", **second}]
    assert second["past"] == [{name: value for name, value in turn.items() if name != "past"} for turn in turns]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.agents
def test_so_is_that_of_an_agent(start_lm: Any, react: str, stream: bool) -> None:
    """Its conversation may have any name, too. By trajectory DSPy has none; it is given what was done and answered."""
    last = {"next_thought": "t", "next_tool_name": "finish", "next_tool_args": {}, "reasoning": "t", "answer": "Paris"}
    steps = [
        chat(next_thought="t", next_tool_name="search", next_tool_args=json.dumps(SEARCH[1])),
        chat(next_thought="t", next_tool_name="finish", next_tool_args="{}"),
        chat(reasoning="t", answer="Paris"),
    ]
    server = start_lm(script(*steps * 2))
    trajectory: dict[str, Any] = {"thought_0": "t", "tool_name_0": "search", "tool_args_0": SEARCH[1]}
    with dspy.context(lm=dspy.LM("openai/stub", **server.options()), adapter=dspy.ChatAdapter()):
        if react == "v2":
            agent = dspy.ReActV2("question -> answer", tools=[search])
            past = agent(question="Where?").history
        else:
            agent = dspy.ReAct("history: dspy.History, question -> answer", tools=[search])
            agent(question="Where?", history=dspy.History(messages=[]))
            told = {**trajectory, "observation_0": search(**SEARCH[1]), "answer": "Paris"}
            text = dspy.ChatAdapter().format_user_message_content(dspy.Signature(f"{', '.join(told)} -> x"), told)
            past = dspy.History(messages=[{"question": "Where?", "trajectory": text, **last}])
        agent(question="And?", history=past)
    expected = [request["messages"] for request in server.requests]

    server.serve(script(*steps * 2))
    with shared_peer(env=env()) as peer:
        lm = {"model": "openai/stub", **server.options()}
        create(peer, program_type="react", tools=[TOOL], adapter="chat", lm=lm)
        first = run(peer, "Where?", stream)
        second = run(peer, "And?", stream, past=first["past"])
        reply = peer.call(
            "create_program", {"id": "x", "signature": "past: history, q -> past", "program_type": "react"}
        )
        assert "past" in reply["error"] and reply["error_type"] == "invalid_args"
    # By trajectory the names of all inputs are in the instructions of DSPy's own.
    of, half = (0 if react == "v2" else 1), len(expected) // 2
    sent = [request["messages"][of:] for request in server.requests]
    assert sent[half:] == [messages[of:] for messages in expected[half:]]
    assert second["past"][: len(first["past"])] == first["past"] and "history" not in second
    assert [turn.get("question") for turn in second["past"]] == ["Where?", None, "And?", None]


@pytest.mark.agents
def test_values_of_all_types_go_in_again(tmp_path: Any) -> None:
    """As the client wrote them: what a path names is read again, and is not in the reply."""
    (tmp_path / "cat.png").write_bytes(b"\x89PNG")
    kinds: dict[str, dict[str, Any]] = {
        "predict": {},
        "chain_of_thought": {"tools": [TOOL]},
        "react": {"tools": [TOOL]},
        "best_of_n": {"options": BY_REWARD},
        "refine": {"tools": [TOOL], "options": {**BY_REWARD, "module": "react"}},
    }
    with shared_peer(env={**OFFLINE, **env(), "DSPY_BRIDGE_FILES_DIR": str(tmp_path)}) as peer:
        for kind, more in kinds.items():
            create(peer, signature=TYPED, program_type=kind, **more)
            past = None
            for number, picture in enumerate((PICTURE, {"path": "cat.png"}, "https://example.org/cat.png")):
                given, past = past, run(peer, f"q{number}", picture=picture, when="2026-03-01", past=past)["past"]
                new = past[len(given or ()) :]
                assert past[: len(given or ())] == (given or [])
                assert new[0].items() >= {"picture": picture, "when": "2026-03-01", "question": f"q{number}"}.items()
                assert new[-1].keys() >= {"answer", "snippet", "notes"}, kind
                assert new[-1]["snippet"].startswith("echo: ")


@pytest.mark.parametrize("native", [True, False], ids=["native", "text"])
def test_an_lm_sees_what_its_tools_gave(start_lm: Any, native: bool) -> None:
    name, args = SEARCH
    asks = (
        tool_calls((name, json.dumps(args)))
        if native
        else chat(answer="?", tool_calls=json.dumps([{"name": name, "args": args}]))
    )
    server = start_lm(script(asks, chat(answer="Paris", tool_calls="[]")))
    lm = {"model": "openai/stub", "supports": ["function_calling"], **server.options()}
    with shared_peer() as peer:
        create(peer, tools=[TOOL], lm=lm, adapter={"name": "chat", "native_tools": native})
        first = run(peer, "Where?")
        called = {"name": name, "args": args, "result": search(**args)}
        assert first["past"][0]["tool_calls"] == [called] and ("answer" in first["past"][0]) is not native
        run(peer, "And?", past=run(peer, "Where?", past=first["past"])["past"])
        reply = peer.call(
            "execute_program", {"program_id": "chat", "inputs": {"question": "", "past": [{"tool_calls": 5}]}}
        )
        assert reply["error"].startswith("inputs.past: turn[0].tool_calls: Input should be a valid list")
    told = [message for message in server.requests[1]["messages"] if "text of a document" in str(message)]
    assert [message["role"] for message in told] == ["tool" if native else "user"]


def test_where_it_is_and_where_not(start_lm: Any) -> None:
    """In each result of a batch; of several answers it has the first. It is no score's, and no other program type's."""
    with shared_peer(env=OFFLINE) as peer:
        create(peer)
        reply = peer.call("execute_program", {"program_id": "chat", "inputs": [{"question": q} for q in "ab"]})
        assert [item["result"]["past"][0]["question"] for item in reply["result"]["results"]] == ["a", "b"]
        asked = {"inputs": [{"question": "a"}], "expected": [{"answer": "echo: a"}]}
        reply = peer.call(
            "execute_program", {"program_id": "chat", **asked, "metric": {"field": "answer", "match": "f1"}}
        )
        assert reply["result"]["score"] == 1
        wrong = {"program_id": "chat", **asked, "metric": {"field": "past", "match": "f1"}}
        assert peer.call("execute_program", wrong)["error"] == "metric.field: expected one of answer"
        several = run(peer, "a", args={"config": {"n": 2}}, past=[])
        assert several["past"] == [{"question": "a", "answer": "echo: a"}]
        assert several["completions"] == [{"answer": "echo: a"}] * 2
        create(peer, program_type="multi_chain_comparison", options={"m": 1})
        compared = run(peer, "a", completions=[{"reasoning": "r", "answer": "b"}])
        assert compared.keys() == {"rationale", "answer"}
        create(peer, signature="question -> answer")
        assert run(peer, "a") == {"answer": "echo: a"}
        create(peer, signature="past: list[history], question -> answer")
        assert run(peer, "a", past=[]).keys() == {"answer"}


def test_one_that_fits_no_frame_is_the_runs_error() -> None:
    with shared_peer("--max-frame-bytes", "200000", env=OFFLINE) as peer:
        create(peer)
        reply, _ = execute(peer, {"program_id": "chat", "inputs": {"question": "x" * 90_000}}, {})
        assert reply["error_type"] == "frame_too_large"
        assert run(peer, "a")["answer"] == "echo: a"
