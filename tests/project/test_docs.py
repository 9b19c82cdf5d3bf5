"""What the pages say is so, where it can be looked up: links, errors, figures."""

from __future__ import annotations

import re
from pathlib import Path

import dspy
import pytest
from dspy.clients.backend_selection import select_backend
from peer import ROOT

from dspy_bridge import errors

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXUNIT = ROOT / "elixir_harness" / "test" / "dspex" / "python_bridge"


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those of its headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_leads_to_every_page() -> None:
    text = PAGES[0].read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_code_says_its_language(page: Path) -> None:
    """ex_doc takes one that does not for Elixir."""
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert all(fences[::2]) and not any(fences[1::2])


def test_each_row_of_what_happens_is_a_test() -> None:
    """By the file and the name in its last column."""
    rows = table("docs/how-it-works.md", "what happens")
    assert len(rows) > 20
    for when, (_, test) in rows.items():
        file, name = test.split(": ", 1)
        if file.startswith("test_"):
            assert f"def {name}(" in next((ROOT / "tests").rglob(f"{file}.py")).read_text(), when
        else:
            assert f'test "{name}"' in next(EXUNIT.rglob(f"{file}_test.exs")).read_text(), when


def test_the_providers_that_deploying_md_counts_for_litellm_are_served_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the others by DSPy's own engine, which the figures of the pages are with."""
    page = (ROOT / "docs" / "deploying.md").read_text()
    section = page.split("### LiteLLM")[1].split("\n| ")[0]
    own, litellm = section.split("They are\n")
    names = re.compile(r"`(\w+)/…`")
    assert len(names.findall(own)) == 9 and len(names.findall(litellm)) == 7

    def native(provider: str, **options: object) -> bool:
        return bool(select_backend(dspy.LM(f"{provider}/some-model", api_key="x", **options)).native)

    assert {name for name in names.findall(own) if not native(name)} == set()
    assert native("openai", api_base="http://127.0.0.1/v1")
    # Azure has no address but that of the host's own.
    assert {name for name in names.findall(litellm) if native(name, api_base="http://127.0.0.1/v1")} == set()
    for option in ("headers", "extra_headers", "organization", "extra_query", "api_version"):
        assert f"`{option}`" in litellm and not native("openai", **{option: {}}), option
    assert not native("openai", model_type="text")
    for variable in ("OPENAI_BASE_URL", "OPENAI_API_BASE"):
        with monkeypatch.context() as environment:
            environment.setenv(variable, "http://127.0.0.1/v1")
            assert variable in litellm and not native("openai"), variable


def table(page: str, mark: str) -> dict[str, list[str]]:
    """The rows between two marks, by their first cell."""
    found = re.search(f"<!-- {mark} -->\n(.*)<!-- /{mark} -->", (ROOT / page).read_text(), re.DOTALL)
    assert found is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_the_figures_beside_the_sidecar_are_those_of_the_bench() -> None:
    """One run writes the README's table, coming-from.md and the chart."""
    bench, beside = table("README.md", "bench"), table("docs/coming-from.md", "sidecar")
    rows = {
        "start to first ping": "start to first ping",
        "pings of 256 callers": "256 processes calling `Bridge.call(:ping)`",
        "ping round trip": "`Bridge.call(:ping)` round trip",
        "ping with 1 MB": "ping with 1 MB of arguments",
        "executes, LM free": "500 executes, 64 in flight, LM free",
    }
    assert set(rows) == set(beside)
    chart = re.findall(r"<text[^>]*>([^<]*)</text>", (ROOT / "docs" / "bench.svg").read_text())
    for what, row in rows.items():
        reached, sidecar, times = beside[what]
        assert sidecar == bench[row][3]
        assert reached in bench[row][2]
        assert what in chart and f"{times}: {reached}, sidecar {sidecar}" in chart


def rows_of_errors() -> dict[str, str]:
    return dict(re.findall(r"^\| `:(\w+)` \| (.*) \|$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE))


def test_every_error_type_has_a_row_in_errors_md() -> None:
    """Those of the peer; the ones of the Elixir side are looked up by its own tests."""
    types = {kind.error_type for kind in vars(errors).values() if isinstance(kind, type)}
    assert len(types) > 10 and {*types, "invalid_json", "invalid_request"} <= set(rows_of_errors())


def test_what_errors_md_says_of_lm_errors_is_what_dspy_says_of_them() -> None:
    again, never = re.split("It is false for", rows_of_errors()["lm_error"].split("`retryable` is true for")[1])
    kinds = re.compile(r"`(\w+Error)`")
    assert len(kinds.findall(again)) == 4 and len(kinds.findall(never)) == 5
    for text, retryable in ((again, True), (never, False)):
        for name in kinds.findall(text):
            kind = getattr(dspy, name)
            assert dspy.is_retryable_lm_error(kind.__new__(kind)) is retryable, name
