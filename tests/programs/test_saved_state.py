"""saved_state: states that DSPy saves are loaded and dumped unchanged; anything else is one `InvalidArgs`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspy_bridge.errors import InvalidArgs, NotAllowed
from dspy_bridge.lm import lm_options
from dspy_bridge.programs import saved_state
from dspy_bridge.wire import messages

# Of DSPy's own modules.
pytestmark = pytest.mark.filterwarnings("ignore:The 'prefix' argument:DeprecationWarning")

QA = dspy.Signature("question -> answer")


def search(query: str) -> str:
    """A tool."""
    return query


class Own(dspy.Module):
    """A user's module with two predictors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question -> topic")
        self.rest = [dspy.ChainOfThought("question, topic -> answer")]


KINDS: dict[str, Callable[[], dspy.Module]] = {
    "predict": lambda: dspy.Predict(QA),
    "chain_of_thought": lambda: dspy.ChainOfThought(QA),
    "react": lambda: dspy.ReAct(QA, tools=[search]),
    "best_of_n": lambda: dspy.BestOfN(dspy.ChainOfThought(QA), N=2, reward_fn=lambda *_: 1.0, threshold=1.0),
    "multi_chain_comparison": lambda: dspy.MultiChainComparison(QA, M=2),
    "own": Own,
}


def learned(kind: str) -> dspy.Module:
    """A module as an optimizer would leave it."""
    module = KINDS[kind]()
    for number, predictor in enumerate(module.predictors()):
        predictor.signature = predictor.signature.with_instructions(f"Learned {number}.")
        predictor.demos = [
            dspy.Example(augmented=True, **{name: f"{name} {number}" for name in predictor.signature.fields}),
            dspy.Example(question="Why?", answer="So.").with_inputs("question"),
        ]
    return module


def saved(module: dspy.Module, folder: Path) -> dict[str, Any]:
    module.save(folder / "state.json")
    state: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
    return state


