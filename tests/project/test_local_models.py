"""Follows docs/local-models.md with a real model: its commands, its server, the doctor, its call."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from peer import ROOT

PAGE = ROOT / "docs" / "local-models.md"
# Loads the configuration as Mix would, runs the doctor, and the code of the page.
SESSION = """
for {app, settings} <- Config.Reader.read!("config.exs"), {key, value} <- settings,
    do: Application.put_env(app, key, value)

Mix.Task.run("dspex.doctor", ["--ask"])
Application.put_env(:dspex, :autostart, true)
{:ok, _started} = Application.ensure_all_started(:dspex)
Code.eval_file("call.exs")
IO.puts("called")
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def blocks(port: int) -> list[tuple[str, str]]:
    """The language and the text of each block of the section, with a port that is free."""
    section = PAGE.read_text().split("\n## llama.cpp\n")[1].split("\n## ")[0].replace("8080", str(port))
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def served(tmp_path: Path) -> Iterator[list[tuple[str, str]]]:
    """The blocks that are left when the server of the page runs in the working directory."""
    install, (_, serve), (_, start), *rest = blocks(free_port())
    done = subprocess.run(["sh", "-e", "-c", install[1]], cwd=tmp_path, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the server cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    assert serve.startswith("# serve.py\n")
    (tmp_path / "serve.py").write_text(serve)
    with subprocess.Popen(start.split(), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            assert server.stdout.readline().startswith("http://127.0.0.1:")
            yield rest
        finally:
            server.kill()


def test_every_command_of_the_page_works(served: list[tuple[str, str]], tmp_path: Path) -> None:
    (_, config), doctor, (_, shown), (_, call) = served
    assert doctor == ("sh", "mix dspex.doctor --ask\n")
    (tmp_path / "config.exs").write_text(f"import Config\n{config}")
    (tmp_path / "call.exs").write_text(call)
    (tmp_path / "session.exs").write_text(f'File.cd!("{tmp_path}")\n{SESSION}')
    env = {name: value for name, value in os.environ.items() if not name.startswith(("DSPY_BRIDGE_LM", "OPENAI_"))}
    done = subprocess.run(
        ["mix", "run", "--no-start", str(tmp_path / "session.exs")],
        cwd=ROOT / "elixir_harness",
        env={**env, "PYTHON_EXECUTABLE": sys.executable, "LANG": "C.UTF-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith("called\n"), done.stdout
    for line in shown.splitlines():
        assert re.sub(r"\d+ ms", "N ms", line) in re.sub(r"\d+ ms", "N ms", done.stdout), done.stdout
