"""The descriptors of the peer. Those of frames are moved away from 0 and 1 before code that might print is imported.

Afterwards whatever Python code, C code or a child process prints goes to stderr, and a read from stdin finds the end of
input: neither can break the protocol.
"""

import fcntl
import os
import resource

# Descriptors that the peer itself needs: 15 with programs loaded, more during imports and name look-ups.
RESERVED = 32

# From 0, the default, to 1000.
_OOM_SCORE = 500

# Plenty: 256 runs, and 64 LMs with idle connections. Programs that the peer starts inherit the limit, and some of them
# visit every number up to it.
MOST_FILES = 65_536


def raise_open_files() -> int:
    """Raise the limit of open files as far as it may be; returns how many connections it allows, at least one.

    1,024 are usual, so that old code may use `select`; a burst of calls leaves as many idle connections to LMs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        except (OSError, ValueError):
            pass  # macOS has a lower limit of its own
    return 1_000_000 if soft == resource.RLIM_INFINITY else max(1, soft - RESERVED)


def raise_oom_score() -> None:
    """If memory runs out, make Linux kill this process rather than the BEAM, which starts another one."""
    try:
        with open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:
            if int(file.read()) < _OOM_SCORE:
                file.write(b"%d" % _OOM_SCORE)
    except (OSError, ValueError):
        pass  # it is only a preference, and only Linux has it


def take() -> tuple[int, int]:
    """Move stdin and stdout away; returns `(reading, writing)`. Raises `OSError` if one of them is closed."""
    # At least 3: of the standard three one may be closed, and a copy would take its number.
    reading, writing = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (0, 1))
    # It may be inherited as non-blocking, where a read that finds nothing raises.
    os.set_blocking(reading, True)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    try:
        os.dup2(2, 1)
    except OSError:
        # There is no stderr: discard what is printed.
        for fd in (1, 2):
            os.dup2(null, fd)
    if null > 2:
        os.close(null)
    return reading, writing


def keep_from_children(*fds: int) -> None:
    """Close `fds` in forks from now on. Close-on-exec, which they have, does nothing for forks without an exec."""

    def leave_to_parent() -> None:
        # In a child that outlives the peer they would hide its end from the owner and the watchdog.
        for fd in fds:
            os.close(fd)

    os.register_at_fork(after_in_child=leave_to_parent)


def log(line: str) -> None:
    """Write a line to stderr without `logging`, whose import takes 10 ms."""
    _write(f"dspy_bridge[{os.getpid()}]: {line}\n")


def refuse(why: str) -> int:
    """Write why the process does not start; returns its exit code."""
    _write(f"dspy_bridge: {why}\n")
    return 2


def _write(line: str) -> None:
    try:
        os.write(2, line.encode())
    except OSError:
        pass  # stderr is closed or nobody reads it; replies must not depend on it
