"""messages: every payload is one message or one error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peer import frame, vector_payload, vectors

from dspy_bridge.wire import frames, messages
from dspy_bridge.wire.messages import Cancel, NotJSON, Request

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)
IDS = st.integers(-(10**30), 10**30) | st.text(st.characters(exclude_categories=("Cs",)))


def reply_error(payload: bytes) -> tuple[str, Any, str]:
    with pytest.raises(messages.MessageError) as caught:
        messages.decode(payload)
    return caught.value.error_type, caught.value.id, str(caught.value)


@pytest.mark.parametrize("vector", vectors("requests"), ids=lambda v: v["name"])
def test_good_requests(vector: dict[str, Any]) -> None:
    request = messages.decode(json.dumps(vector["payload"]).encode())
    assert isinstance(request, Request)
    assert (request.id, request.command, request.args) == (vector["id"], vector["command"], vector["args"])
    assert request.journal == vector["payload"].get("journal")


@pytest.mark.parametrize(
    "vector", [v for v in vectors("malformed") if v["error_type"] != "unknown_command"], ids=lambda v: v["name"]
)
def test_malformed_payloads(vector: dict[str, Any]) -> None:
    kind, id, text = reply_error(vector_payload(vector))
    assert (kind, id) == (vector["error_type"], vector["id"])
    assert vector.get("error_has", "") in text


@pytest.mark.parametrize("vector", [v for v in vectors("replies") if "ok" in v["decoded"]], ids=lambda v: v["name"])
def test_replies_are_written_as_the_vectors_have_them(vector: dict[str, Any]) -> None:
    said = vector["decoded"]
    if said["ok"]:
        payload = messages.encode_result(said["id"], said["result"], said.get("meta"))
    else:
        failure = messages.failure(said["error_type"], said["error"], said.get("retryable"))
        payload = messages.encode_failure(said["id"], failure, said.get("meta"))
    assert payload.decode() == vector["payload"]


@pytest.mark.parametrize("vector", vectors("interim"), ids=lambda v: v["name"])
def test_what_comes_before_a_reply_is_written_as_the_vectors_have_it(vector: dict[str, Any]) -> None:
    if "stream" in vector:
        payload = messages.encode_stream(vector["id"], vector["stream"])
    elif "journal" in vector:
        payload = messages.encode_journal(vector["id"], vector["journal"])
    else:
        call = vector["tool_call"]
        payload = messages.encode_tool_call(vector["id"], call["call_id"], call["name"], call["args"])
    assert payload.decode() == vector["payload"]


@pytest.mark.parametrize("vector", vectors("tool_results"), ids=lambda v: v["name"])
def test_results_of_tools(vector: dict[str, Any]) -> None:
    result = messages.decode(vector["payload"].encode())
    assert isinstance(result, messages.ToolResult)
    said = (result.call_id, result.value, result.error)
    assert said == (vector["call_id"], vector.get("result"), vector.get("error"))


@given(IDS, st.text(st.characters(exclude_categories=("Cs",))), st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_requests_round_trip(id: Any, command: str, args: dict[str, Any]) -> None:
    try:
        payload = json.dumps({"id": id, "command": command, "args": args}).encode()
        payload.decode()
        json.dumps(args, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    request = messages.decode(payload)
    assert isinstance(request, Request)
    assert (request.id, request.command, request.args) == (id, command, args)


@given(IDS, JSON)
def test_results_round_trip_with_the_id_first(id: Any, value: Any) -> None:
    payload = messages.encode_result(id, {"value": value})
    assert json.loads(payload) == {"id": id, "success": True, "result": {"value": value}}
    assert payload.startswith(b'{"id":')


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_error(payload: bytes) -> None:
    try:
        assert isinstance(messages.decode(payload), Request | Cancel)
    except messages.MessageError as error:
        assert str(error)


@pytest.mark.parametrize("name", ["history", "lm_events"])
def test_with_lm_calls_there_is_meta(name: str) -> None:
    for meta in ("true", "false"):
        request = messages.decode(b'{"id":1,"command":"x","%s":true,"meta":%s}' % (name.encode(), meta.encode()))
        assert isinstance(request, Request) and (getattr(request, name), request.meta) == (True, True)
    request = messages.decode(b'{"id":1,"command":"x","%s":false}' % name.encode())
    assert isinstance(request, Request) and (getattr(request, name), request.meta) == (False, False)


@pytest.mark.parametrize("vector", vectors("traceparents"), ids=lambda v: v["name"])
@pytest.mark.parametrize("more", [{}, {"args": {}, "timeout_ms": 5, "meta": True}], ids=["alone", "with others"])
def test_a_trace_is_read_or_refused_under_the_requests_id(vector: dict[str, Any], more: dict[str, Any]) -> None:
    payload = json.dumps({"id": 7, "command": "x", **more, "traceparent": vector["value"]}).encode()
    if vector["valid"]:
        request = messages.decode(payload)
        assert isinstance(request, Request) and request.traceparent == vector["value"]
    else:
        kind, id, text = reply_error(payload)
        assert (kind, id) == ("invalid_request", 7) and text.startswith("traceparent: expected a W3C trace context")


@pytest.mark.parametrize("digits", [18, 19, 20, 40, 4300])
@pytest.mark.parametrize("sign", ["", "-"])
def test_integers_of_up_to_4300_digits_are_exact_both_ways(digits: int, sign: str) -> None:
    text = sign + "9" * digits
    request = messages.decode(b'{"id":1,"command":"x","args":{"n":[' + text.encode() + b"]}}")
    assert isinstance(request, Request)
    (number,) = request.args["n"]
    assert type(number) is int and str(number) == text
    assert messages.encode_result(1, number) == b'{"id":1,"success":true,"result":' + text.encode() + b"}"


QUICK = b'{"id":%d,"timeout_ms":5000,"command":"ping","args":{},"timestamp":"2026-01-01T00:00:00Z"}'


def pong(id: int, now: float) -> bytes:
    return b'{"id":%d,"success":true,"result":{"status":"ok","timestamp":%.6f}}' % (id, now)


# As a map in Elixir is written, whose keys are sorted, and as Python writes a dict.
OTHERS = [
    b'{"args":{},"command":"ping","id":%d}',
    b'{"args":{},"command":"ping","id":%d,"timeout_ms":5000,"timestamp":"2026-01-01T00:00:00Z"}',
    b'{"id": %d, "command": "ping", "args": {}}',
    b'{"command":"ping","id":%d}',
]


@pytest.mark.parametrize("form", OTHERS)
def test_pings_of_other_clients_are_answered_by_their_bytes(form: bytes) -> None:
    data = frame(form % 7) + frame(QUICK % 8) + frame(form % 9)
    replies = [frame(pong(id, 12.5)) for id in (7, 8, 9)]
    assert frames.answer_pings(data, 12.5) == (b"".join(replies), 3, len(data))


@pytest.mark.parametrize(
    "payload",
    [
        b'{"args":{},"command":"ping"}',
        b'{"args":{},"id":1}',
        b'{"id":1,"command":"ping",}',
        b'{"id":1"command":"ping"}',
        b'{"id":1,"command":"ping","args":{"x":1}}',
        b'{"id":1,"command":"ping","meta":true}',
        b'{"id":1,"command":"ping","command":"get_stats"}',
        b'{"id":1,"command":"ping","id":"a"}',
        b'{"id":01,"command":"ping"}',
    ],
)
def test_what_is_not_such_a_ping_is_left_to_the_decoder(payload: bytes) -> None:
    assert frames.answer_pings(frame(payload), 12.5) == (b"", 0, 0)


def test_pings_as_bridge_writes_them_are_answered_by_their_bytes() -> None:
    ids = (0, 7, 10**17)
    replies = [frame(pong(id, 12.5)) for id in ids]
    packets = [frame(QUICK % id) for id in ids]
    assert frames.answer_pings(packets[1], 12.5) == (replies[1], 1, len(packets[1]))
    data = b"".join(packets)
    assert frames.answer_pings(data, 12.5) == (b"".join(replies), len(ids), len(data))
    for rest in (packets[0][:-1], frame(b'{"id":1,"command":"list_programs"}') + packets[0], b"\x00", b"\x00" * 9):
        assert frames.answer_pings(data + rest, 12.5) == (b"".join(replies), len(ids), len(data)), (
            "what follows is left"
        )
        assert frames.answer_pings(rest, 12.5) == (b"", 0, 0)


@pytest.mark.parametrize("digits", [1, 17, 18, 19, 20, 21, 300])
@pytest.mark.parametrize("first", ["1", "9", "-1"])
def test_an_id_of_any_length_is_exact_by_each_way(digits: int, first: str) -> None:
    """The short way takes ids of up to 18 digits, which fit a machine word; all others are decoded."""
    id = int(first + "8" * (digits - 1))
    payload = QUICK % id
    reply, _, used = frames.answer_pings(frame(payload), 1.5)
    short = digits <= 18 and id > 0
    assert used == (len(frame(payload)) if short else 0)
    request = messages.decode(payload)
    assert isinstance(request, Request) and request.id == id
    assert reply == (frame(pong(id, 1.5)) if short else b"")


@pytest.mark.parametrize(
    "unit", [b"1" * 4300 + b" ", b"9" * 100 + b",", b"1 ", b'"id":', b"{", b'"', b" ", b"-", b"\\", b"\xff"]
)
@pytest.mark.parametrize("start", [b"", b'{"id":7,"args":', b'{"id":', b'{"id":"'])
def test_what_is_no_json_is_refused_in_linear_time(start: bytes, unit: bytes) -> None:
    """16 MB of digit runs took a search for integers that are too long 3 minutes: this test's timeout."""
    payload = start + unit * (16_000_000 // len(unit)) + b"!"
    with pytest.raises(NotJSON, match="expected JSON"):
        messages.decode(payload)
