"""Frames get descriptors of their own before any code that might print is imported.

Whatever Python code, C code or a child process writes to descriptor 1 afterwards lands on stderr, and what reads
descriptor 0 finds the end of input: neither can break the protocol.
"""

import fcntl
import os
import resource

# What Linux lets any user ask for. With pipes of 64 KB, 1 MB of arguments takes a tenth longer.
PIPE_BYTES = 1 << 20

# What the peer itself has open, at most: 13 when programs are loaded, more while something is imported or looked up.
RESERVED = 32


def spare() -> int:
    """How many connections the limit of open files leaves room for; at least one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1_000_000 if soft == resource.RLIM_INFINITY else max(1, soft - RESERVED)


def take() -> tuple[int, int]:
    """Move stdin and stdout away; return `(reading, writing)`, descriptors that no program started from here has.

    Raises `OSError` if one of them is closed.
    """
    # Above the standard three, one of which may be closed and would otherwise be taken by a copy.
    reading, writing = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (0, 1))
    for fd in (reading, writing):
        _enlarge(fd)
    # Whoever started us may have left it so; a read that finds nothing is not the end of input.
    os.set_blocking(reading, True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    try:
        os.dup2(2, 1)
    except OSError:
        # No stderr either: what is printed goes nowhere.
        for fd in (1, 2):
            os.dup2(null, fd)
    if null > 2:
        os.close(null)
    return reading, writing


def keep_from_children(*fds: int) -> None:
    """Close `fds` in whatever this process forks from now on; they are close-on-exec already.

    Close-on-exec does nothing for a fork that executes nothing, as multiprocessing may do.
    """

    def leave_to_parent() -> None:
        # A child that lives on would keep the owner, and the watchdog, from seeing our end.
        for fd in fds:
            os.close(fd)

    os.register_at_fork(after_in_child=leave_to_parent)


def _enlarge(fd: int) -> None:
    """Make a pipe hold more at once. Only Linux can; nothing depends on it."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # no pipe, or more than the system grants
