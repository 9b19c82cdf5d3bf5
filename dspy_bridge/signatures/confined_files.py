"""Reads a file that a request names, only from inside one folder, even if links change meanwhile."""

from __future__ import annotations

import os
import stat
from pathlib import Path

# Do not wait for pipes or devices, do not follow links, and do not let child processes inherit the descriptor.
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
        # Links and `..` are resolved first; then each folder on the way is opened without following links.
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath((root, real)) != root:
            raise Outside
        return real, _read(root, Path(real).relative_to(root).parts, most)
    except UnicodeEncodeError:
        raise Unreadable("no name that a file can have") from None
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None


def _read(root: str, names: tuple[str, ...], most: int) -> bytes:
    descriptor = os.open(root, _FLAGS)
    try:
        for name in names:
            outer, descriptor = descriptor, os.open(name, _FLAGS, dir_fd=descriptor)
            os.close(outer)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("expected a regular file")
        if status.st_size > most:
            raise Unreadable(f"expected a file of at most {most} bytes")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)
