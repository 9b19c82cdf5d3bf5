"""Files that a request names: read from the one folder where they may be, wherever links lead meanwhile. Pure."""

from __future__ import annotations

import fcntl
import os
import stat

# A pipe or a device would be waited for, and the last name must not have become a link. Child processes get none.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class Unreadable(Exception):
    """There is no such file, or not one to be read. Its text follows the name of the field."""


class Outside(Exception):
    """The path leads out of the folder."""


def read(folder: str, path: object, most: int) -> tuple[str, bytes]:
    """Where the file really is, and what is in it. Raises `Unreadable` or `Outside`."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise Unreadable("expected the name of a file")
    try:
        root = os.path.realpath(folder)
        # Links and `..` are followed first; what is opened then is that very name.
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
        # A folder on the way may have become a link since: what was opened is what counts.
        if not _is_in(_place_of_folder(root), _place(descriptor, real)):
            raise Outside
        told = os.fstat(descriptor)
        if not stat.S_ISREG(told.st_mode):
            raise Unreadable("expected a regular file")
        if told.st_size > most:
            raise Unreadable(f"expected a file of at most {most} bytes")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(descriptor)


def _is_in(root: str, place: str) -> bool:
    return os.path.isabs(place) and os.path.commonpath((root, place)) == root


def _place_of_folder(root: str) -> str:
    """The folder as the system itself names it: a macOS disk takes a name in any case, and tells it in one."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _place(descriptor, root)
    finally:
        os.close(descriptor)


def _place(descriptor: int, opened: str) -> str:
    """Where an open file is. Raises `Outside` if that cannot be told."""
    get_path = getattr(fcntl, "F_GETPATH", None)  # macOS
    if get_path is not None:
        return os.fsdecode(fcntl.fcntl(descriptor, get_path, bytes(1024)).rstrip(b"\0"))
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        pass
    # Neither: the name has to lead to it still, and without a link.
    real = os.path.realpath(opened)
    if not os.path.samestat(os.fstat(descriptor), os.stat(real)):
        raise Outside
    return real
