"""The first hour of a new user, in a Mix application outside the checkout: `make test-install`.

The application depends on the files of the Hex package and on nothing else, and has the Python that `mix dspex.setup`
makes. The tests stand in the order of that hour; what takes long is made once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from lm_server import LMServer
from peer import ROOT

from dspy_bridge import __version__

pytestmark = pytest.mark.timeout(400)

HARNESS = ROOT / "elixir_harness"
# What a developer of this project may have set, and a new user has not.
OURS = re.compile("DSPY_|DSPEX_|MIX_|PYTHON|VIRTUAL_ENV")
KEY = "sk-wrong-0123456789abcdef"


def run(*command: str | Path, cwd: Path, given: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """One command as a user types it; its output and errors together."""
    clean = {name: value for name, value in os.environ.items() if not OURS.match(name)}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, "LANG": "C.UTF-8", **env},
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def assert_answers(python: Path) -> None:
    """The peer of that Python loads a program and runs it, from the root directory."""
    create = b'{"id": 1, "command": "create_program", "args": {"id": "qa", "signature": "question -> answer"}}'
    execute = b'{"id": 2, "command": "execute_program", "args": {"program_id": "qa", "inputs": {"question": "Why?"}}}'
    given = b"".join(len(payload).to_bytes(4, "big") + payload for payload in (create, execute))
    clean = {name: value for name, value in os.environ.items() if not OURS.match(name)}
    env = {**clean, "DSPY_BRIDGE_LM": "offline/echo", "DSPY_BRIDGE_DRAIN_MS": "120000"}
    command = [str(python), "-m", "dspy_bridge"]
    done = subprocess.run(command, cwd="/", env=env, input=given, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0 and b'"answer":"echo: Why?"' in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the Hex package, as Hex would unpack them."""
    target = tmp_path_factory.mktemp("hex") / "dspex"
    code = """
    for pattern <- Mix.Project.config()[:package][:files],
        path <- Path.wildcard(pattern, match_dot: true),
        file <- [path | Path.wildcard(path <> "/**/*")],
        File.regular?(file),
        do: IO.puts("FILE " <> file)
    """
    done = run("mix", "run", "--no-start", "-e", code, cwd=HARNESS)
    assert done.returncode == 0, done.stdout
    files = re.findall("^FILE (.*)$", done.stdout, re.MULTILINE)
    assert {"mix.exs", "usage-rules.md", "priv/python/package/dspy_bridge/port/reader.py"} <= set(files)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).write_bytes((HARNESS / file).read_bytes())
    return target


@pytest.fixture(scope="module")
def app(package: Path) -> Path:
    """`mix new`, and the dependency in its mix.exs."""
    done = run("mix", "new", "shop", "--sup", cwd=package.parent)
    assert done.returncode == 0, done.stdout
    folder = package.parent / "shop"
    mix_exs = (folder / "mix.exs").read_text()
    changed = mix_exs.replace("defp deps do\n    [", 'defp deps do\n    [\n      {:dspex, path: "../dspex"}')
    assert changed != mix_exs
    (folder / "mix.exs").write_text(changed)
    done = run("mix", "compile", "--warnings-as-errors", cwd=folder)
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout
    return folder


@pytest.fixture(scope="module")
def ready(app: Path) -> Path:
    """After `mix dspex.setup`, with the lines in the configuration that it asks for, and an LM."""
    done = run("mix", "dspex.setup", cwd=app)
    assert done.returncode == 0, done.stdout
    advice = re.search(r"make config/config.exs with this:\n\n((?: {4}.*\n|\n)+)", done.stdout)
    assert advice is not None, done.stdout
    lm = 'config :dspex, :python_bridge, lm: "offline/echo"\n'
    (app / "config").mkdir()
    (app / "config" / "config.exs").write_text(textwrap.dedent(advice[1]) + lm)
    return app


