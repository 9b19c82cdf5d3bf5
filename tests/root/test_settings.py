"""settings and the command line: what cannot be read stops the peer with one line that names it, never its value."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from peer import ROOT, Peer

from dspy_bridge import __version__
from dspy_bridge.settings import SETTINGS, SettingError, load


def run(*flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    with Peer(*flags, env=env) as peer:
        out, err = peer.process.communicate(timeout=60)
        return subprocess.CompletedProcess(flags, peer.process.returncode, out.decode(), err.decode())


def test_defaults_are_those_of_the_protocol() -> None:
    settings = load({}, {})
    assert settings.lm is None and settings.lm_options == {} and settings.adapter is None
    assert (settings.max_in_flight, settings.max_queue, settings.cache_entries) == (256, 10_000, 10_000)
    assert (settings.max_frame_bytes, settings.drain_ms) == (64 * 1024 * 1024, 5000)
    assert settings.history_bytes == 1024 * 1024
    assert (settings.disk_cache, settings.init, settings.log_frames) == (None, None, False)


def test_flags_win_over_the_environment_and_an_empty_text_is_no_setting() -> None:
    environment = {"DSPY_BRIDGE_MAX_QUEUE": "5", "DSPY_BRIDGE_DRAIN_MS": "7", "DSPY_BRIDGE_LM": "", "MAX_QUEUE": "9"}
    settings = load(environment, {"max_queue": "6"})
    assert (settings.max_queue, settings.drain_ms, settings.lm) == (6, 7, None)


WRONG = [
    ("lm_options", "not json s3cret"),
    ("lm_options", '["s3cret"]'),
    ("adapter", "s3cret"),
    ("max_in_flight", "0"),
    ("max_in_flight", "many"),
    ("max_queue", "-1"),
    ("max_queue", "1.5"),
    ("cache_entries", "١"),
    ("max_frame_bytes", "9" * 30),
    ("drain_ms", "5s"),
    ("history_bytes", "1 MB"),
    ("init", "os.system"),
    ("init", "a:b:c"),
    ("init", ".x:y"),
    ("disk_cache", __file__),
    ("log_level", "loud"),
    ("log_frames", "maybe"),
]


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_what_cannot_be_read_is_named_with_what_was_expected(name: str, text: str) -> None:
    with pytest.raises(SettingError) as caught:
        load({f"DSPY_BRIDGE_{name.upper()}": text}, {})
    assert f"DSPY_BRIDGE_{name.upper()} (--{name.replace('_', '-')}): expected" in str(caught.value)
    assert text not in str(caught.value)


def test_a_wrong_setting_stops_the_peer_with_exit_2_and_one_line() -> None:
    for flags, env in ((["--max-queue", "x"], {}), ([], {"DSPY_BRIDGE_MAX_QUEUE": "x"})):
        done = run(*flags, env=env)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and "DSPY_BRIDGE_MAX_QUEUE" in done.stderr


@pytest.mark.parametrize("line", ["--lm-option s3cret", "--lm-option=s3cret", "--max-queue", "--lm offline/echo serve"])
def test_an_argument_that_is_unknown_or_lacks_its_value_is_named_without_values(line: str) -> None:
    done = run(*line.split())
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "s3cret" not in done.stderr
    assert any(name in done.stderr for name in ("--lm-option;", "--max-queue: expected a value", "argument serve;"))


def test_a_full_disk_for_stdout_is_an_error_with_a_line() -> None:
    ping = b'{"id": 1, "command": "ping", "args": {}}'
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dspy_bridge"], input=len(ping).to_bytes(4, "big") + ping, stdout=full,
            stderr=subprocess.PIPE, cwd=ROOT, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1 and b"stdout: No space left on device" in done.stderr


def test_version() -> None:
    done = run("--lm", "offline/echo", "--version")
    assert (done.returncode, done.stdout) == (0, f"dspy_bridge {__version__}\n")


def test_help_lists_every_setting_with_its_variable_and_default() -> None:
    text = " ".join(run("--help").stdout.split())
    for setting in SETTINGS:
        assert setting.flag in text and f"{setting.variable}; default: {setting.default or 'none'}" in text


def test_the_page_lists_every_setting_with_its_default() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    rows = dict(re.findall(r"^\| `(DSPY_BRIDGE_\w+)` \| (.*?) \|", page, re.MULTILINE))
    assert set(rows) == {setting.variable for setting in SETTINGS}
    for setting in SETTINGS:
        assert rows[setting.variable].strip("`") in (setting.default, "none", "off", "DSPy's")
        assert setting.default == "" or rows[setting.variable].strip("`") == setting.default
