"""A second process that kills the peer when its owner is gone, and the peer's descendants when the peer is gone.

The peer itself cannot promise that: after a SIGKILL, or in a C call that holds the interpreter, it runs no code. So it
makes itself leader of a process group and forks this watchdog while it is small and has one thread. The watchdog sleeps
until one of these happens:

- The peer is gone. It kills the peer's group, and every process with the peer's mark, an environment variable that
  descendants inherit. It is not in that group itself.
- The owner is gone: both descriptors of frames have lost their other end. The peer has a grace period to exit, then it
  is killed with its descendants and its group.
- The peer, about to exit, asks for the end of its descendants. They are killed, also those in sessions of their own.
  Finding them takes hundreds of system calls, each of which might cost the peer the interpreter lock.

PR_SET_PDEATHSIG does not help: it fires when the *thread* that started the peer ends, which need not be the owner's
end, and it kills the peer before anything has seen its descendants.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import time

# A peer whose interpreter runs exits within 10 ms, with 64 busy threads within 280. The promise is 1 s.
GRACE_SECONDS = 0.3
# The longest that the peer waits for the end of its descendants; usual are 3 ms.
ANSWER_SECONDS = 0.5
# With no event requested, poll on Linux still reports that the other end is gone. On macOS it does not: there it polls
# for room to write, which there mostly is, so only from time to time. The grace period is a multiple of that time.
POLL_TELLS_ENDS = sys.platform.startswith("linux")
LOOK_SECONDS = 0.1
# Set in the environment of all descendants, which identifies them when their parent is gone.
MARK = "DSPY_BRIDGE_PEER"

# The process that the watchdog belongs to. In its forks these globals have the same values.
_peer = 0
# Whether the end of input was reached, which is what exit status 0 means.
served = False
# Pipes for the request to kill the descendants, and its answer.
_ask = _answer = -1


def start(reading: int, writing: int) -> tuple[int, int]:
    """Fork the watchdog, before there are threads; returns descriptors that no child may inherit."""
    global _peer, _ask, _answer
    _peer = os.getpid()
    # With the time, as a later peer may have the same pid.
    os.environ[MARK] = f"{_peer}-{time.time_ns()}"
    # Registered first, so it runs last: other exit handlers may need their children.
    atexit.register(_end)
    try:
        os.setpgid(0, 0)
    except OSError:
        pass  # already the leader of a session, and so of its group
    asked, _ask = os.pipe()
    _answer, answers = os.pipe()
    if os.fork() == 0:
        try:
            os.close(_ask)
            os.close(_answer)
            leads = os.getpgrp() == _peer
            try:
                os.setpgid(0, 0)
            except OSError:
                pass
            _watch(asked, answers, reading, writing, leads)
        finally:
            os._exit(0)
    os.close(asked)
    os.close(answers)
    return _ask, _answer


def _end() -> None:
    end_children()
    if os.getpid() == _peer and served:
        sys.stdout.flush()
        # Python's own end would stop threads inside of extension modules, as while DSPy is imported: that may abort.
        os._exit(0)


def end_children() -> None:
    """Kill all descendants of this process, at its end. Takes some ms, at most 0.5 s; any thread; never raises."""
    if os.getpid() != _peer:
        return  # a fork of the peer
    try:
        os.write(_ask, b".")
        # The answer is not read: two threads may wait for it.
        _polled(_answer, select.POLLIN, ANSWER_SECONDS)
    except OSError:
        pass  # somebody killed the watchdog


def _watch(asked: int, answers: int, reading: int, writing: int, leads: bool) -> None:
    """Wait for the end of the peer or its owner, then kill the rest. `leads`: the peer leads a process group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _wait(asked, answers, {reading: select.POLLIN, writing: select.POLLOUT})
    # While it is the parent, its pid cannot be reused; just after its end that is unlikely.
    alive = os.getppid() == _peer
    _kill_descendants(_peer if alive else None)
    if alive:
        os.kill(_peer, signal.SIGKILL)
    if leads:
        try:
            os.killpg(_peer, signal.SIGKILL)
        except OSError:
            pass  # the group is empty


def _wait(asked: int, answers: int, frames: dict[int, int]) -> None:
    """Return when the peer is gone, or the grace period is over after both `frames` have lost their other end."""
    poller = select.poll()
    poller.register(asked, select.POLLIN)
    if POLL_TELLS_ENDS:
        for fd in frames:
            poller.register(fd, 0)
    end: float | None = None
    while end is None or time.monotonic() < end:
        ready = poller.poll(None if POLL_TELLS_ENDS and end is None else LOOK_SECONDS * 1000)
        if any(fd == asked for fd, _ in ready):
            if not os.read(asked, 1):
                return
            _kill_descendants(_peer)
            try:
                os.write(answers, b".")
            except OSError:
                pass  # the peer did not wait; the next read finds it gone
        for fd in [fd for fd, usual in frames.items() if _polled(fd, usual, 0) & (select.POLLHUP | select.POLLERR)]:
            # One alone does not mean that the owner is gone. Unregistered, as poll would report it for ever.
            del frames[fd]
            if POLL_TELLS_ENDS:
                poller.unregister(fd)
            if not frames:
                end = time.monotonic() + GRACE_SECONDS
                # Needed after that. Sooner it would cost each watchdog 3 MB.
                import psutil  # noqa: F401


def _polled(fd: int, events: int, seconds: float) -> int:
    poller = select.poll()
    poller.register(fd, events)
    return next((seen for _, seen in poller.poll(seconds * 1000)), 0)


def _kill_descendants(root: int | None) -> None:
    """Kill the descendants of `root`, and all processes with the mark. `root`: None once it is gone, for pid reuse."""
    import psutil

    children: dict[int, list[int]] = {}
    found: list[int] = []
    for process in psutil.process_iter(["ppid", "environ"]):
        children.setdefault(process.info["ppid"], []).append(process.pid)
        # None: another user's.
        if (process.info["environ"] or {}).get(MARK) == os.environ[MARK]:
            found.append(process.pid)
    if root is not None:
        found += children.get(root, ())
    for pid in found:
        found += (child for child in children.get(pid, ()) if child not in found)
    for pid in set(found) - {root, os.getpid()}:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass  # it has ended, or is another user's
