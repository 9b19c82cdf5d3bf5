"""What is shipped: the wheel and the sdist, the pinned versions, and the copy of the peer in the Hex package."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from peer import ROOT

from dspy_bridge import __version__

PACKAGE = ROOT / "dspy_bridge"
MODULES = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")} | {"py.typed"}
PRIV = ROOT / "elixir_harness" / "priv" / "python"


def pinned(file: str) -> dict[Requirement, list[str]]:
    """Its requirements, each with its hashes."""
    lines = (PRIV / file).read_text().replace("\\\n", " ").splitlines()
    return {Requirement(line.partition("--hash=")[0]): re.findall(r"--hash=(\S+)", line) for line in lines}


PINS = pinned("requirements.txt")
# What `--with` adds to them.
ADDED = {extra: pinned(f"{extra}.txt") for extra in ("litellm", "optimizers")}
ALL = [pin for pins in (PINS, *ADDED.values()) for pin in pins]
HERE = {pin.name: pin for pin in ALL if pin.marker is None or pin.marker.evaluate()}


def build(source: Path, target: Path, *kinds: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return folder


def test_the_wheel_is_the_package_and_nothing_else(dist: Path) -> None:
    """Made from the sdist, which so is whole itself."""
    with zipfile.ZipFile(dist / f"dspy_bridge-{__version__}-py3-none-any.whl") as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        entry_points = wheel.read(f"dspy_bridge-{__version__}.dist-info/entry_points.txt").decode()
    assert names == {f"dspy_bridge/{name}" for name in MODULES}
    assert "dspy-bridge = dspy_bridge.__main__:main" in entry_points


def test_the_sdist_has_what_is_needed_to_build_it_and_no_tests(dist: Path) -> None:
    with tarfile.open(dist / f"dspy_bridge-{__version__}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    top = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO", ".gitignore"}
    assert names - {".gitignore"} == {f"dspy_bridge/{name}" for name in MODULES} | top - {".gitignore"}


def test_the_copy_that_the_hex_package_carries_can_be_built(tmp_path: Path) -> None:
    """`mix dspex.setup` installs it. In a checkout it lies in a folder that git ignores."""
    package = tmp_path / "elixir_harness" / "priv" / "python" / "package"
    package.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE", *(f"dspy_bridge/{name}" for name in MODULES)):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes((ROOT / name).read_bytes())
    build(package, tmp_path, "--wheel")
    with zipfile.ZipFile(tmp_path / f"dspy_bridge-{__version__}-py3-none-any.whl") as wheel:
        assert {f"dspy_bridge/{name}" for name in MODULES} <= set(wheel.namelist())


def test_each_dependency_is_pinned_to_one_version_that_fits() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    wanted = {}
    for key in ("dependencies", *ADDED):
        listed = re.search(rf"^{key} = \[(.*?)\]$", project, re.DOTALL | re.MULTILINE)
        assert listed is not None
        wanted[key] = [Requirement(text) for text in re.findall(r'"(.+?)"', listed[1])]
    assert {need.name for need in wanted["dependencies"]} == {"dspy", "jiter", "jsonschema-rs", "orjson", "psutil"}
    assert {need.name for need in wanted["optimizers"]} == {"numpy", "optuna"}
    assert {need.name for need in wanted["litellm"]} == {"litellm"}
    for need in (need for needs in wanted.values() for need in needs):
        (pin,) = HERE[need.name].specifier
        assert pin.operator == "==" and need.specifier.contains(pin.version)


def test_the_pins_hold_for_every_python_that_is_supported() -> None:
    """Each in one version or, where a marker says so, in none; DSPy and what each extra is for are in all."""
    versions = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert len(versions) > 3
    for version in versions:
        python = {"python_version": version, "python_full_version": f"{version}.1"}
        plain, litellm, optimizers = (
            {pin.name: str(pin.specifier) for pin in pins if pin.marker is None or pin.marker.evaluate(python)}
            for pins in (PINS, *ADDED.values())
        )
        assert {"dspy", "jiter", "jsonschema-rs", "orjson", "psutil"} <= set(plain), version
        assert {"litellm", "openai"} <= set(litellm) and {"numpy", "optuna"} <= set(optimizers), version
        # Both extras have some packages, in the same version.
        assert not plain.keys() & {*litellm, *optimizers} and {**litellm, **optimizers} == {**optimizers, **litellm}


def test_these_tests_run_with_the_pinned_versions() -> None:
    """Else the pins are not the tested versions that `mix dspex.setup` promises."""
    installed = {name: metadata.version(name) for name in HERE}
    assert installed == {name: next(iter(pin.specifier)).version for name, pin in HERE.items()}


def test_each_file_of_a_package_has_its_hash_and_no_line_names_an_index() -> None:
    """`mix dspex.setup` installs with `--require-hashes`, from the index that the user has."""
    for file in ("requirements.txt", *(f"{extra}.txt" for extra in ADDED), "uv.txt"):
        pins = pinned(file)
        assert pins
        for pin, hashes in pins.items():
            assert [each.operator for each in pin.specifier] == ["=="] and pin.url is None
            assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), pin
        assert not re.search("://|--(?!hash=)", (PRIV / file).read_text())


def test_the_pinned_uv_is_the_one_of_these_tests() -> None:
    (pin,) = pinned("uv.txt")
    assert pin.name == "uv" and pin.specifier.contains(metadata.version("uv"))


def test_python_and_elixir_have_one_version() -> None:
    assert f'@version "{__version__}"' in (ROOT / "elixir_harness" / "mix.exs").read_text()
