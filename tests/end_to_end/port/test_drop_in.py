"""The script that DSPex opens: found from any directory, with the package installed or only what it depends on."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from peer import ROOT, Peer

SCRIPT = ROOT / "elixir_harness" / "priv" / "python" / "dspy_bridge.py"
# Run with -S, the interpreter sees these dependencies but not the checkout, where a link to it may be installed.
DEPENDENCIES = sysconfig.get_path("purelib")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package was installed as a user would install it."""
    target = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def serve(script: Path, path: str) -> tuple[Any, str]:
    """A ping and the package's own place, from the root directory."""
    where = "import dspy_bridge, sys; sys.stderr.write('from ' + dspy_bridge.__file__)"
    code = f"import runpy, sys; sys.path[0] = {str(script.parent)!r}; sys.argv = [{str(script)!r}]\n"
    code += f"try: runpy.run_path({str(script)!r}, run_name='__main__')\nfinally: exec({where!r})"
    with Peer(command=[sys.executable, "-S", "-c", code], env={"PYTHONPATH": path}) as peer:
        reply = peer.call("ping")
        _, _, log = peer.finish()
    return reply, log


def test_from_the_checkout_with_dependencies_only() -> None:
    reply, log = serve(SCRIPT, DEPENDENCIES)
    assert reply["success"] and f"from {ROOT}/dspy_bridge/__init__.py" in log


def test_away_from_the_checkout_with_the_package_installed(tmp_path: Path, installed: Path) -> None:
    copy = Path(shutil.copy(SCRIPT, tmp_path / "dspy_bridge.py"))
    reply, log = serve(copy, f"{installed}:{DEPENDENCIES}")
    assert reply["success"] and f"from {installed}/dspy_bridge/__init__.py" in log


def test_away_from_the_checkout_with_the_copy_beside_it(tmp_path: Path, installed: Path) -> None:
    """As in a release and in a package from Hex; it wins over another version that is installed."""
    copy = Path(shutil.copy(SCRIPT, tmp_path / "dspy_bridge.py"))
    shutil.copytree(ROOT / "dspy_bridge", tmp_path / "package" / "dspy_bridge")
    reply, log = serve(copy, f"{installed}:{DEPENDENCIES}")
    assert reply["success"] and f"from {tmp_path}/package/dspy_bridge/__init__.py" in log


def test_it_holds_the_names_that_dspex_looks_for() -> None:
    text = SCRIPT.read_text()
    assert all(name in text for name in ("class DSPyBridge", "def handle_command", "def main():"))


def test_without_the_package_it_says_so(tmp_path: Path) -> None:
    copy = shutil.copy(SCRIPT, tmp_path / "dspy_bridge.py")
    done = subprocess.run([sys.executable, "-S", str(copy)], env={}, input=b"", capture_output=True, check=False)
    assert done.returncode == 2 and done.stdout == b""
    assert b"install the package for" in done.stderr and done.stderr.count(b"\n") == 1
