"""Real LM calls: DSPy's own client against a loopback server that speaks the OpenAI chat API."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sqlite3
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import lm_env
from lm_server import chat, script
from peer import PATIENCE, Peer
from shared_peers import shared_peer

QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"program_id": "qa", "inputs": {"question": "What is the capital of France?"}}
KEY = "sk-test-0123456789"
# What an LM is asked with for `max_tokens`.
MAX_TOKENS = "max_completion_tokens"


def error(status: int, message: str, code: str | None = None) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "error", "code": code}}


def test_an_answer_of_an_lm(start_lm: Any) -> None:
    server = start_lm()
    with Peer(env=lm_env(server, temperature=0.3)) as peer:
        peer.call("create_program", {**QA, "signature": {
            "inputs": [{"name": "question", "desc": "about the world"}],
            "outputs": [{"name": "answer", "description": "one word"}],
            "instructions": "Answer like a geographer.",
        }})  # fmt: skip
        assert peer.call("execute_program", ASK)["result"] == {"answer": "Paris"}
    (request,) = server.requests
    prompt = str(request["messages"])
    assert request["model"] == "stub-model" and request["temperature"] == 0.3
    assert all(text in prompt for text in ("about the world", "one word", "Answer like a geographer.", "capital of"))
    assert server.authorizations == [f"Bearer {KEY}"]


def test_lm_adapter_and_config_of_a_program_and_of_a_call(start_lm: Any) -> None:
    default, own = start_lm(), start_lm('{"answer": "Rome"}')
    with shared_peer(env=lm_env(default)) as peer:
        lm = {"model": "openai/own", **own.options(max_tokens=77)}
        peer.call("create_program", {**QA, "lm": lm, "adapter": "json", "config": {"temperature": 0.5}})
        assert peer.call("execute_program", ASK)["result"] == {"answer": "Rome"}
        assert peer.call("execute_program", {**ASK, "config": {"temperature": 0.9}})["success"]
        other = {"model": "openai/third", **own.options()}
        assert peer.call("execute_program", {**ASK, "lm": other})["success"]
        assert peer.call("execute_program", {**ASK, "lm": {}})["error_type"] == "invalid_args"
    first, second, third = own.requests
    assert (first["model"], first[MAX_TOKENS], first["temperature"]) == ("own", 77, 0.5)
    assert second["temperature"] == 0.9
    assert (third["model"], third["temperature"]) == ("third", 0.5)
    assert "JSON" in str(first["messages"]) and default.requests == []


def test_with_two_steps_another_lm_reads_the_answer(start_lm: Any) -> None:
    server = start_lm(lambda request: "Paris, I think." if request["model"] == "large" else chat(answer="Paris"))
    large = {"model": "openai/large", **server.options()}
    small = {"model": "openai/small", **server.options(temperature=0.25)}
    adapter = {"name": "two_step", "extraction_model": small}
    with shared_peer() as peer:
        peer.call("create_program", {**QA, "lm": large, "adapter": adapter, "config": {"temperature": 0.5}})
        reply = peer.call("execute_program", ASK, meta=True)
        assert reply["result"] == {"answer": "Paris"}
        assert reply["meta"]["lm_calls"] == 2
        assert sorted(reply["meta"]["lm_usage"]) == ["openai/large", "openai/small"]
    assert [request["temperature"] for request in server.requests] == [0.5, 0.25]
    assert "Paris, I think." in server.requests[1]["messages"][-1]["content"]


def test_a_key_that_nobody_gave_is_the_environments(start_lm: Any) -> None:
    """By provider, as DSPy looks for it, for the peer's own LM; one that was given wins."""
    server = start_lm()
    options = {name: value for name, value in server.options().items() if name != "api_key"}
    env = {"DSPY_BRIDGE_LM": "openai/x", "DSPY_BRIDGE_LM_OPTIONS": json.dumps(options)}
    with Peer(env={**env, "OPENAI_API_KEY": "sk-from-environment-1"}) as peer:
        peer.call("create_program", QA)
        assert peer.call("execute_program", ASK)["success"]
        assert peer.call("execute_program", {**ASK, "lm": {"model": "openai/x", **server.options()}})["success"]
    assert server.authorizations == ["Bearer sk-from-environment-1", f"Bearer {KEY}"]


