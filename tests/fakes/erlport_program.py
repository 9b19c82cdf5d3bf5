"""A program that runs Python through ErlPort, without Erlang: `python erlport_program.py SCENARIO`.

Each scenario, a function that takes nothing, is a process of its own, as DSPy is set up once per process, and raises if
what it says is not so. What it reads is as Erlang would receive it. `tests/root/test_erlport.py` runs them all.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import erlport.erlang
from erlport.erlterms import Opaque, decode, encode
from lm_server import LMServer, chat

from dspy_bridge import erlport as bridge

PID = Opaque(Opaque.PID)
PATIENCE = 60.0


def call(command: Any, args: Any = None) -> dict[Any, Any]:
    """`python:call(…, call, [command, args])`."""
    return encode(bridge.call(decode(command), decode({} if args is None else args)))


def submit(ref: Any, command: Any, args: Any) -> None:
    """`python:call(…, submit, [pid, ref, command, args])`."""
    assert encode(bridge.submit(decode(PID), decode(ref), decode(command), decode(args))) == "ok"


def received(count: int) -> dict[Any, dict[Any, Any]]:
    """The next messages by their reference."""
    replies = {}
    for _ in range(count):
        pid, (tag, ref, reply) = erlport.erlang.mailbox.get(timeout=PATIENCE)
        assert pid == PID and tag == "dspy_reply" and ref not in replies
        replies[ref] = reply
    assert erlport.erlang.mailbox.empty()
    return replies


def lm(server: LMServer) -> dict[str, Any]:
    """The argument `lm` that leads there."""
    options = server.options()
    return {
        "model": b"openai/stub-model",
        "api_base": options["api_base"].encode(),
        "api_key": options["api_key"].encode(),
        "cache": "false",
        "num_retries": 0,
    }


def create(server: LMServer | None = None, **args: Any) -> None:
    """A program `qa`."""
    extra = {} if server is None else {"lm": lm(server)}
    args = {"id": b"qa", "signature": b"question -> answer", **extra, **args}
    assert call(b"create_program", args) == {
        b"success": "true",
        b"result": {b"program_id": b"qa", b"status": b"created"},
    }


def execute_args(number: int = 0) -> dict[str, Any]:
    return {"program_id": b"qa", "inputs": {"question": b"q%d" % number}}


def six_commands() -> None:
    """What the port's users know, in Erlang's terms."""
    result: Any = call(b"ping")[b"result"]
    assert result[b"status"] == b"ok" and type(result[b"timestamp"]) is float
    fields = {
        "inputs": [{"name": "question"}],
        "outputs": [{b"name": b"answer", "type": "string", "description": "nil"}],
    }
    create(signature=fields)
    done = {b"success": "true", b"result": {b"answer": b"echo: gr\xc3\xbc\xc3\x9fe"}}
    inputs = {"question": "grüße".encode()}
    assert call("execute_program", {"program_id": "qa", "inputs": inputs}) == done
    many: Any = call(b"execute_program", {"program_id": b"qa", "inputs": [inputs, {"question": 7}, 8]})
    first, second, third = many[b"result"][b"results"]
    assert first == done and second[b"success"] == "true"
    assert third[b"success"] == "false" and third[b"error_type"] == b"invalid_args"
    listed: Any = call(b"list_programs", {"details": "true"})
    (detail,) = listed[b"result"][b"details"]
    assert listed[b"result"][b"programs"] == [b"qa"] and detail[b"execution_count"] == 3
    create()
    replaced: Any = call(b"list_programs", {"details": "true"})
    (detail,) = replaced[b"result"][b"details"]
    assert detail[b"last_executed"] == "nil", "null is nil, not undefined"
    stats: Any = call(b"get_stats")
    assert stats[b"result"][b"programs_count"] == 1 and stats[b"result"][b"commands"][b"ping"][b"count"] == 1
    assert call(b"cleanup") == {b"success": "true", b"result": {b"status": b"cleaned", b"programs_removed": 1}}
    assert call(b"execute_program", execute_args()) == {
        b"success": "false", b"error": b"Program not found: qa", b"error_type": b"program_not_found",
    }  # fmt: skip


def a_call_holds_up_its_caller_only() -> None:
    """While the main thread waits in `call`, submitted commands and other threads' calls are answered."""
    server = LMServer(lambda _request: chat(answer="Paris"))
    create(server)
    assert call(b"execute_program", execute_args())[b"success"] == "true"
    assert server.arrived.acquire(timeout=PATIENCE)
    server.gate.clear()
    seen: list[Any] = []

    def other_thread() -> None:
        try:
            assert server.arrived.acquire(timeout=PATIENCE), "the main thread's run has reached the LM"
            seen.append(call(b"ping")[b"success"])
            submit(b"other", b"execute_program", {**execute_args(), "lm": {"model": b"offline/echo"}})
            seen.append(received(1)[b"other"][b"result"])
        finally:
            server.gate.set()

    thread = threading.Thread(target=other_thread)
    thread.start()
    assert call(b"execute_program", execute_args(1))[b"result"] == {b"answer": b"Paris"}
    thread.join()
    assert seen == ["true", {b"answer": b"echo: q0"}]
    server.stop()


def a_cast_that_fails_is_logged() -> None:
    """With its traceback; the next ones are made."""
    no_term = threading.Lock()  # Erlang has no such reference: what went wrong is ErlPort's to say
    assert encode(bridge.submit(decode(PID), no_term, b"ping", {})) == "ok"
    submit(2, b"ping", {})
    assert received(1)[2][b"success"] == "true"


def the_end_waits_for_no_lm() -> None:
    """ErlPort's main returns when Erlang is gone; what still runs keeps no process alive."""
    server = LMServer(lambda _request: chat(answer="Paris"))
    create(server)
    server.gate.clear()
    submit(1, b"execute_program", execute_args())
    assert server.arrived.acquire(timeout=PATIENCE)


def the_end_waits_for_no_thread_of_ours() -> None:
    """That of a sync `forward`, that of a step that an async module sends to a thread, that which loads programs."""
    import never_returns

    for number, module in enumerate(("Sync", "Threaded")):
        create(program_type=f"never_returns:{module}".encode())
        submit(number, b"execute_program", execute_args())
        assert never_returns.entered.acquire(timeout=PATIENCE)
    args = {"id": b"other", "signature": b"question -> answer", "program_type": b"never_returns:Constructor"}
    submit(b"create", b"create_program", args)
    assert never_returns.entered.acquire(timeout=PATIENCE)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
