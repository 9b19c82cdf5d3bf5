"""confined_files: only files in the folder are read, even if the path changes meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dspy_bridge.signatures import confined_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`in/sub/a` may be read, `out/a` may not."""
    for name in ("in/sub", "out"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a").write_bytes(name.encode())
    return tmp_path


def test_a_file_is_read_and_told_where_it_is(folder: Path) -> None:
    for path in ("sub/a", "./sub/../sub/a", str(folder / "in/sub/a")):
        assert confined_files.read(str(folder / "in"), path, 10) == (os.path.realpath(folder / "in/sub/a"), b"in/sub")


@pytest.mark.parametrize("swapped", ["sub", "sub/a"])
def test_a_link_that_comes_between_leads_nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch, swapped: str) -> None:
    """A name on the way becomes a link after the path was checked and before it is opened."""
    opened = os.open

    def swap_first(path: Any, *args: Any, **more: Any) -> int:
        place = folder / "in" / swapped
        if not place.is_symlink():
            place.rename(folder / "aside")
            place.symlink_to(folder / ("out" if swapped == "sub" else "out/a"))
        return opened(path, *args, **more)

    monkeypatch.setattr(os, "open", swap_first)
    with pytest.raises(confined_files.Unreadable):
        confined_files.read(str(folder / "in"), "sub/a", 10)


def test_nothing_stays_open(folder: Path) -> None:
    os.mkfifo(folder / "in/pipe")
    before = os.listdir("/dev/fd")
    for path, most in (("sub/a", 10), ("sub/a", 2), ("sub", 10), ("pipe", 10), ("gone", 10)):
        try:
            confined_files.read(str(folder / "in"), path, most)
        except confined_files.Unreadable:
            pass
    assert len(os.listdir("/dev/fd")) == len(before)


def test_no_way_leads_out_of_the_folder(folder: Path) -> None:
    (folder / "in/link").symlink_to(folder / "out/a")
    (folder / "in/links").symlink_to(folder)
    (folder / "in/zero").symlink_to("/dev/zero")
    (folder / "in-too").mkdir()
    (folder / "in-too/a").touch()
    for path in ("../out/a", "../in-too/a", "/etc/passwd", "link", "links/out/a", "zero", "/dev/stdin"):
        with pytest.raises(confined_files.Outside):
            confined_files.read(str(folder / "in"), path, 10)


def test_what_is_no_regular_file_or_no_name_cannot_be_read(folder: Path) -> None:
    (folder / "in/loop").symlink_to(folder / "in/loop")
    for path in (".", "sub", "loop", "sub/a/x", "x" * 300, "x/" * 5000, "a\0b", "", 5, None):
        with pytest.raises(confined_files.Unreadable):
            confined_files.read(str(folder / "in"), path, 10)
