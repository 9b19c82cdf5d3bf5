"""A redirect takes neither the prompt nor a key to another server: it is an `lm_error`, with whatever sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import BY_LITELLM
from peer import ROOT, Peer

QA = {"id": "qa", "signature": "question -> answer"}
ASK = {"inputs": {"question": "Why?"}}
STATUSES = (301, 302, 303, 307, 308)
HOST = """
from concurrent.futures import ThreadPoolExecutor
import dspy

class InThread(dspy.Module):
    def forward(self, question):
        lm = dspy.settings.lm
        def ask():
            with dspy.context(lm=lm):
                return dspy.Predict("question -> answer")(question=question)
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(ask).result()

class Typed(dspy.Module):
    async def aforward(self, question):
        from dspy.lm15 import Message, Request
        lm = dspy.settings.lm
        response = await lm.acall(Request(model=lm.model, messages=(Message.user(question),)))
        return dspy.Prediction(answer=response.text)
"""
# What sends: DSPy's own transports; OpenAI's client or httpx below LiteLLM.
LITELLM: list[dict[str, Any]] = [
    {"model": "openai/y", **BY_LITELLM},
    {"model": "openai/y", "extra_headers": {"X-Own": "1"}},
    {"model": "openai/y", "model_type": "text"},
    {"model": "openai/y", "model_type": "responses", **BY_LITELLM},
    {"model": "anthropic/y", **BY_LITELLM},
    {"model": "gemini/y", **BY_LITELLM},
    {"model": "hosted_vllm/y", **BY_LITELLM},
    {"model": "cohere/y"},
]
DSPYS: list[dict[str, Any]] = [{"model": f"{name}/y"} for name in ("openai", "anthropic", "gemini", "ollama_chat")]


@pytest.mark.parametrize(
    "lms", [pytest.param(DSPYS, id="dspy"), pytest.param(LITELLM, id="litellm", marks=pytest.mark.slow)]
)
def test_no_redirect_is_followed(start_lm: Any, folder: Path, lms: list[dict[str, Any]]) -> None:
    """Of calls on the event loop, streamed, typed and in threads of a user's module."""
    status, other = 0, start_lm()
    to = {"Location": f"{other.url}/chat/completions"}
    server = start_lm(lambda _: (status, {}, to))
    env = {"PYTHONPATH": f"{ROOT}:{folder}", "DSPY_BRIDGE_ALLOW_MODULES": "host"}
    with Peer(env=env) as peer:
        for program in ("Typed", "InThread"):
            peer.call("create_program", {**QA, "id": program, "program_type": f"host:{program}"})
        peer.call("create_program", QA)
        for lm in lms:
            given = {**lm, **server.options()}
            ways: list[tuple[str, dict[str, Any]]] = [("qa", {}), ("qa", {"stream": True}), ("InThread", {})]
            if lm.get("model_type") != "text" and "extra_headers" not in lm:
                ways.append(("Typed", {}))
            if "model_type" not in lm and "extra_headers" not in lm:
                ways.append(("Typed", {"stream": True}))
            for status in STATUSES:
                for program, envelope in ways:
                    before = len(server.requests)
                    args = {"program_id": program, **ASK, "lm": given}
                    reply = peer.call("execute_program", args, **envelope)
                    assert reply["error_type"] == "lm_error", (lm, status, program, reply)
                    assert f"a redirect ({status}) to 127.0.0.1" in reply["error"] and not reply["retryable"], reply
                    # Once: there is nothing to try again.
                    assert len(server.requests) == before + 1, (lm, status, program)
    assert other.requests == []
