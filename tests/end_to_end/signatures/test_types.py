"""Types over real pipes: what an LM is shown, what is returned, and errors of invalid ones."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import lm_env
from lm_server import written
from peer import Peer
from shared_peers import shared_peer

PERSON = {
    "type": "object",
    "title": "Person",
    "properties": {
        "first-name": {"type": "string", "description": "the given name"},
        "class": {"enum": ["good", "bad"]},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}},
        "nick": {"type": "string"},
        "age": {"type": "integer", "default": 18, "minimum": 0},
    },
    "required": ["first-name", "class"],
    "$defs": {"Pet": {"type": "object", "properties": {"_kind": {"type": "string", "description": "cat or dog"}}}},
}
ADA = {"first-name": "Ada", "class": "good", "pets": [{"_kind": "cat"}]}
PNG = base64.b64encode(b"\x89PNG and so on").decode()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    """A peer for tests that leave only their own programs behind."""
    with Peer(env={"DSPY_BRIDGE_LM": "offline/echo"}) as one:
        yield one


def create(peer: Peer, inputs: dict[str, Any], outputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    sides = {
        side: [{"name": name, "type": kind} for name, kind in fields.items()]
        for side, fields in (("inputs", inputs), ("outputs", outputs))
    }
    return peer.call("create_program", {"id": "p", "signature": sides, **more})


def execute(peer: Peer, **inputs: Any) -> dict[str, Any]:
    return peer.call("execute_program", {"program_id": "p", "inputs": inputs})


def prompt_of(request: dict[str, Any]) -> str:
    contents = [message["content"] for message in request["messages"]]
    return "\n".join(
        part if isinstance(part, str) else "".join(one.get("text", "") for one in part) for part in contents
    )


@pytest.mark.parametrize("adapter", ["chat", "json", "xml"])
def test_an_lm_is_told_the_schema_and_its_answer_comes_back_as_plain_json(start_lm: Any, adapter: str) -> None:
    """Names, descriptions and enums are the schema's; absent values stay absent unless they have a default."""
    server = start_lm(written(adapter, who={**ADA, "nick": None}))
    with shared_peer(env=lm_env(server)) as peer:
        assert create(peer, {"about": PERSON}, {"who": PERSON}, adapter=adapter)["success"]
        assert execute(peer, about=ADA)["result"] == {"who": {**ADA, "age": 18}}
    (request,) = server.requests
    prompt = prompt_of(request)
    for named in ("first-name", "the given name", '"good"', '"_kind"', "cat or dog", "Person"):
        assert named in prompt, prompt
    assert json.dumps({**ADA, "age": 18}) in prompt, "the input as JSON, by the schema's names"
    assert "$ref" not in prompt and "$defs" not in prompt


@pytest.mark.parametrize("adapter", ["chat", "json", "xml"])
def test_the_echo_lm_answers_any_schema(peer: Peer, adapter: str) -> None:
    outputs = {
        "who": PERSON,
        "n": {"type": "integer", "minimum": 5},
        "low": {"type": "number", "exclusiveMaximum": -3},
        "tag": {"type": "string", "minLength": 12, "maxLength": 14},
        "code": {"type": "string", "pattern": "^[A-Z]+$", "examples": ["ABC"]},
        "day": {"type": "string", "format": "date"},
        "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": ["null", "string"]}]},
        "map": {"type": "object", "additionalProperties": {"type": "boolean"}},
        "none": {"type": "object", "additionalProperties": False},
        "either": {"anyOf": [{"type": "array", "items": {}}, {"type": "null"}]},
    }
    assert create(peer, {"q": "str"}, outputs, adapter=adapter)["success"]
    reply = execute(peer, q="x")
    assert reply["success"], reply
    result = reply["result"]
    assert result["who"]["class"] == "good" and result["day"] == "2026-01-01" and result["code"] == "ABC"
    assert list(result["map"].values()) == [True] and result["n"] >= 5 and result["none"] == {}


def parts_of(request: dict[str, Any]) -> list[dict[str, Any]]:
    content = request["messages"][-1]["content"]
    return [part for part in content if part["type"] != "text"]


@pytest.mark.litellm
@pytest.mark.parametrize("adapter", ["chat", "json", "xml"])
def test_media_arrive_at_the_lm_as_parts_of_their_own(start_lm: Any, adapter: str) -> None:
    server = start_lm(written(adapter, answer="ok"))
    kinds = {"url": "image", "pics": "list[image]", "sound": "audio", "paper": "file", "no": "Optional[image]"}
    with shared_peer(env=lm_env(server)) as peer:
        assert create(peer, kinds, {"answer": "str"}, adapter=adapter)["success"]
        reply = execute(
            peer,
            url="https://example.org/a.png",
            pics=[{"base64": PNG, "mime": "image/png"}, f"data:image/gif;base64,{PNG}"],
            sound={"base64": PNG, "mime": "audio/wav"},
            paper={"base64": PNG, "mime": "application/pdf", "filename": "a.pdf"},
        )
    assert reply["success"], reply
    parts = parts_of(server.requests[0])
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert urls == ["https://example.org/a.png", f"data:image/png;base64,{PNG}", f"data:image/gif;base64,{PNG}"]
    assert [part["input_audio"] for part in parts if part["type"] == "input_audio"] == [{"data": PNG, "format": "wav"}]
    (paper,) = (part["file"] for part in parts if part["type"] == "file")
    assert paper["file_data"] == f"data:application/pdf;base64,{PNG}"


def test_patterns_and_texts_made_to_take_long_stop_nobody_else() -> None:
    """700 spaces in a pattern stopped all pings for minutes, and these strings all deadlines for half a minute."""
    patterns = ["{" + " " * 700, "(((a{99}){99}){99})", "(?i)" + r"\PL" * 300, "a{" + "9" * 900 + "}", "(?" * 500]
    slow = {"type": "array", "items": {"type": "string", "pattern": "[ab]*a[ab]{500}c"}}
    with shared_peer(env={"DSPY_BRIDGE_LM": "offline/echo"}) as peer:
        assert create(peer, {"texts": slow}, {"a": "str"})["success"]
        for pattern in patterns:
            signature = {"inputs": [], "outputs": [{"name": "a", "type": {"type": "string", "pattern": pattern}}]}
            made = peer.request("create_program", {"id": "x", "signature": signature})
            pinged = peer.request("ping")
            replies = {reply["id"]: reply for reply in (peer.receive(10), peer.receive(10))}
            assert replies[pinged]["success"] and replies[made]["error_type"] == "invalid_args"
        texts = ["ab" + "".join(random.Random(1).choices("ab", k=10_000))] * 600
        ids = [
            peer.request("execute_program", {"program_id": "p", "inputs": {"texts": texts}}),
            peer.request("execute_program", {"program_id": "p", "inputs": {"texts": []}}, timeout_ms=5000),
            peer.request("ping"),
        ]
        replies = {reply["id"]: reply for reply in (peer.receive(10) for _ in ids)}
        assert (
            replies[ids[0]]["error_type"] == "invalid_args" and "too long for its pattern" in replies[ids[0]]["error"]
        )
        assert replies[ids[1]]["success"] and replies[ids[2]]["success"]
