"""Reads a file that a request names, only from inside one folder, even if links change meanwhile."""

from __future__ import annotations

import fcntl
import os
import stat

# Not waiting for pipes or devices; the last name must not have become a link; not inherited by child processes.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class Unreadable(Exception):
    """The file does not exist or cannot be read. Its text follows the name of the field."""


class Outside(Exception):
    """The path leads outside the folder."""


def read(folder: str, path: object, most: int) -> tuple[str, bytes]:
    """The file's real path and its content. Raises `Unreadable` or `Outside`."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise Unreadable("expected the name of a file")
    try:
        root = os.path.realpath(folder)
        # Links and `..` are resolved first, then the resolved name is opened.
        real = os.path.realpath(os.path.join(root, path))
        if not _is_in(root, real):
            raise Outside
        return real, _read(root, real, most)
    except UnicodeEncodeError:
        raise Unreadable("no name that a file can have") from None
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None


def _read(root: str, real: str, most: int) -> bytes:
    descriptor = os.open(real, _FLAGS)
    try:
        # A folder on the way may have become a link since: check the open file.
        if not _is_in(_place_of_folder(root), _place(descriptor)):
            raise Outside
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("expected a regular file")
        if status.st_size > most:
            raise Unreadable(f"expected a file of at most {most} bytes")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def _is_in(root: str, place: str) -> bool:
    return os.path.isabs(place) and os.path.commonpath((root, place)) == root


def _place_of_folder(root: str) -> str:
    """The folder's path as the system spells it: macOS disks ignore case."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _place(descriptor)
    finally:
        os.close(descriptor)


def _place(descriptor: int) -> str:
    """The path of an open file."""
    get_path = getattr(fcntl, "F_GETPATH", None)  # macOS
    if get_path is not None:
        return os.fsdecode(fcntl.fcntl(descriptor, get_path, bytes(1024)).rstrip(b"\0"))
    return os.readlink(f"/proc/self/fd/{descriptor}")