def as_sent(module: dspy.Module, lm: dict[str, Any] | None = None) -> Any:
    """As `list_programs` sends it."""
    return json.loads(messages.encode_result(1, saved_state.dump(module, lm), None))["result"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_dspy_saves_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    state = saved(learned(kind), tmp_path)
    module = KINDS[kind]()
    assert saved_state.load(module, copy.deepcopy(state)) is None
    assert as_sent(module) == state
    for predictor, original in zip(module.predictors(), learned(kind).predictors(), strict=True):
        assert predictor.signature.instructions == original.signature.instructions
        assert [dict(demo) for demo in predictor.demos] == [dict(demo) for demo in original.demos]


def test_only_how_an_lm_is_to_write_is_taken_from_a_state() -> None:
    """Not its address, nor anything else that is sent to it: providers have many names for these."""
    harmless = {"model": "openai/small", "temperature": 0.3, "max_tokens": 9, "stop": ["x"], "use_developer_role": True}
    elsewhere: dict[str, Any] = {
        "extra_body": {"x": 1},
        "extra_headers": {"x": "y"},
        "azure_ad_token": "t0ken!",
        "api_key": "k3y!!!",
        "custom_llm_provider": "x",
        "engine": "litellm",
        "callbacks": [],
        "_dspy_lm_class": "os.system",
        "new": 1,
        **dict.fromkeys(("api_base", "base_url", "azure_endpoint", "aws_bedrock_runtime_endpoint"), "http://evil/"),
    }
    state = {**GOOD, "lm": {**harmless, **elsewhere}}
    module = dspy.Predict(QA)
    lm = saved_state.load(module, copy.deepcopy(state))
    assert lm == harmless and as_sent(module, lm)["lm"] == harmless
    saved = saved_state.load(module, {**GOOD, "lm": {"model": "huggingface/https://evil/"}})
    with pytest.raises(InvalidArgs, match=r"state\.lm\.model: it has an address"):
        lm_options.complete(saved, "state.lm")


def test_no_secret_of_a_hosts_lm_is_told() -> None:
    """A user's module may have LMs, with any options of providers."""
    module = Own()
    secrets = {
        "extra_headers": {"Authorization": "Bearer s3cret-1"},
        "headers": {"x-auth": "s3cret-2"},
        "default_headers": {"x-auth": "s3cret-3"},
        "aws_secret_access_key": "s3cret-4",
        "extra_body": {"api_key": "s3cret-5", "nested": [{"password": "s3cret-6"}], "size": 5},
        "vertex_credentials": {"client": "s3cret-7"},
        "azure_ad_token": "s3cret-8",
    }
    module.first.lm = dspy.LM("openai/x", max_tokens=77, region="eu", **secrets)
    module.first.demos = [{"question": "q", "topic": "t", "token": "a word"}]
    sent = as_sent(module)
    assert "s3cret" not in json.dumps(sent)
    lm = sent["first"]["lm"]
    assert lm["max_tokens"] == 77 and lm["region"] == "eu" and lm["extra_body"] == {"nested": [{}], "size": 5}
    assert sent["first"]["demos"] == module.first.demos


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_a_state_of_another_type_is_refused(kind: str, other: str, tmp_path: Path) -> None:
    if kind != other:
        with pytest.raises(InvalidArgs, match="of another"):
            saved_state.load(KINDS[kind](), saved(learned(other), tmp_path))


GOOD = learned("predict").dump_state()


def test_a_predictor_has_at_most_500_demos() -> None:
    saved_state.load(dspy.Predict(QA), {**GOOD, "demos": [{"answer": "a"}] * 500})
    with pytest.raises(InvalidArgs, match=r"state\.demos: .* at most 500"):
        saved_state.load(dspy.Predict(QA), {**GOOD, "demos": [{"answer": "a"}] * 501})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from([*GOOD, "predict", "self", "metadata"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


STATES = {"predict": GOOD, **{kind: learned(kind).dump_state() for kind in ("chain_of_thought", "react", "own")}}


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A good state with something in it replaced, removed or renamed."""
    kind = draw(st.sampled_from(sorted(STATES)))
    state = copy.deepcopy(STATES[kind])
    for _ in range(draw(st.integers(1, 2))):
        place: Any = state
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], (dict, list)) or draw(st.integers(0, 3)) == 0:
                place[key] = draw(JSON)
                if isinstance(place, dict) and draw(st.booleans()):
                    place[draw(st.text(max_size=8))] = place.pop(key)
                break
            place = place[key]
    return kind, state


@given(mutated())
@settings(max_examples=300)
def test_a_damaged_state_is_refused_or_serves(case: tuple[str, dict[str, Any]]) -> None:
    """A loaded state can be written into prompts and dumped."""
    kind, state = case
    module = KINDS[kind]()
    try:
        lm = saved_state.load(module, state)
    except InvalidArgs:
        return
    as_sent(module, lm)
    for predictor in module.predictors():
        inputs = dict.fromkeys(predictor.signature.input_fields, "x")
        for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()):
            assert adapter.format(predictor.signature, predictor.demos, inputs)


@pytest.mark.parametrize(
    ("demos", "said"),
    [
        ({}, "demos: expected a list"),
        ([5], r"demos\[0\]: expected an object"),
        ([{}], r"demos\[0\]: expected an object"),
        ([{"question": "q", "n": 1}, {"other": 1}], r"demos\[1\]: unknown key 'other'; expected question, n, answer"),
        ([{"n": "many"}], r"demos\[0\].n: "),
        ([{"question": 5}], r"demos\[0\].question: "),
        ([{"answer": "a"}] * 501, "demos: expected at most 500"),
    ],
)
def test_demos_that_do_not_fit_are_named(demos: Any, said: str) -> None:
    signature = dspy.Signature("question, n: int -> answer")
    with pytest.raises(InvalidArgs, match=said):
        saved_state.read_demos(demos, dspy.Predict(signature), signature)


def test_a_file_in_a_demo_is_read_only_where_files_may_be(tmp_path: Path) -> None:
    signature = dspy.Signature("picture: dspy.Image -> answer")
    (tmp_path / "secret.png").write_bytes(b"\x89PNG secret")
    demo = {"picture": {"path": str(tmp_path / "secret.png")}, "answer": "a"}
    for files_dir in (None, str(tmp_path / "elsewhere")):
        with pytest.raises((InvalidArgs, NotAllowed)):
            saved_state.read_demos([demo], dspy.Predict(signature), signature, files_dir)
    module = dspy.Predict(signature)
    saved_state.read_demos([demo], module, signature, str(tmp_path))
    assert module.demos[0]["picture"].url.startswith("data:image/png;base64,")
