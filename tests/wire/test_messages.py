"""messages: every payload is one message or one error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peer import frame, vector_payload, vectors

from dspy_bridge.wire import messages
from dspy_bridge.wire.messages import Cancel, NotAMessage, NotJSON, Request

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
    kind = "invalid_json" if isinstance(caught.value, NotJSON) else "invalid_request"
    return kind, caught.value.id, str(caught.value)


@pytest.mark.parametrize("vector", vectors("requests"), ids=lambda v: v["name"])
def test_good_requests(vector: dict[str, Any]) -> None:
    request = messages.decode(json.dumps(vector["payload"]).encode())
    assert isinstance(request, Request)
    assert (request.id, request.command, request.args) == (vector["id"], vector["command"], vector["args"])


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
        payload = messages.encode_failure(said["id"], failure)
    assert payload.decode() == vector["payload"]


@pytest.mark.parametrize("vector", vectors("interim"), ids=lambda v: v["name"])
def test_what_comes_before_a_reply_is_written_as_the_vectors_have_it(vector: dict[str, Any]) -> None:
    if "stream" in vector:
        payload = messages.encode_stream(vector["id"], vector["stream"])
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


@given(st.integers(0, 80), st.binary(min_size=1, max_size=4))
def test_a_damaged_request_is_a_message_or_an_error(at: int, junk: bytes) -> None:
    good = b'{"id":12,"command":"ping","args":{"a":[1,2.5,"x"]},"timeout_ms":5,"meta":true}'
    try:
        messages.decode(good[:at] + junk + good[at + len(junk) :])
    except messages.MessageError as error:
        assert error.id in (None, 12) or at in range(5, 12)


def test_timeouts_flags_and_cancels_are_read() -> None:
    request = messages.decode(b'{"id":1,"command":"x","timeout_ms":12.5,"stream":true,"meta":true}')
    assert isinstance(request, Request)
    assert (request.args, request.timeout_ms, request.stream, request.meta) == ({}, 12.5, True, True)
    cancel = messages.decode(b'{"cancel":"a"}')
    assert isinstance(cancel, Cancel) and cancel.id == "a"
    with pytest.raises(NotAMessage, match="cancel"):
        messages.decode(b'{"cancel":null}')


@pytest.mark.parametrize("vector", vectors("traceparents"), ids=lambda v: v["name"])
@pytest.mark.parametrize("more", [{}, {"args": {}, "timeout_ms": 5, "meta": True}], ids=["alone", "beside others"])
def test_a_trace_is_read_or_refused_under_the_requests_id(vector: dict[str, Any], more: dict[str, Any]) -> None:
    payload = json.dumps({"id": 7, "command": "x", **more, "traceparent": vector["value"]}).encode()
    if vector["valid"]:
        request = messages.decode(payload)
        assert isinstance(request, Request) and request.traceparent == vector["value"]
    else:
        kind, id, text = reply_error(payload)
        assert (kind, id) == ("invalid_request", 7) and text.startswith("traceparent: expected a W3C trace context")


@pytest.mark.parametrize("more", [{}, {"traceparent": None}, {"timestamp": "x", "meta": False}])
def test_without_a_trace_there_is_none(more: dict[str, Any]) -> None:
    request = messages.decode(json.dumps({"id": 7, "command": "x", **more}).encode())
    assert isinstance(request, Request) and request.traceparent is None


def test_a_ping_with_a_trace_takes_the_long_way() -> None:
    trace = b'"traceparent":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01","timestamp"'
    payload = (QUICK % 12).replace(b'"timestamp"', trace)
    assert messages.quick_pong(payload, 1.5) is None
    assert messages.quick_packet(len(payload).to_bytes(4, "big") + payload, 1.5) is None
    assert isinstance(messages.decode(payload), Request)


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


def test_a_ping_as_bridge_writes_it_is_answered_by_its_bytes() -> None:
    for id in (0, 7, 10**17):
        reply = messages.quick_pong(QUICK % id, 12.5)
        assert reply is not None and reply == messages.encode_result(id, messages.pong(12.5))
        wanted = {"id": id, "success": True, "result": {"status": "ok", "timestamp": 12.5}}
        assert json.loads(reply) == wanted and reply.startswith(b'{"id":')


@pytest.mark.parametrize("digits", [1, 17, 18, 19, 20, 21, 300])
@pytest.mark.parametrize("first", ["1", "9", "-1"])
def test_an_id_of_any_length_is_exact_by_each_way(digits: int, first: str) -> None:
    """The short ways take ids of up to 18 digits, which fit a machine word as they do; all others go the long way."""
    id = int(first + "8" * (digits - 1))
    payload = QUICK % id
    by_bytes, by_packet = messages.quick_pong(payload, 1.5), messages.quick_packet(frame(payload), 1.5)
    short = digits <= 18 and id > 0
    assert (by_bytes is not None, by_packet is not None) == (short, short)
    request = messages.decode(payload)
    assert isinstance(request, Request) and request.id == id
    pong = messages.encode_result(request.id, messages.pong(1.5))
    assert json.loads(pong)["id"] == id
    assert not short or (by_bytes, by_packet) == (pong, frame(pong))


@given(st.integers(0, 90), st.binary(min_size=1, max_size=3))
def test_what_the_short_way_answers_the_long_way_takes_as_a_ping_with_that_id(at: int, junk: bytes) -> None:
    good = QUICK % 12
    payload = good[:at] + junk + good[at + len(junk) :]
    reply = messages.quick_pong(payload, 1.5)
    if reply is not None:
        request = messages.decode(payload)
        assert isinstance(request, Request)
        assert (request.command, request.args, request.meta) == ("ping", {}, False)
        assert json.loads(reply)["id"] == request.id


def test_a_run_of_digits_in_a_text_stays_text() -> None:
    request = messages.decode(b'{"id":1,"command":"x","args":{"n":"' + b"7" * 50 + b'","x":0.1234567890123456789}}')
    assert isinstance(request, Request)
    assert request.args == {"n": "7" * 50, "x": 0.1234567890123456789}


@pytest.mark.parametrize(
    "unit", [b"1" * 4300 + b" ", b"9" * 100 + b",", b"1 ", b'"id":', b"{", b'"', b" ", b"-", b"\\", b"\xff"]
)
@pytest.mark.parametrize("start", [b"", b'{"id":7,"args":', b'{"id":', b'{"id":"'])
def test_what_is_no_json_is_refused_in_linear_time(start: bytes, unit: bytes) -> None:
    """16 MB of digit runs took a search for integers that are too long 3 minutes: this test's timeout."""
    payload = start + unit * (16_000_000 // len(unit)) + b"!"
    with pytest.raises(NotJSON, match="expected JSON"):
        messages.decode(payload)
