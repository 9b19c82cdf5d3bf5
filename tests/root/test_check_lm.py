"""The doctor's check of an LM's key, in a process of its own: the line that Elixir reads.

`doctor/lm_test.exs` has the rest of it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peer import ROOT

KEY = "sk-0123456789abcdef"


def facts(model: str, cwd: Path, options: dict[str, Any] | None = None, *args: str, **env: str) -> dict[str, Any]:
    """Of a process without anybody's keys. `args`: of the script."""
    kept = {name: value for name, value in os.environ.items() if "KEY" not in name and not name.startswith("DSPY_")}
    env = {**kept, "DSPY_BRIDGE_LM": model, "DSPY_BRIDGE_LM_OPTIONS": json.dumps(options or {}), **env}
    command = [sys.executable, str(ROOT / "dspy_bridge" / "check_lm.py"), *args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True)
    assert KEY not in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("DSPEX ")]
    found: dict[str, Any] = json.loads(line.removeprefix("DSPEX "))
    return found


@pytest.mark.parametrize(("env", "lacks"), [({}, ["OPENAI_API_KEY"]), ({"OPENAI_API_KEY": KEY}, [])])
def test_a_key_in_the_environment_is_found_and_not_printed(
    tmp_path: Path, env: dict[str, str], lacks: list[str]
) -> None:
    """An empty variable counts as unset; a folder `dspy` of the application's is not imported."""
    (tmp_path / "dspy").mkdir()
    (tmp_path / "dspy" / "__init__.py").write_text("raise SystemExit('of the application')")
    found = facts("openai/gpt-4o-mini", tmp_path, **{"OPENAI_API_KEY": "", **env})
    assert (found["needs"], found["lacks"], found["set"]) == (["OPENAI_API_KEY"], lacks, list(env))


def test_an_lm_that_dspy_refuses_has_its_words(tmp_path: Path) -> None:
    found = facts("openai/o3", tmp_path, {"temperature": 0.5})
    assert list(found) == ["refused"] and found["refused"].startswith("LMConfigurationError: [openai/o3] ")


def test_what_needs_litellm_where_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['litellm'] = None\n")
    for model, options in (("mistral/x", {}), ("openai/x", {"organization": "o"})):
        found = facts(model, tmp_path, options, PYTHONPATH=str(tmp_path))
        assert list(found) == ["lacking"] and "`mix dspex.setup --with litellm`" in found["lacking"]


def test_a_misspelt_option_has_the_nearest_one(tmp_path: Path) -> None:
    """The peer refuses it with the same words."""
    found = facts("openai/gpt-4o-mini", tmp_path, {"api_bas": "http://127.0.0.1:1/v1"})
    assert found["refused"].startswith("lm_options.api_bas: unknown option; did you mean api_base?")


@pytest.mark.litellm
def test_the_bridges_own_options_are_no_concern_of_dspys(tmp_path: Path) -> None:
    options = {"connect_timeout": 1, "supports": "none", "cache": {"scope": "a"}, "extra": {"vendor_mode": 1}}
    assert facts("openai/gpt-4o-mini", tmp_path, {**options, "api_key": KEY})["lacks"] == []


def test_an_api_base_that_cannot_be_reached_is_named_with_host_and_port(tmp_path: Path) -> None:
    """No request is made: a server that accepts the connection need not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        options = {"api_base": f"http://127.0.0.1:{port}/v1", "api_key": KEY}
        assert facts("openai/x", tmp_path, options)["unreachable"] is None
    unreachable = facts("openai/x", tmp_path, {**options, "connect_timeout": 1.5})["unreachable"]
    assert unreachable == f"127.0.0.1:{port} cannot be reached within 1.5 s: Connection refused"
    unreachable = facts("openai/x", tmp_path, {**options, "api_base": "127.0.0.1:80"})["unreachable"]
    assert unreachable == "its api_base is not an address such as http://127.0.0.1:8080/v1"


def test_it_asks_the_lm_only_if_told_to(tmp_path: Path, start_lm: Any) -> None:
    server = start_lm("Hello!")
    assert "asked" not in facts("openai/x", tmp_path, server.options())
    assert server.requests == []
    assert facts("openai/x", tmp_path, server.options(), "--ask")["asked"]["supports"] is None
    assert len(server.requests) == 2