def test_the_doctor_says_first_what_to_do(app: Path) -> None:
    """The Python that happens to be on the PATH has no DSPy."""
    bare = app.parent / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    done = run("mix", "dspex.doctor", cwd=app, PYTHON_EXECUTABLE=str(bare / "bin" / "python"))
    assert done.returncode == 1
    assert "dspy" in done.stdout and "mix dspex.setup" in done.stdout


def test_after_setup_the_doctor_is_content(ready: Path) -> None:
    """What is missing for some LMs and optimizers is a note, with what installs it."""
    done = run("mix", "dspex.doctor", cwd=ready)
    assert done.returncode == 0 and done.stdout.endswith("\nAll is well.\n"), done.stdout
    for extra in ("litellm", "optimizers"):
        assert re.search(f"^– {extra} .*mix dspex.setup --with {extra}", done.stdout, re.MULTILINE)
    assert lacking(ready / "_build" / "dspex_venv") == {"litellm", "openai"}


def lacking(venv: Path) -> set[str]:
    """What installed packages require that is not there."""
    done = run(Path(sys.executable).with_name("uv"), "pip", "check", "--python", venv / "bin" / "python", cwd=venv)
    return set(re.findall(r"requires `([\w-]+).*, but it's not installed", done.stdout))


def test_setup_with_uv_and_extras(app: Path) -> None:
    """With the uv that is on the PATH, and LiteLLM and what MIPROv2 and SIMBA need, in the pinned versions."""
    tools = app.parent / "tools"
    tools.mkdir()
    (tools / "uv").symlink_to(Path(sys.executable).with_name("uv"))
    path = f"{tools}:{os.environ['PATH']}"
    setup = ("mix", "dspex.setup", "--path", "with_uv", "--python", sys.executable, "--with", "optimizers")
    done = run(*setup, "--with", "litellm", cwd=app, PATH=path)
    assert done.returncode == 0, done.stdout
    litellm = re.search(r"✓ litellm +(\S+)\n", done.stdout)
    assert litellm is not None and f"\nlitellm=={litellm[1]} " in (HARNESS / "priv/python/litellm.txt").read_text()
    assert lacking(app / "with_uv") == set()
    found = re.search(r"✓ optimizers +all of them, with numpy (\S+), optuna (\S+)\n", done.stdout)
    pins = (HARNESS / "priv/python/optimizers.txt").read_text()
    assert found is not None and f"\nnumpy=={found[1]} " in pins and f"\noptuna=={found[2]} " in pins, done.stdout
    assert "uv" in (app / "with_uv" / "pyvenv.cfg").read_text()
    assert_answers(app / "with_uv" / "bin" / "python")


def test_the_python_of_setup_has_the_pinned_versions_and_the_peer(ready: Path) -> None:
    python = ready / "_build" / "dspex_venv" / "bin" / "python"
    done = run(python, "-m", "dspy_bridge", "--version", cwd=Path("/"))
    assert done.stdout == f"dspy_bridge {__version__}\n"
    code = "from importlib.metadata import version; print(version('dspy'))"
    pin = re.search(r"^dspy==(\S+)", (HARNESS / "priv/python/requirements.txt").read_text(), re.MULTILINE)
    assert pin is not None and run(python, "-c", code, cwd=Path("/")).stdout.strip() == pin[1]


def test_a_first_call_in_iex(ready: Path) -> None:
    given = 'DSPex.PythonBridge.Bridge.call(:ping) |> elem(1) |> Map.get("status") |> then(&"it is #{&1}")\n'
    done = run("iex", "-S", "mix", cwd=ready, given=given)
    assert '"it is ok"' in done.stdout, done.stdout


@pytest.fixture
def lm() -> Iterator[LMServer]:
    """A provider that knows one key, which nobody here has; its refusal repeats what it was given, as OpenAI's does."""
    server = LMServer(
        lambda _request: (401, {"error": {"message": f"Incorrect API key provided: {KEY}.", "code": "invalid_api_key"}})
    )
    yield server
    server.stop()


