"""The six commands over real pipes, with `offline/echo`."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import lm_env
from peer import PATIENCE, ROOT, Peer

QA = {"id": "qa", "signature": "question -> answer"}


def test_every_adapter_is_answered_in_its_own_format(echo_peer: Peer) -> None:
    signature = (
        "question: str, n: int -> text, count: int, ratio: float, yes: bool, tags: list[str], "
        "table: dict[str, int], pick: Literal['a', 'b'], maybe: Optional[int], day: date, pair: tuple[int, str]"
    )
    inputs = {"question": "<&> [[ ## x ## ]] \u0007", "n": 4}
    for adapter in ("chat", "json", "xml"):
        created = echo_peer.call("create_program", {"id": "t", "signature": signature, "adapter": adapter})
        assert created["success"], created
        reply = echo_peer.call("execute_program", {"program_id": "t", "inputs": inputs})
        result = reply["result"]
        assert result.pop("text").startswith("echo: <&>"), adapter
        assert result == {
            "count": 1,
            "ratio": 1.0,
            "yes": True,
            "tags": ["echo: tags"],
            "table": {"1": 1},
            "pick": "a",
            "maybe": 1,
            "day": "2026-01-01",
            "pair": [1, "echo: pair"],
        }, adapter
    assert echo_peer.finish() == (0, b"", ""), "nothing to complain of in the log"


def test_every_type_name_of_dspex_and_python(echo_peer: Peer) -> None:
    types = {
        "string": str, "integer": int, "float": float, "boolean": bool, "map": dict, "atom": str, "probability": float,
        "confidence_score": float, "embedding": list, "reasoning_chain": list, "str": str, "int": int, "bool": bool,
        "list[str]": list, "dict[str, int]": dict, "Literal['a', 'b']": str, "Literal[1, 2]": int,
        "Optional[float]": float, "List[int]": list, "Dict": dict, "Dict[str, float]": dict, "list": list, "dict": dict,
        "int | None": int, "Union[int, str]": int, "typing.List[str]": list, "set[int]": list, "tuple[int, ...]": list,
        "list[dict[str, list[int]]]": list, "list[string]": list, "datetime.date": str, "dict[int, list[date]]": dict,
        "dict[Literal['x'], bool]": dict, "bytes": str,
    }  # fmt: skip
    outputs = [{"name": f"f{n}", "type": type} for n, type in enumerate([*types, "any"])]
    signature = {"inputs": [{"name": "q"}], "outputs": outputs}
    assert echo_peer.call("create_program", {"id": "t", "signature": signature})["success"]
    result = echo_peer.call("execute_program", {"program_id": "t", "inputs": {"q": 1}})["result"]
    for n, (name, kind) in enumerate(types.items()):
        assert isinstance(result[f"f{n}"], kind), (name, result[f"f{n}"])
    assert 0 <= result["f6"] <= 1


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({}, "id"),
        ({"id": 5, "signature": "q -> a"}, "id"),
        ({"id": "", "signature": "q -> a"}, "id"),
        ({"id": "x"}, "signature"),
        ({"id": "x", "signature": 5}, "signature"),
        ({"id": "x", "signature": "q"}, "->"),
        ({"id": "x", "signature": "q ->"}, "signature.outputs"),
        ({"id": "x", "signature": "q -> a: nope"}, "nope"),
        ({"id": "x", "signature": "q -> a: os.system"}, "os.system"),
        ({"id": "x", "signature": "q -> a: __import__('os').system('x')"}, "signature.outputs.a"),
        ({"id": "x", "signature": "q): pass\nimport os\ndef g(x -> a"}, "signature.inputs"),
        ({"id": "x", "signature": "q -> q"}, "'q'"),
        ({"id": "x", "signature": "signature -> a"}, "'signature'"),
        ({"id": "x", "signature": "q -> " + "a, " * 300_000}, "16000 characters"),
        ({"id": "x", "signature": {"inputs": []}}, "signature.outputs"),
        ({"id": "x", "signature": {"inputs": [], "outputs": [], "instruction": "x"}}, "instruction"),
        ({"id": "x", "signature": {"inputs": [{}], "outputs": []}}, "signature.inputs[0].name"),
        ({"id": "x", "signature": {"inputs": [{"name": "q", "type": 5}], "outputs": []}}, "signature.inputs[0].type"),
        ({"id": "x", "signature": {"inputs": [{"name": "q", "typ": "int"}], "outputs": []}}, "'typ'"),
        ({"id": "x", "signature": "q -> a", "program_type": "nope"}, "program_type"),
        ({"id": "x", "signature": "reasoning -> a", "program_type": "chain_of_thought"}, "reasoning"),
        ({"id": "x", "signature": "q -> a", "adapter": "yaml"}, "adapter"),
        ({"id": "x", "signature": "q -> a", "lm": 5}, "lm"),
        ({"id": "x", "signature": "q -> a", "lm": {}}, "lm.model"),
        ({"id": "x", "signature": "q -> a", "lm": {"model": "openai/"}}, "lm"),
        ({"id": "x", "signature": "q -> a", "lm": {"model": "openai/x", "num_retries": -1}}, "num_retries"),
        ({"id": "x", "signature": "q -> a", "lm": {"model": "openai/x", "callbacks": []}}, "lm.callbacks"),
        ({"id": "x", "signature": "q -> a", "config": []}, "config"),
        ({"id": "x", "signature": "q -> a", "adaptor": "chat"}, "adaptor"),
    ],
)
def test_wrong_arguments_of_create_program_are_named(module_peer: Peer, args: dict[str, Any], named: str) -> None:
    reply = module_peer.call("create_program", args)
    assert reply["error_type"] == "invalid_args", reply
    assert named in reply["error"]
    assert module_peer.call("list_programs")["result"] == {"programs": []}


@pytest.fixture(scope="module")
def module_peer() -> Any:
    """A peer for tests that leave no programs behind."""
    with Peer(env={"DSPY_BRIDGE_LM": "offline/echo"}) as peer:
        yield peer


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({}, ["inputs.q: missing", "inputs.n: missing"]),
        ({"q": "x", "n": 1, "w": 1, "v": 2}, ["inputs.w: unknown", "inputs.v: unknown", "expected q, n"]),
        ({"q": "x", "n": "many"}, ["inputs.n"]),
        ("x", ["inputs"]),
        (None, ["inputs"]),
    ],
)
def test_wrong_inputs_are_named_before_any_lm_is_asked(echo_peer: Peer, inputs: Any, named: list[str]) -> None:
    echo_peer.call("create_program", {"id": "p", "signature": "q, n: int -> a"})
    reply = echo_peer.call("execute_program", {"program_id": "p", "inputs": inputs})
    assert reply["error_type"] == "invalid_args"
    assert all(text in reply["error"] for text in named), reply["error"]
    assert "many" not in reply["error"]


@pytest.mark.parametrize(
    ("signature", "args"),
    [
        ("question -> answer", {"inputs": {"question": [None]}}),
        ("question: image -> answer", {"inputs": {"question": "data:image/png;base64,!!"}}),
        ("question -> answer", {"config": {"temperature": 10**400}, "inputs": {"question": "?"}}),
    ],
)
def test_what_dspy_cannot_send_to_an_lm_is_named(echo_peer: Peer, signature: str, args: dict[str, Any]) -> None:
    echo_peer.call("create_program", {"id": "p", "signature": signature})
    reply = echo_peer.call("execute_program", {"program_id": "p", **args})
    assert reply["error_type"] == "invalid_args" and reply["error"].startswith(next(iter(args))), reply


def test_a_secret_at_the_end_of_a_long_error_is_not_cut_but_redacted(echo_peer: Peer) -> None:
    """Half of a secret would not be recognized; the redacted text is cut to the length of errors."""
    key = "QWERTYUIOPASDFGHJKL"
    program = {"id": "p", "signature": "q -> a", "lm": {"model": "offline/echo", "api_key": key}}
    assert echo_peer.call("create_program", program)["success"]
    for name in ("k" * 1985 + key + "zzzz", key * 100 + "z" * 4000):
        error = echo_peer.call("create_program", {name: 1})["error"]
        assert key[:6] not in error and "[redacted]" in error and len(error) <= 2000


def test_a_cleanup_of_misspelt_ids_removes_nothing(echo_peer: Peer) -> None:
    """All programs would be removed."""
    assert echo_peer.call("create_program", {"id": "p", "signature": "q -> a"})["success"]
    reply = echo_peer.call("cleanup", {"program_id": ["p"]})
    assert reply["error_type"] == "invalid_args" and "program_ids" in reply["error"]
    assert echo_peer.call("list_programs")["result"] == {"programs": ["p"]}


def test_texts_that_clients_match_on_are_exact(module_peer: Peer) -> None:
    for id in ("sk-looks-like-a-key", "two  spaces", "é" * 3000, "a\nb\r\x00\x1b[31m\u2028c", "\n" * 100_000):
        shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in id[:4095]) + "…" * (len(id) > 4095)
        reply = module_peer.call("execute_program", {"program_id": id, "inputs": {}})
        assert reply["error"] == f"Program not found: {shown}"
        assert module_peer.call(id)["error"] == f"Unknown command: {shown}"


def test_a_long_command_is_cut_in_the_error(module_peer: Peer) -> None:
    assert module_peer.call("x" * 100_000)["error"] == f"Unknown command: {'x' * 4095}…"


def test_an_argument_that_was_probably_meant_is_named(module_peer: Peer) -> None:
    create = module_peer.call("create_program", {"id": "x", "signatur": "q -> a"})
    assert create["error"].startswith("signatur: unknown argument; did you mean signature? expected id, signature, ")
    execute = module_peer.call("execute_program", {"program_id": "x", "inputs": {}, "max_concurency": 2})
    assert execute["error"].startswith("max_concurency: unknown argument; did you mean max_concurrency? expected ")
    other = module_peer.call("execute_program", {"program_id": "x", "inputs": {}, "colour": 2})
    assert other["error"].startswith("colour: unknown argument; expected program_id, inputs, ")


def test_an_execute_sees_the_create_before_it_and_a_cleanup_takes_it_along(fresh_echo_peer: Peer) -> None:
    """All in one write, so that the next one is read before any is answered."""
    ask = {"program_id": "qa", "inputs": {"question": "x"}}
    fresh_echo_peer.send(
        {"id": "before", "command": "execute_program", "args": ask},
        {"id": "create", "command": "create_program", "args": QA},
        {"id": "list", "command": "list_programs"},
        {"id": "execute", "command": "execute_program", "args": ask},
        {"id": "cleanup", "command": "cleanup"},
        {"id": "after", "command": "execute_program", "args": ask},
    )
    replies = fresh_echo_peer.receive_all(6)
    assert replies["before"]["error"] == replies["after"]["error"] == "Program not found: qa"
    assert replies["create"]["success"] and replies["execute"]["result"] == {"answer": "echo: x"}
    assert replies["list"]["result"] == {"programs": []}, "what has not been answered is not listed"
    assert replies["cleanup"]["result"] == {"status": "cleaned", "programs_removed": 1}
    assert fresh_echo_peer.call("list_programs")["result"] == {"programs": []}


def test_list_programs_tells_oldest_first_with_details(echo_peer: Peer) -> None:
    for id in ("b", "a", "c"):
        echo_peer.call("create_program", {"id": id, "signature": "q -> a", "program_type": "chain_of_thought"})
    echo_peer.call("execute_program", {"program_id": "a", "inputs": {"q": "x"}})
    assert echo_peer.call("list_programs")["result"] == {"programs": ["b", "a", "c"]}
    listed = echo_peer.call("list_programs", {"details": True, "program_ids": ["c", "a", "zz"]})["result"]
    assert listed["programs"] == ["a", "c"]
    used, unused = listed["details"]
    assert (used["id"], used["program_type"], used["signature"]) == ("a", "chain_of_thought", "q -> a")
    assert used["execution_count"] == 1 and used["last_executed"] >= used["created_at"] > 1.7e9
    assert unused["execution_count"] == 0 and unused["last_executed"] is None
    assert echo_peer.call("list_programs", {"details": "yes"})["error_type"] == "invalid_args"
    assert echo_peer.call("list_programs", {"program_ids": "a"})["error_type"] == "invalid_args"


LAZY = {**QA, "lazy": True}
ASK = {"program_id": "qa", "inputs": {"question": "x"}}
UNLOADABLE = {**LAZY, "signature": "question -> answer: nope"}


def test_a_lazy_program_is_created_before_dspy_is_imported_and_loaded_by_a_run(fresh_echo_peer: Peer) -> None:
    for id in ("other", "qa"):
        reply = fresh_echo_peer.call("create_program", {**LAZY, "id": id})
        assert reply["result"] == {"program_id": id, "status": "created"}
    assert fresh_echo_peer.call("list_programs")["result"] == {"programs": ["other", "qa"]}
    fresh_echo_peer.request("execute_program", ASK)
    fresh_echo_peer.request("execute_program", ASK)
    assert [fresh_echo_peer.receive()["result"] for _ in range(2)] == [{"answer": "echo: x"}] * 2
    details = fresh_echo_peer.call("list_programs", {"details": True})["result"]["details"]
    assert [(detail["id"], detail["loaded"]) for detail in details] == [("other", False), ("qa", True)]
    details = fresh_echo_peer.call("list_programs", {"state": True})["result"]["details"]
    assert [detail["loaded"] for detail in details] == [True, True] and all(detail["state"] for detail in details)
    assert fresh_echo_peer.call("cleanup")["result"]["programs_removed"] == 2
    assert fresh_echo_peer.call("execute_program", ASK)["error_type"] == "program_not_found"


@pytest.mark.parametrize(
    ("args", "named"),
    [({**LAZY, "lazy": 1}, "lazy"), ({**LAZY, "id": ""}, "id"), ({"id": "qa", "lazy": True}, "signature")],
)
def test_wrong_arguments_of_a_lazy_program_that_are_named_at_once(
    module_peer: Peer, args: dict[str, Any], named: str
) -> None:
    reply = module_peer.call("create_program", args)
    assert reply["error_type"] == "invalid_args" and reply["error"].startswith(f"{named}: ")


@pytest.mark.parametrize(
    ("definition", "text"),
    [
        (UNLOADABLE, "signature.outputs.answer: unknown type 'nope'"),
        ({**LAZY, "colour": 1}, "colour: unknown argument"),
        ({**LAZY, "config": 1}, "config: expected an object"),
    ],
)
def test_a_lazy_program_that_cannot_be_loaded_fails_its_runs(
    echo_peer: Peer, definition: dict[str, Any], text: str
) -> None:
    """An earlier program of its id is not used instead; a later one replaces it."""
    assert echo_peer.call("create_program", QA)["success"]
    assert echo_peer.call("create_program", definition)["success"]
    for _ in range(2):
        echo_peer.request("execute_program", ASK)
    replies = [echo_peer.receive() for _ in range(2)] + [echo_peer.call("execute_program", ASK)]
    for reply in replies:
        assert reply["error_type"] == "invalid_args"
        assert reply["error"].startswith(f"program qa could not be loaded: {text}")
    for flag in ("details", "state"):
        (detail,) = echo_peer.call("list_programs", {flag: True})["result"]["details"]
        assert (detail["loaded"], detail["error_type"]) == (False, "invalid_args")
        assert detail["error"].startswith(text) and detail.get("state") is None
    assert echo_peer.call("create_program", {**QA, "signature": "question -> answer: nope"})["success"] is False
    assert "could not be loaded" in echo_peer.call("execute_program", ASK)["error"]
    assert echo_peer.call("create_program", QA)["success"]
    assert echo_peer.call("execute_program", ASK)["result"] == {"answer": "echo: x"}
    (detail,) = echo_peer.call("list_programs", {"details": True})["result"]["details"]
    assert detail["loaded"] and "error" not in detail


@pytest.mark.slow
def test_programs_that_were_replaced_or_removed_take_no_memory(fresh_echo_peer: Peer) -> None:
    """Each is a reference cycle, as its class is one: garbage collections find it."""

    def rss() -> int:
        return fresh_echo_peer.call("get_stats")["result"]["memory_usage"]["rss"]

    def create(ids: list[str]) -> None:
        for at in range(0, len(ids), 50):
            some = ids[at : at + 50]
            fresh_echo_peer.send(*({"id": id, "command": "create_program", "args": {**QA, "id": id}} for id in some))
            for _ in some:
                assert fresh_echo_peer.receive()["success"]

    create(["same"] * 600)
    before = rss()
    create(["same"] * 1500)
    assert rss() - before < 8 << 20, "1,500 programs are 23 MB"
    create([str(n) for n in range(1500)])
    full = rss()
    assert full - before > 15 << 20
    assert fresh_echo_peer.call("cleanup")["result"]["programs_removed"] == 1501
    create([str(n) for n in range(1500)])
    assert rss() - full < 8 << 20, "the second 1,500 take the place of the first"


def test_quick_commands_do_not_wait_for_dspy_or_an_lm(start_lm: Any) -> None:
    server = start_lm()
    server.gate.clear()
    with Peer(env=lm_env(server)) as peer:
        peer.request("create_program", QA)
        quick = {peer.request(name): name for name in ("ping", "list_programs", "get_stats")}
        replies = [peer.receive() for _ in range(4)]
        assert [reply["id"] for reply in replies[:3]] == list(quick), "DSPy's import takes longer than these"
        peer.request("execute_program", {"program_id": "qa", "inputs": {"question": "x"}})
        assert server.arrived.acquire(timeout=PATIENCE)
        assert peer.call("get_stats")["result"]["in_flight"] == 1
        for name in ("ping", "list_programs", "get_stats", "cleanup"):
            assert peer.call(name)["success"]
        server.gate.set()
        assert peer.receive()["result"] == {"answer": "Paris"}


def test_without_dspy_everything_but_programs_works(tmp_path: Any) -> None:
    (tmp_path / "dspy.py").write_text("raise ImportError('broken on purpose')")
    with Peer(env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as peer:
        reply = peer.call("create_program", QA)
        assert reply["error_type"] == "internal" and "DSPy cannot be set up" in reply["error"]
        assert peer.call("ping")["success"] and peer.call("get_stats")["success"]
