"""What `mix dspex.setup` installs without its extra: what only LiteLLM serves is refused, and says how to have it."""

from __future__ import annotations

from typing import Any

import pytest
from lm_server import LMServer
from peer import ROOT, Peer

QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"program_id": "qa", "inputs": {"question": "Where?"}}
PDF = "data:application/pdf;base64,JVBERi0="


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a peer that finds no LiteLLM, whether it is installed or not."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['litellm'] = None\n")
    return {"PYTHONPATH": f"{ROOT}:{folder}", "OPENAI_API_KEY": "sk-test"}


def refused(reply: dict[str, Any], named: str) -> None:
    assert reply.get("error_type") == "lm_not_configured", reply
    assert named in reply["error"] and "`mix dspex.setup --with litellm`" in reply["error"]


def test_create_program_refuses_what_needs_it(small: dict[str, str], start_lm: Any) -> None:
    lm = {"model": "openai/stub", **start_lm().options()}
    with Peer(env=small) as peer:
        for model in ("mistral/m", "bedrock/m", "azure/m", "together_ai/m"):
            refused(peer.call("create_program", {**QA, "lm": {**lm, "model": model}}), model)
        for options in ({"headers": {"X-Team": "a"}}, {"api_version": "1"}, {"extra": {"foo": 1}}, {"min_p": 0.1}):
            (name, *_) = options.get("extra", options)
            refused(peer.call("create_program", {**QA, "lm": {**lm, **options}}), name)
        refused(peer.call("create_program", {**QA, "lm": {**lm, "model_type": "text"}}), "openai/stub")
        refused(peer.call("create_program", {**QA, "lm": {**lm, "engine": "litellm"}}), "openai/stub")
        refused(peer.call("create_program", {**QA, "lm": lm, "config": {"thinking": {"type": "enabled"}}}), "thinking")
        for given, said in (
            ({"model": "opnai/m"}, "lm: opnai/m: opnai is not one of DSPy's own providers (did you mean openai?);"),
            ({**lm, "max_tokens": -5}, "lm: max_tokens must be > 0"),
            ({**lm, "extra": {"foo": 1}}, "lm: DSPy's own engine does not serve openai/stub: foo; LiteLLM is"),
        ):
            assert peer.call("create_program", {**QA, "lm": given})["error"].startswith(said)
        assert peer.call("create_program", {**QA, "lm": lm, "config": {"temperature": 0.5, "cache": False}})["success"]
        assert peer.call("execute_program", ASK)["result"] == {"answer": "Paris"}


def test_a_run_refuses_what_needs_it_before_the_lm_is_asked(small: dict[str, str], start_lm: Any) -> None:
    server = start_lm()
    files = {"inputs": [{"name": "doc", "type": "file"}], "outputs": [{"name": "answer"}]}
    lm = {"model": "openai/stub", **server.options()}
    with Peer(env=small) as peer:
        for id, signature in (("qa", "question -> answer"), ("files", files)):
            assert peer.call("create_program", {"id": id, "signature": signature, "lm": lm})["success"]
        for config, named in (({"extra": {"foo": 1}}, "foo"), ({"organization": "o"}, "organization")):
            refused(peer.call("execute_program", {**ASK, "config": config}), named)
        inputs = {"doc": PDF}
        refused(peer.call("execute_program", {"program_id": "files", "inputs": inputs}), "this call")
    assert server.requests == []


def test_a_default_lm_that_needs_it_leaves_other_lms(small: dict[str, str], start_lm: Any) -> None:
    with Peer(env={**small, "DSPY_BRIDGE_LM": "mistral/m"}) as peer:
        refused(peer.call("create_program", QA), "mistral/m")
        assert peer.call("create_program", {**QA, "lm": {"model": "openai/m", **start_lm().options()}})["success"]
        assert peer.call("execute_program", ASK)["result"] == {"answer": "Paris"}


@pytest.mark.parametrize("variable", ["OPENAI_BASE_URL", "OPENAI_API_BASE"])
def test_an_address_in_the_environment_does_not_need_it(small: dict[str, str], start_lm: Any, variable: str) -> None:
    """As the address of the peer's LM, of another one, and next to an `api_base`, which it does not replace."""
    server, other = start_lm(), start_lm()
    with Peer(env={**small, "DSPY_BRIDGE_LM": "openai/own", variable: server.url}) as peer:
        for lm, asked in (({}, server), ({"lm": "openai/m"}, server), ({"lm": of(other)}, other)):
            assert peer.call("create_program", {**QA, **lm})["success"]
            before = len(asked.requests)
            assert peer.call("execute_program", ASK)["result"] == {"answer": "Paris"}
            assert len(asked.requests) == before + 1, lm


def of(server: LMServer) -> dict[str, Any]:
    return {"model": "openai/m", **server.options()}