def test_an_address_of_a_request_does_not_get_the_environments_key(start_lm: Any) -> None:
    server = start_lm()
    lm = {"model": "openai/x", "api_base": server.url, "cache": False}
    with Peer(env={"OPENAI_API_KEY": "sk-from-environment-1"}) as peer:
        peer.call("create_program", {**QA, "lm": lm})
        assert peer.call("execute_program", ASK)["success"]
    assert server.authorizations == ["Bearer none"]


@pytest.mark.parametrize(
    ("answer", "error_type", "retryable"),
    [
        (error(429, "slow down"), "lm_error", True),
        (error(500, "oops"), "lm_error", True),
        (error(503, "busy"), "lm_error", True),
        (error(401, f"Incorrect API key provided: {KEY}"), "lm_error", False),
        (error(400, "bad request"), "lm_error", False),
        (error(404, "no such model", "model_not_found"), "lm_error", False),
        (error(402, "no money", "insufficient_quota"), "lm_error", False),
        (error(400, "too long", "context_length_exceeded"), "lm_error", False),
        ("no such format", "output_invalid", None),
        (chat(answer="many"), "output_invalid", None),
        (chat(wrong="5"), "output_invalid", None),
        (chat(answer="1.7"), "output_invalid", None),
        ("", "output_invalid", None),
    ],
)
def test_faults_of_the_lm_have_their_types(start_lm: Any, answer: Any, error_type: str, retryable: Any) -> None:
    # No shared peer may log the key.
    with shared_peer(env=lm_env(start_lm(answer))) as peer:
        fields = {"inputs": [{"name": "question"}], "outputs": [{"name": "answer", "type": "probability"}]}
        peer.call("create_program", {**QA, "signature": fields})
        reply = peer.call("execute_program", ASK)
        assert (reply["success"], reply["error_type"]) == (False, error_type), reply
        assert reply.get("retryable") == retryable
        assert "\n" not in reply["error"] and KEY not in reply["error"]
        assert peer.call("ping")["success"]


def test_an_answer_that_is_nested_too_deeply_to_be_read_is_the_lms_fault(start_lm: Any) -> None:
    """Whatever settings were given, and whatever DSPy's reader of JSON raises."""
    xml = "<answer>" + "<b>" * 20_000 + "</b>" * 20_000 + "</answer>"
    answers = ["{" * 500, '{"answer":' * 50_000, "[" * 50_000, xml]
    server = start_lm(script(*[answer for answer in answers for _ in range(2)]))
    with shared_peer(env=lm_env(server)) as peer:
        peer.call("create_program", {**QA, "adapter": "json"})
        for answer in answers:
            if answer is xml:
                peer.call("create_program", {**QA, "adapter": "xml"})
            for more in ({}, {"config": {"temperature": 0.5}}):
                reply = peer.call("execute_program", {**ASK, **more})
                assert reply["error_type"] == "output_invalid", (answer[:20], more, reply)


# With headers of one's own DSPy calls LiteLLM, whose import takes 3 s.
@pytest.mark.parametrize("headers", [{}, pytest.param({"extra_headers": {"a": "b"}}, marks=pytest.mark.slow)])
def test_whoever_an_api_base_names_shows_in_no_error_and_no_log(headers: dict[str, Any]) -> None:
    """Addresses of gateways may hold a password: so may what the way to them fails with."""
    base = "http://someone:pa55word@127.0.0.1:9/v1"
    options = json.dumps({"api_base": base, "num_retries": 0})
    env = {"DSPY_BRIDGE_LM": "openai/x", "DSPY_BRIDGE_LM_OPTIONS": options, "OPENAI_API_KEY": KEY}
    with Peer(env=env) as peer:
        peer.call("create_program", QA)
        lm = {"model": "openai/x", "num_retries": 0, "api_key": KEY, **headers}
        near = {**lm, "api_base": base.replace("pa55word", "pa66word")}
        for more in ({}, {"lm": near}, {"lm": {**lm, "api_base": "ftp://someone:pa77word@host:x/"}}):
            reply = peer.call("execute_program", {**ASK, **more})
            assert not reply["success"]
            assert not any(secret in reply["error"] for secret in ("pa55", "pa66", "pa77")), reply
        _, _, log = peer.finish()
        assert not any(secret in log for secret in ("pa55", "pa66", "pa77")), log


