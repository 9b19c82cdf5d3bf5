"""media: conversion of images, audio, files and histories to DSPy's objects. Nothing is downloaded."""

from __future__ import annotations

import base64
import contextlib
import os
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_bridge.errors import InvalidArgs, NotAllowed
from dspy_bridge.signatures import builder, media

PNG = base64.b64encode(b"\x89PNG and so on").decode()


def take(kind: str, value: Any, files_dir: Path | None = None) -> Any:
    """The value as a program gets it as its input of that type."""
    folder = None if files_dir is None else str(files_dir)
    definition = {"inputs": [{"name": "it", "type": kind}], "outputs": [{"name": "a"}]}
    return builder.build(definition, files_dir=folder).check({"it": value})["it"]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("https://example.org/a.png", "https://example.org/a.png"),
        ({"url": "http://example.org/a.png?b=c"}, "http://example.org/a.png?b=c"),
        (f"data:image/png;base64,{PNG}", f"data:image/png;base64,{PNG}"),
        (f"data:image/svg+xml;charset=utf-8;base64,{PNG}", f"data:image/svg+xml;base64,{PNG}"),
        ({"base64": PNG, "mime": "image/png"}, f"data:image/png;base64,{PNG}"),
    ],
)
def test_an_image(given: Any, url: str) -> None:
    image = take("image", given)
    assert isinstance(image, dspy.Image) and image.url == url
    assert image.format() == [{"type": "image_url", "image_url": {"url": url}}]


@pytest.mark.parametrize("mime", ["audio/wav", "audio/x-wav", "audio/wave"])
def test_audio(mime: str) -> None:
    for given in (f"data:{mime};base64,{PNG}", {"base64": PNG, "mime": mime}):
        assert take("audio", given).format() == [{"type": "input_audio", "input_audio": {"data": PNG, "format": "wav"}}]
    assert take("audio", {"base64": PNG, "mime": "audio/mpeg"}).audio_format == "mp3", "as OpenAI names it"


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (f"data:application/pdf;base64,{PNG}", {"file_data": f"data:application/pdf;base64,{PNG}"}),
        (
            {"base64": PNG, "mime": "text/plain", "filename": "a.txt"},
            {"file_data": f"data:text/plain;base64,{PNG}", "filename": "a.txt"},
        ),
        ({"file_id": "file-1"}, {"file_id": "file-1"}),
    ],
)
def test_a_file(given: Any, part: dict[str, str]) -> None:
    assert take("file", given).format() == [{"type": "file", "file": part}]


CHAT = {
    "inputs": [{"name": "past", "type": "history"}, {"name": "photo", "type": "image | None"}, {"name": "question"}],
    "outputs": [{"name": "answer"}, {"name": "sure", "type": "bool"}],
}


def history(given: Any, files_dir: Path | None = None) -> Any:
    """The turns as a program with a history gets them."""
    made = builder.build(CHAT, files_dir=None if files_dir is None else str(files_dir))
    return made.check({"past": given, "question": "?"})["past"]


def test_a_history_is_a_list_of_turns() -> None:
    turns = [{"question": "a", "answer": "b", "sure": True}, {"question": "c"}, {"answer": 5, "reasoning": "r"}]
    for given in (turns, {"messages": turns}):
        assert history(given) == dspy.History(messages=turns)
    assert history([]).messages == []


def test_the_media_in_a_turn_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (turn,) = history([{"question": "a", "photo": {"path": "a.png"}, "sure": "yes"}], tmp_path).messages
    assert isinstance(turn["photo"], dspy.Image) and turn["photo"].url.endswith("eA==") and turn["sure"] is True


@pytest.mark.parametrize(
    ("turn", "kind", "said"),
    [
        ({"other": 1}, InvalidArgs, ": unknown key 'other'; expected photo, question, answer, sure"),
        ({"past": [], "question": "q"}, InvalidArgs, ": unknown key 'past'; expected photo, question, answer, sure"),
        ({"reasoning": "r"}, InvalidArgs, ": expected at least one of photo, question, answer, sure"),
        ({"question": None}, InvalidArgs, ".question: expected text"),
        ({"sure": "SECRET"}, InvalidArgs, ".sure: Input should be a valid boolean, unable to interpret input"),
        ({"photo": {"path": "../x.png"}}, NotAllowed, ".photo: path: leads out of the folder of DSPY_BRIDGE_FILES_DIR"),
        (5, InvalidArgs, ": expected an object with fields of the signature"),
    ],
)
def test_what_is_wrong_with_a_turn_is_named(turn: Any, kind: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(kind) as caught:
        history([{"question": "a"}, turn, {"nor": "this"}], tmp_path)
    assert str(caught.value) == f"inputs.past: turn[1]{said}"


@pytest.mark.parametrize("kind", ["image", "audio", "file"])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (5, "expected"),
        ({}, "expected"),
        ("file:///etc/passwd", "expected"),
        ("http://" + "a" * 2_000_000 + " b", "expected"),
        ({"base64": PNG}, "expected"),
        ({"base64": PNG, "mime": "image/png", "more": 1}, "expected"),
        ({"base64": PNG, "mime": "image/png\r\nX: y"}, "mime: expected a MIME type"),
        ({"base64": 5, "mime": "image/png"}, "base64: expected text"),
        ({"base64": "", "mime": "image/png"}, "not base64"),
        ({"base64": "SECRE", "mime": "image/png"}, "not base64"),
        ({"base64": "SEC\nRET=", "mime": "image/png"}, "not base64"),
        ({"base64": "SECRÉTTT", "mime": "image/png"}, "not base64"),
        ({"base64": "A" * ((1 << 20) - 2) + "==AAAA", "mime": "image/png"}, "not base64"),
        ("data:image/png,SECRET", "must say its MIME type and that it is base64"),
        ("data:;base64,SECR", "must say its MIME type and that it is base64"),
        ("data:image/png;base64,SECRET!!", "not base64"),
    ],
)
def test_what_is_none_of_it_is_named_and_never_quoted(kind: str, given: Any, text: str) -> None:
    with pytest.raises(InvalidArgs) as caught:
        take(kind, given)
    error = str(caught.value)
    assert error.startswith("inputs.it: ") and text in error and len(error) < 300
    assert "SECR" not in error and "etc" not in error and "AAAA" not in error


