"""Converts images, audio, files and histories of a request to DSPy's objects. Imports DSPy.

Nothing is downloaded: a URL goes to the LM's provider as it is. Files are read only from the folder of a setting.
"""

from __future__ import annotations

import base64
import functools
import mimetypes
import os
import re
import stat
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import dspy
import pydantic
from dspy.experimental import Citations, Document
from pydantic_core import PydanticCustomError

from dspy_bridge.lm.adapters import corrections, field_markers

# Base64 makes it a third longer; providers accept less than this.
MAX_FILE_BYTES = 64 * 1024 * 1024
_URL = re.compile(r"https?://[^\s/]\S*", re.IGNORECASE)
_DATA_HEAD = re.compile(r"data:([\w.+-]+/[\w.+-]+)((?:;[\w.+-]+=[\w.+-]+)*);base64", re.ASCII | re.IGNORECASE)
_MIME = re.compile(r"[\w.+-]+/[\w.+-]+", re.ASCII)

NOT_ALLOWED = "not_allowed"


def unfit(text: str, kind: str = "unfit") -> PydanticCustomError:
    """For a validator to raise: the value does not fit the type, or, as `NOT_ALLOWED`, the settings of this peer."""
    return PydanticCustomError(kind, "{text}", {"text": text})


class _Image(dspy.Image):  # type: ignore[misc]  # DSPy ships no types
    """DSPy's own `format` caches the last 32 images, of any size."""

    def format(self) -> list[dict[str, Any]]:
        return [{"type": "image_url", "image_url": {"url": self.url}}]


class _FirstError:
    """Stops the validation of a list or a set at its first error: one for each of a million items takes seconds, with
    the GIL held. Pydantic's own `FailFast` cannot be used in a union.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        return {**handler(source), "fail_fast": True}


# Checks one turn of a history; raises `InvalidArgs` or `NotAllowed`, naming it and the field.
Turn = Callable[[dict[str, Any], str], dict[str, Any]]


def accepting(annotation: Any, files_dir: str | None, turn: Turn | None = None) -> Any:
    """The annotation with converters. `files_dir`: the folder for paths. `turn`: checks the turns of a history."""
    kinds = annotation.__mro__ if isinstance(annotation, type) else ()
    read: Any = next((_READERS[kind] for kind in kinds if kind in _READERS), None)
    if read is not None:
        of_it = turn if annotation is dspy.History else files_dir
        return Annotated[annotation, pydantic.BeforeValidator(functools.partial(read, of_it))]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin not in (list, dict, tuple, set, frozenset, Union, types.UnionType):
        return annotation
    inner = tuple(argument if argument is ... else accepting(argument, files_dir, turn) for argument in arguments)
    if origin in (Union, types.UnionType):
        return Union[inner]  # noqa: UP007 - built from values
    return origin[inner] if origin is dict else Annotated[origin[inner], _FirstError()]


def validators(fields: Mapping[str, Any], files_dir: str | None) -> dict[str, pydantic.TypeAdapter[Any]]:
    kinds = {name: accepting(field.rebuild_annotation(), files_dir) for name, field in fields.items()}
    return {name: pydantic.TypeAdapter(kind) for name, kind in kinds.items()}


def image(files_dir: str | None, value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"url"}:
        value = value["url"]
    if isinstance(value, str) and _URL.fullmatch(value):
        return _Image(url=value)
    mime, data, _ = _content(value, files_dir, "image", "an http: or https: URL, a data: URL")
    return _Image(url=f"data:{mime};base64,{data}")


def _audio(files_dir: str | None, value: Any) -> Any:
    mime, data, _ = _content(value, files_dir, "audio", "a data: URL")
    kind = mime.removeprefix("audio/").removeprefix("x-")
    return dspy.Audio(data=data, audio_format={"mpeg": "mp3", "wave": "wav"}.get(kind, kind))


def file(files_dir: str | None, value: Any) -> Any:
    if isinstance(value, dict) and "file_id" in value:
        if set(value) - {"file_id", "filename"} or not all(isinstance(text, str) for text in value.values()):
            raise unfit("expected file_id, which may have a filename, both text")
        return dspy.File(**value)
    mime, data, filename = _content(value, files_dir, "file", "a data: URL, {file_id}")
    return dspy.File(file_data=f"data:{mime};base64,{data}", filename=filename)


def _history(turn: Turn | None, value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"messages"}:
        value = value["messages"]
    if not isinstance(value, list):
        raise unfit("expected a list of turns, each an object with fields of the signature")
    turns = []
    for index, given in enumerate(value):
        if not isinstance(given, dict):
            raise unfit(f"turn[{index}]: expected an object with fields of the signature")
        turns.append(given if turn is None else turn(given, f"turn[{index}]"))
    return dspy.History(messages=turns)


def _text(key: str, _files_dir: str | None, value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {key}:
        value = value[key]
    if not isinstance(value, str):
        raise unfit(f"expected text, or an object of {key}")
    return field_markers.without_types(value)


def _document(_files_dir: str | None, value: Any) -> Any:
    fields = {"data": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not fields.keys() <= set(Document.model_fields):
        raise unfit(f"expected text, or an object of {', '.join(Document.model_fields)}")
    if fields.get("media_type") == "application/pdf":
        _base64(fields.get("data"))
    return _made(Document, fields)


def _citations(_files_dir: str | None, value: Any) -> Any:
    if not isinstance(value, list):
        raise unfit("expected a list of citations")
    return Citations(citations=[_made(Citations.Citation, one) for one in value])


def _made(kind: Any, fields: Any) -> Any:
    """An object of DSPy's, which it writes in its notation for images and the like. Its own errors quote values."""
    try:
        return kind(**field_markers.changed(fields, field_markers.without_types))
    except pydantic.ValidationError as error:
        raise unfit(corrections.first_of(error)) from None
    except (TypeError, ValueError):
        raise unfit(f"expected an object of {', '.join(kind.model_fields)}") from None


