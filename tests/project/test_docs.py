"""Compares the pages with what they describe: links, errors, figures, the map of the code."""

from __future__ import annotations

import re
from pathlib import Path

import dspy
import pytest
from dspy.clients.backend_selection import select_backend
from peer import ROOT

from dspy_bridge import errors
from dspy_bridge.lm.transport import routes
from dspy_bridge.programs import module_factory

README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "elixir_harness/usage-rules.md")),
    *sorted(page for kind in ("md", "livemd") for page in (ROOT / "docs").rglob(f"*.{kind}")),
]
EXUNIT = ROOT / "elixir_harness" / "test"
PEER = ROOT / "dspy_bridge"
BRIDGE = ROOT / "elixir_harness" / "lib" / "dspex" / "python_bridge"
# Not in the repository.
IGNORED = {"__pycache__", ".hypothesis", ".pytest_cache", "_build"}


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as forges make them."""
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
    text = README.read_text()
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES[1:]]
    assert [page for page in pages if f"({page})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_code_says_its_language(page: Path) -> None:
    """In one word: ex_doc renders a block without a language as Elixir, and does not recognize one with two words."""
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert all(re.fullmatch(r"\w+", fence) for fence in fences[::2]) and not any(fences[1::2])


def test_each_row_of_what_happens_is_a_test() -> None:
    """Its last column names the file and the test."""
    rows = table("docs/how-it-works.md", "what happens")
    assert len(rows) > 20
    for when, (_, test) in rows.items():
        file, name = test.split(": ", 1)
        if file.startswith("test_"):
            assert f"def {name}(" in next((ROOT / "tests").rglob(f"{file}.py")).read_text(), when
        else:
            assert any(f'test "{name}"' in path.read_text() for path in EXUNIT.rglob(f"{file}_test.exs")), when


def test_the_providers_that_deploying_md_counts_for_litellm_are_served_by_it() -> None:
    """The others are served by DSPy's own engine, with which the figures of the pages were measured."""
    page = (ROOT / "docs" / "deploying.md").read_text()
    section = page.split("### LiteLLM")[1].split("\n| ")[0]
    own, litellm = section.split("They are\n")
    names = re.compile(r"`(\w+)/…`")
    others = names.findall(litellm.split("\n- any")[0])
    assert sorted(names.findall(own)) == sorted(routes.OWN) and len(others) == 7

    def native(provider: str, **options: object) -> bool:
        return bool(select_backend(dspy.LM(f"{provider}/some-model", api_key="x", **options)).native)

    assert {name for name in names.findall(own) if not native(name)} == set()
    assert native("openai", api_base="http://127.0.0.1/v1")
    # Azure has no default address.
    assert {name for name in others if native(name, api_base="http://127.0.0.1/v1")} == set()
    for option in ("headers", "extra_headers", "organization", "extra_query", "api_version"):
        assert f"`{option}`" in litellm and not native("openai", **{option: {}}), option
    assert not native("openai", model_type="text")


def rows_of(page: str, mark: str) -> list[list[str]]:
    """The cells of the table between two marks, without its head."""
    found = re.search(f"<!-- {mark} -->\n(.*)<!-- /{mark} -->", (ROOT / page).read_text(), re.DOTALL)
    assert found is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]


def table(page: str, mark: str) -> dict[str, list[str]]:
    """The rows between two marks, by their first cell."""
    return {row[0]: row[1:] for row in rows_of(page, mark)}


def folders(root: Path) -> set[str]:
    """The folders that have files in the repository, relative to `root`."""
    files = (path for path in root.rglob("*") if path.is_file() and not IGNORED & set(path.parts))
    return {file.parent.relative_to(root).as_posix() for file in files}


@pytest.mark.parametrize("root", [PEER, BRIDGE], ids=lambda root: root.name)
def test_the_map_has_every_folder_and_no_other(root: Path) -> None:
    described = [cells[0].strip("`") for cells in rows_of("docs/how-it-works.md", f"map of {root.name}")]
    assert len(described) > 10 and sorted(described) == sorted(folders(root))


@pytest.mark.parametrize("walk", ["one request", "one pool call", "one change", "one optimization", "one crash"])
def test_each_step_of_a_walk_through_the_code_is_a_function(walk: str) -> None:
    steps = rows_of("docs/how-it-works.md", walk)
    assert len(steps) > 3
    for file, function, _ in steps:
        path = (PEER if file.endswith(".py`") else BRIDGE) / file.strip("`")
        pattern = rf"^ *(async def|def|defp) {function.strip('`')}\b"
        assert re.search(pattern, path.read_text(), re.MULTILINE), (file, function)


def test_every_file_that_contributing_md_names_exists() -> None:
    named = re.findall(r"`((?:dspy_bridge|elixir_harness|tests|docs)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("root", ["dspy_bridge", "elixir_harness/lib", "tests", "docs"])
def test_no_folder_has_more_than_16_files(root: str) -> None:
    """One can be read at a glance."""
    for folder in folders(ROOT / root):
        files = [path for path in (ROOT / root / folder).iterdir() if path.is_file() and path.suffix != ".pyc"]
        assert len(files) <= 16, (folder, len(files))


def test_the_four_lines_of_speed_have_figures_of_the_bench() -> None:
    """`make bench` writes them with the table."""
    found = re.search("<!-- speed -->\n(.*)<!-- /speed -->", README.read_text(), re.DOTALL)
    assert found is not None
    figures = re.compile(r"\d+(?:\.\d+)?(?:x| µs| ms)")
    # The first four rows of the table.
    for line, row in zip(found[1].splitlines(), table("docs/performance.md", "bench").values(), strict=False):
        assert len(figures.findall(line)) == 2
        assert [figure for figure in figures.findall(line) if figure not in row[2]] == []


def test_the_figures_next_to_the_sidecar_are_those_of_the_bench() -> None:
    """One run writes the table of performance.md, coming-from.md and the chart."""
    bench, compared = table("docs/performance.md", "bench"), table("docs/coming-from.md", "sidecar")
    rows = {
        "start to first ping": "start to first ping",
        "pings of 256 callers": "256 processes calling `Bridge.call(:ping)`",
        "ping round trip": "`Bridge.call(:ping)` round trip",
        "ping with 1 MB": "ping with 1 MB of arguments",
        "runs, LM free": "500 runs, 64 in flight, LM free",
    }
    assert set(rows) == set(compared)
    chart = re.findall(r"<text[^>]*>([^<]*)</text>", (ROOT / "docs" / "charts" / "bench.svg").read_text())
    for what, row in rows.items():
        reached, sidecar, times = compared[what]
        assert sidecar == bench[row][4]
        assert reached in bench[row][2]
        assert what in chart and f"{times}: {reached}, sidecar {sidecar}" in chart


def test_protocol_md_has_every_program_type_with_its_options() -> None:
    classes, options = {}, {}
    above: set[str] = set()
    for kind, module, taken, _ in rows_of("docs/protocol.md", "program types")[:-1]:
        if taken != "the same":
            above = set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", taken)))
        classes[kind.strip("`")] = module.split("`")[1]
        options[kind.strip("`")] = above
    assert classes == module_factory.TYPES
    assert options == {kind: set(known) for kind, known in module_factory.OPTIONS.items()}


def rows_of_errors() -> dict[str, str]:
    return dict(re.findall(r"^\| `:(\w+)` \| (.*) \|$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE))


def test_every_error_type_has_a_row_in_errors_md() -> None:
    """The types of the peer; ExUnit compares those of the Elixir side."""
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