@pytest.mark.parametrize(
    ("kind", "given", "text"),
    [
        ("image", {"base64": PNG, "mime": "text/html"}, "expected the type image/…, not text/html"),
        ("audio", {"base64": PNG, "mime": "image/png"}, "expected the type audio/…, not image/png"),
        ("audio", "https://example.org/a.wav", "nothing is fetched"),
        ("file", "https://example.org/a.pdf", "nothing is fetched"),
        ("file", {"file_id": 5}, "file_id"),
        ("file", {"base64": PNG, "mime": "text/plain", "filename": 5}, "filename: expected text"),
        ("history", "hello", "expected a list of turns"),
        ("history", {"messages": 5}, "expected a list of turns"),
        ("history", [5], "turn[0]: expected an object"),
        ("list[image]", ["https://example.org/x", "x"], "inputs.it[1]: expected"),
    ],
)
def test_what_does_not_fit_one_kind(kind: str, given: Any, text: str) -> None:
    with pytest.raises(InvalidArgs) as caught:
        take(kind, given)
    assert text in str(caught.value), str(caught.value)


def test_a_file_in_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.bin").write_bytes(b"x")
    for path in ("a.png", str(tmp_path / "a.png"), "sub/../a.png"):
        assert take("image", {"path": path}, tmp_path).url == "data:image/png;base64,eA=="
    assert take("file", {"path": "a.png"}, tmp_path).filename == "a.png"
    assert take("audio", {"path": "b.bin", "mime": "audio/wav"}, tmp_path).data == "eA=="


def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.png").write_bytes(b"12345")
    (tmp_path / "unnamed").write_bytes(b"1")
    monkeypatch.setattr(media, "MAX_FILE_BYTES", 4)
    for path, text in [
        (".", "path: expected a regular file"),
        ("gone.png", "path: cannot be read: No such file"),
        ("large.png", "path: expected a file of at most 4 bytes"),
        ("unnamed", "mime: expected"),
        (5, "path: expected the name"),
    ]:
        with pytest.raises(InvalidArgs) as caught:
            take("image", {"path": path}, tmp_path)
        assert text in str(caught.value), str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`in/sub/a` may be read, `out/a` may not."""
    for name in ("in/sub", "out"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a").write_bytes(name.encode())
    return tmp_path


def read(folder: Path, path: Any, most: int = 10) -> tuple[str, bytes]:
    return media.read_file(str(folder / "in"), path, most, "SETTING")


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
    with pytest.raises(ValueError, match="cannot be read"):
        read(folder, "sub/a")


def test_nothing_stays_open(folder: Path) -> None:
    os.mkfifo(folder / "in/pipe")
    before = os.listdir("/dev/fd")
    for path, most in (("sub/a", 10), ("sub/a", 2), ("sub", 10), ("pipe", 10), ("gone", 10)):
        with contextlib.suppress(ValueError):
            read(folder, path, most)
    assert len(os.listdir("/dev/fd")) == len(before)


def test_no_way_leads_out_of_the_folder(folder: Path) -> None:
    (folder / "in/link").symlink_to(folder / "out/a")
    (folder / "in/links").symlink_to(folder)
    (folder / "in/zero").symlink_to("/dev/zero")
    (folder / "in-too").mkdir()
    (folder / "in-too/a").touch()
    for path in ("../out/a", "../in-too/a", "/etc/passwd", "link", "links/out/a", "zero", "/dev/stdin"):
        with pytest.raises(ValueError, match="leads out of the folder of SETTING"):
            read(folder, path)


def test_what_is_no_regular_file_or_no_name_cannot_be_read(folder: Path) -> None:
    (folder / "in/loop").symlink_to(folder / "in/loop")
    for path in (".", "sub", "loop", "sub/a/x", "x" * 300, "x/" * 5000, "a\0b", "", 5, None):
        with pytest.raises(ValueError, match=r"cannot be read|regular file|name"):
            read(folder, path)