_READERS = {
    dspy.Image: image,
    dspy.Audio: _audio,
    dspy.File: file,
    dspy.History: _history,
    dspy.Reasoning: functools.partial(_text, "content"),
    dspy.Code: functools.partial(_text, "code"),
    Document: _document,
    Citations: _citations,
}


def _content(value: Any, files_dir: str | None, kind: str, forms: str) -> tuple[str, str, str | None]:
    """The MIME type, base64 string and file name of a value; the type is of that kind, unless it is "file"."""
    keys = set(value) if isinstance(value, dict) else set()
    named = {"filename"} if kind == "file" else set()
    filename = None
    if isinstance(value, str) and _URL.fullmatch(value):
        raise unfit("nothing is fetched; expected a data: URL with the bytes")
    if isinstance(value, str) and value[:5].lower() == "data:":
        head, _, data = value.partition(",")
        found = _DATA_HEAD.fullmatch(head.strip())
        if found is None:
            raise unfit("the data: URL must say its MIME type and that it is base64: data:image/png;base64,…")
        mime, data = found[1], _base64(data.strip())
    elif {"base64", "mime"} <= keys <= {"base64", "mime"} | named:
        mime, data, filename = _mime(value["mime"]), _base64(value["base64"]), _filename(value)
    elif "path" in keys and keys <= {"path", "mime"} | named:
        if files_dir is None:
            refused = "path: files of this machine are not read; DSPY_BRIDGE_FILES_DIR can name a folder of them"
            raise unfit(refused, NOT_ALLOWED)
        try:
            real, content = read_file(files_dir, value["path"], MAX_FILE_BYTES, "DSPY_BRIDGE_FILES_DIR")
        except PydanticCustomError as error:
            raise unfit(f"path: {error}", error.type) from None
        mime, data = _mime(value.get("mime") or mimetypes.guess_type(real)[0]), base64.b64encode(content).decode()
        filename = _filename(value) or os.path.basename(real)
    else:
        raise unfit(f"expected {forms}, {{base64, mime}} or {{path}}")
    mime = mime.lower()
    if kind != "file" and not mime.startswith(f"{kind}/"):
        raise unfit(f"expected the type {kind}/…, not {mime}")
    return mime, data, filename


def _mime(value: object) -> str:
    if not isinstance(value, str) or not _MIME.fullmatch(value):
        raise unfit("mime: expected a MIME type such as image/png")
    return value


def _filename(value: dict[str, Any]) -> str | None:
    name = value.get("filename")
    if name is not None and not isinstance(name, str):
        raise unfit("filename: expected text")
    return name


def _base64(data: object) -> str:
    """The given string, if it is base64."""
    if not isinstance(data, str):
        raise unfit("base64: expected text")
    try:
        if base64.b64decode(data, validate=True):
            return data
    except ValueError:
        pass
    raise unfit("the content is not base64 (standard alphabet, with padding, no line breaks)")


# Do not wait for pipes or devices, do not follow links, and do not let child processes inherit the descriptor.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


def read_file(folder: str, path: object, most: int, setting: str) -> tuple[str, bytes]:
    """The real path and the content of a file inside a folder, even if links change meanwhile.

    Raises `unfit`. `setting`: that of the folder.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise unfit("expected the name of a file")
    try:
        root = os.path.realpath(folder)
        # Links and `..` are resolved first; then each folder on the way is opened without following links.
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath((root, real)) != root:
            raise unfit(f"leads out of the folder of {setting}", NOT_ALLOWED)
        descriptor = os.open(root, _FLAGS)
        try:
            for name in Path(real).relative_to(root).parts:
                outer, descriptor = descriptor, os.open(name, _FLAGS, dir_fd=descriptor)
                os.close(outer)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise unfit("expected a regular file")
            if status.st_size > most:
                raise unfit(f"expected a file of at most {most} bytes")
            with open(descriptor, "rb", closefd=False) as opened:
                return real, opened.read(most)
        finally:
            os.close(descriptor)
    except UnicodeEncodeError:
        raise unfit("no name that a file can have") from None
    except OSError as error:
        raise unfit(f"cannot be read: {error.strerror}") from None