def test_no_lm_and_no_key_are_told_as_such() -> None:
    with Peer(env={"OPENAI_API_KEY": ""}) as peer:
        peer.call("create_program", QA)
        reply = peer.call("execute_program", ASK)
        assert reply["error_type"] == "lm_not_configured" and "DSPY_BRIDGE_LM" in reply["error"]
        reply = peer.call("execute_program", {**ASK, "lm": {"model": "openai/x"}})
        assert reply["error_type"] == "lm_not_configured" and "OPENAI_API_KEY" in reply["error"], reply


def with_files(most: int, *options: str) -> list[str]:
    """The command of a peer that may have so many files open."""
    limit = " ".join(["ulimit", *options, "-n", str(most)])
    return ["sh", "-c", f'{limit} && exec "$0" "$@"', sys.executable, "-m", "dspy_bridge"]


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(start_lm: Any) -> None:
    """So many calls run at once, more than a dspy.LM has connections (100); idle ones leave room for other LMs."""
    server = start_lm()
    server.gate.clear()
    with Peer(env=lm_env(server), command=with_files(64, "-S")) as peer:
        peer.call("create_program", QA)
        for _ in range(150):
            peer.request("execute_program", ASK)
        for _ in range(150):
            assert server.arrived.acquire(timeout=PATIENCE)
        server.gate.set()
        assert all(reply["success"] for reply in peer.receive_all(150).values())
        for number in range(25):
            lm = {"model": f"openai/m{number}", **server.options(temperature=number / 100)}
            assert peer.call("execute_program", {**ASK, "lm": lm})["success"]


def test_answers_are_cached_in_memory_only_and_only_while_wanted(start_lm: Any, tmp_path: Any) -> None:
    server = start_lm()
    home = {"HOME": str(tmp_path)}
    with Peer(env={**lm_env(server, cache=True), **home}) as peer:
        peer.call("create_program", QA)
        for _ in range(3):
            assert peer.call("execute_program", ASK)["success"]
    assert len(server.requests) == 1 and list(tmp_path.iterdir()) == []
    with Peer("--cache-entries", "0", env={**lm_env(server, cache=True), **home}) as peer:
        peer.call("create_program", QA)
        for _ in range(3):
            assert peer.call("execute_program", ASK)["success"]
    assert len(server.requests) == 4 and list(tmp_path.iterdir()) == []


class Planted:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_the_folder_of_the_disk_cache_is_not_run(start_lm: Any, tmp_path: Path) -> None:
    server = start_lm()
    folder, marker = tmp_path / "cache", tmp_path / "run"
    for planted in (False, True):
        with Peer("--disk-cache", str(folder), env=lm_env(server, cache=True)) as peer:
            peer.call("create_program", QA)
            assert peer.call("execute_program", ASK)["result"] == {"answer": "Paris"}
            peer.finish()
        if not planted:
            changed = sum(plant(shard, pickle.dumps(Planted(marker))) for shard in folder.rglob("cache.db"))
            assert changed > 0
    assert len(server.requests) == 2 and not marker.exists()


def plant(shard: Path, data: bytes) -> int:
    """Replace the values of a shard of diskcache by a pickle, its mode 4; how many there were."""
    with contextlib.closing(sqlite3.connect(shard)) as database, database:
        return database.execute("UPDATE Cache SET mode = 4, filename = NULL, value = ?", (data,)).rowcount


@pytest.mark.slow
def test_lms_that_are_given_with_calls_leave_no_connections_behind(start_lm: Any) -> None:
    """Those used last are kept for the next call; all others are closed, also in the provider."""
    server = start_lm()
    with Peer() as peer:
        peer.call("create_program", QA)
        process = psutil.Process(peer.process.pid)
        counts = []
        for round in range(3):
            for number in range(70):
                lm = {"model": "openai/x", **server.options(api_key=f"sk-own-key-{round}-{number}")}
                assert peer.call("execute_program", {**ASK, "lm": lm})["success"]
            counts.append(process.num_fds())
        # Closing is a matter of the loop's next moments.
        assert max(counts[1:]) <= counts[0] + 5, counts