def test_a_release_runs_without_the_sources(ready: Path, package: Path) -> None:
    """priv has the peer; the interpreter is where the configuration says."""
    done = run("mix", "release", "--quiet", cwd=ready, MIX_ENV="prod")
    assert done.returncode == 0, done.stdout
    away = package.with_name("away")
    package.rename(away)
    try:
        code = """
        {:ok, _} = Application.ensure_all_started(:shop)
        alias DSPex.PythonBridge.Bridge
        {:ok, _} = Bridge.call(:create_program, %{id: "qa", signature: "question -> answer: int"})
        IO.inspect(Bridge.call(:execute_program, %{program_id: "qa", inputs: %{question: "How many?"}}))
        """
        bin = ready / "_build" / "prod" / "rel" / "shop" / "bin" / "shop"
        done = run(bin, "eval", code, cwd=Path("/"))
        assert '{:ok, %{"answer" => ' in done.stdout, done.stdout
    finally:
        away.rename(package)


def test_a_release_with_its_environment_may_be_moved(ready: Path, tmp_path: Path) -> None:
    """`mix dspex.setup --release` lays Python's packages into it; neither sources nor `_build` are there later."""
    root = ready / "_build" / "prod" / "rel" / "shop"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    setup = ("mix", "dspex.setup", "--release", root, "--python", sys.executable)
    assert run("mix", "release", "--quiet", "--overwrite", cwd=ready, MIX_ENV="prod").returncode == 0
    done = run(*setup, cwd=ready, MIX_ENV="prod", PATH=path)
    assert done.returncode == 0, done.stdout
    advice = re.search(r"in config/runtime.exs:\n\n((?: {4}.*\n|\n)+)", done.stdout)
    assert advice is not None, done.stdout
    runtime = ready / "config" / "runtime.exs"
    runtime.write_text("import Config\n" + textwrap.dedent(advice[1]))

    # A new release at the same place keeps the environment.
    assert run("mix", "release", "--quiet", "--overwrite", cwd=ready, MIX_ENV="prod").returncode == 0
    done = run(*setup, cwd=ready, MIX_ENV="prod", PATH=path)
    assert done.returncode == 0 and f"{root}/dspex_venv has all that it needs" in done.stdout, done.stdout

    moved = tmp_path / "else where"
    away = tmp_path / "away"
    shutil.copytree(root, moved, symlinks=True, copy_function=shutil.copy)
    ready.rename(away)
    try:
        code = """
        {:ok, _} = Application.ensure_all_started(:shop)
        alias DSPex.PythonBridge.{Bridge, Doctor}
        {:ok, _} = Bridge.call(:create_program, %{id: "qa", signature: "question -> answer: int"})
        IO.inspect(Bridge.call(:execute_program, %{program_id: "qa", inputs: %{question: "How many?"}}))
        IO.inspect(Doctor.print(), label: "doctor")
        """
        done = run(moved / "bin" / "shop", "eval", code, cwd=Path("/"))
        assert '{:ok, %{"answer" => ' in done.stdout and "doctor: true" in done.stdout, done.stdout
        assert f"✓ interpreter   {moved}/dspex_venv/bin/python3 " in done.stdout
        assert f"✓ script        {moved}/lib/dspex-" in done.stdout
    finally:
        away.rename(ready)
        runtime.unlink()


def test_the_wheel_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """Built, installed with what it depends on, and driven from the root directory."""
    uv = Path(sys.executable).with_name("uv")
    done = run(sys.executable, "-m", "build", "--wheel", "--installer", "uv", "--outdir", tmp_path, ROOT, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    python = tmp_path / "venv" / "bin" / "python"
    assert run(uv, "venv", "--python", sys.executable, tmp_path / "venv", cwd=tmp_path).returncode == 0
    (wheel,) = tmp_path.glob("*.whl")
    done = run(uv, "pip", "install", "--python", python, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert_answers(python)
    done = run(python.with_name("dspy-bridge"), "--version", cwd=Path("/"))
    assert done.stdout == f"dspy_bridge {__version__}\n"
