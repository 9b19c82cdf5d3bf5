"""tests/both: what `make test` prints about tests that fail, and about those that pass only the second time.

Small scripts take the place of both suites, since only their output and exit status matter here.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BOTH = Path(__file__).parent.parent / "both"

# Fails the first time with two tests; the second time with those that $STILL names.
PYTEST = """#!/bin/sh
case "$*" in
  *--last-failed*) failed=$STILL; [ "$failed" != none ] || exit 5 ;;
  *) failed="slow_reply[a b] lost_call" ;;
esac
for name in "slow_reply[a b]" lost_call; do
  case "$failed" in *"$name"*) echo "FAILED tests/test_x.py::$name - assert 1 == 2"; status=1 ;; esac
done
echo "1 passed, 2 deselected in 1.0s"
exit ${status:-0}
"""

# The test of the first part fails unless its file and line are named.
MIX = """#!/bin/sh
case "$*" in
  *compile*) exit 0 ;;
  *x_test.exs:7*) echo "2 doctests, 3 tests, 0 failures, ${EXCLUDED:-4} excluded"; exit 0 ;;
esac
[ "$MIX_TEST_PARTITION" = 1 ] || { echo "1 test, 0 failures"; exit 0; }
printf '  1) test a peer that hangs (XTest)\\n     Parameters: %%{kind: :pool}\\n'
printf '     test/x_test.exs:7\\n     timed out\\n1 test, 1 failure\\n'
exit 2
"""


def _executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    _executable(tmp_path / ".venv" / "bin" / "python", PYTEST)
    _executable(tmp_path / "path" / "mix", MIX)
    (tmp_path / "elixir_harness").mkdir()
    (tmp_path / "tests").mkdir()
    shutil.copy(BOTH, tmp_path / "tests" / "both")
    return tmp_path


def _run(clone: Path, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{clone / 'path'}:{os.environ['PATH']}", **env}
    return subprocess.run([clone / "tests" / "both", "quick"], env=env, capture_output=True, text=True, timeout=60)


def _flaky(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("flaky: ")]


def test_tests_that_pass_only_the_second_time_are_named_at_the_end(clone: Path) -> None:
    done = _run(clone, STILL="")
    assert done.returncode == 0, done.stdout + done.stderr
    named = [
        "flaky: tests/test_x.py::lost_call",
        "flaky: tests/test_x.py::slow_reply[a b]",
        "flaky: test/x_test.exs:7",
    ]
    assert _flaky(done) == named
    assert done.stdout.splitlines()[-3:] == named


def test_a_test_that_fails_twice_fails_the_run_and_is_not_flaky(clone: Path) -> None:
    done = _run(clone, STILL="lost_call")
    assert done.returncode == 1
    assert _flaky(done) == ["flaky: tests/test_x.py::slow_reply[a b]", "flaky: test/x_test.exs:7"]


@pytest.mark.parametrize("env", [{"EXCLUDED": "5"}, {"STILL": "none"}])
def test_a_second_try_that_runs_none_of_them_hides_no_failure(clone: Path, env: dict[str, str]) -> None:
    assert _run(clone, **{"STILL": "", **env}).returncode == 1
