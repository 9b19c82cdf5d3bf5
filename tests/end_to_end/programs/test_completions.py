"""`n`: all answers of an LM that is asked for several, or a refusal where a run gives one."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import BY_LITELLM
from lm_server import completion, script, written
from shared_peers import shared_peer

STARS = [{"name": "stars", "type": {"type": "integer", "maximum": 5}}]
RATE = {"id": "rate", "signature": {"inputs": [{"name": "review"}], "outputs": STARS}}
ASK = {"program_id": "rate", "inputs": {"review": "Fine."}}


def run(start_lm: Any, answer: Any, create: dict[str, Any], *, stream: bool = False, **args: Any) -> dict[str, Any]:
    server = start_lm(answer)
    lm = {"model": "openai/stub", **server.options(**create.pop("lm", {}))}
    with shared_peer() as peer:
        reply = peer.call("create_program", {**RATE, **create, "lm": lm})
        assert reply["success"], reply
        return peer.call("execute_program", {**ASK, **args}, stream=stream)


@pytest.mark.parametrize("adapter", ["chat", "json", "xml"])
@pytest.mark.parametrize("given", [{"config": {"n": 3}}, {"lm": {"n": 3}}])
def test_a_run_gives_all_answers(start_lm: Any, adapter: str, given: dict[str, Any]) -> None:
    answers = [{"reasoning": f"r{stars}", "stars": stars} for stars in (4, 5, 1)]
    create = {"program_type": "chain_of_thought", "adapter": adapter, **given}
    reply = run(start_lm, script(*(written(adapter, **answer) for answer in answers)), create)
    assert reply["result"] == {**answers[0], "completions": answers}


def test_each_answer_is_checked(start_lm: Any) -> None:
    """And asked for again as if it were the only one; a call's own `n` wins over that of the program."""
    answers = [written("json", stars=stars) for stars in (4, 9, 4, 3)]
    reply = run(start_lm, script(*answers), {"adapter": "json", "config": {"n": 9}}, config={"n": 2}, attempts=2)
    assert reply["result"] == {"stars": 4, "completions": [{"stars": 4}, {"stars": 3}]}
    reply = run(start_lm, script(*answers), {"adapter": "json"}, config={"n": 2})
    assert reply["error_type"] == "output_invalid" and "stars" in reply["error"]


@pytest.mark.litellm
@pytest.mark.parametrize("count", [1, 3, 1000])
def test_a_server_that_gives_another_number_than_it_was_asked_for(start_lm: Any, count: int) -> None:
    body = completion("stub", written("json", stars=2))
    body["choices"] = [{**body["choices"][0], "index": index} for index in range(count)]
    create = {"adapter": "json", "lm": BY_LITELLM}
    assert run(start_lm, (200, body), create, config={"n": 3})["result"] == {
        "stars": 2,
        "completions": [{"stars": 2}] * count,
    }


SCORED = {"options": {"reward": {"field": "stars", "equals": 5}}}
TOOLS = {"tools": [{"name": "look"}]}


@pytest.mark.parametrize(
    ("create", "given", "why"),
    [
        ({}, {"stream": True}, "in a stream"),
        (TOOLS, {}, "with tools"),
        ({"program_type": "react", **TOOLS}, {}, "of this program type"),
        ({"program_type": "best_of_n", **SCORED}, {}, "of this program type"),
        ({"signature": "review -> completions"}, {}, "with an output named completions"),
        (
            {},
            {
                "inputs": [ASK["inputs"]],
                "expected": [{"stars": 2}],
                "metric": {"field": "stars", "match": "equals"},
                "optimize": {"optimizer": "labeled_few_shot"},
            },
            "while it is optimized",
        ),
    ],
)
def test_where_a_run_gives_one_answer_more_are_refused(start_lm: Any, create: Any, given: Any, why: str) -> None:
    reply = run(start_lm, "never", {**create, "lm": {"n": 3}}, **given)
    assert reply["error_type"] == "invalid_args"
    assert reply["error"] == f"n: this program gives one answer {why}; expected 1, got 3"


@pytest.mark.parametrize("n", [0, -1, 129, 1_000_000, 1.0, True, "3", [3]])
def test_what_is_no_number_of_answers_is_refused(start_lm: Any, n: Any) -> None:
    reply = run(start_lm, "never", {}, config={"n": n})
    assert (reply["error_type"], reply["error"]) == (
        "invalid_args",
        "config.n: expected a whole number from 1 to 128",
    )
