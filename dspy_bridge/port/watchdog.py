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

from dspy_bridge.port.stderr import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# A peer whose interpreter runs exits within 10 ms, with 64 busy threads within 280. The promise is 1 s.
GRACE_SECONDS = 0.3
# The longest that the peer waits for the end of its descendants; usual are 3 ms.
ANSWER_SECONDS = 0.5
# With no event requested, poll on Linux still reports that the other end is gone. On macOS it does not: there it polls
# for room to write, which there mostly is, so only from time to time.
POLL_TELLS_ENDS = sys.platform.startswith("linux")
LOOK_SECONDS = 0.1
PROC = "/proc"
# Set in the environment of all descendants, which identifies them when their parent is gone.
MARK = "DSPY_BRIDGE_PEER"

# The process that the watchdog belongs to. In its forks these globals have the same values.
_peer = 0
_watchdog = 0
# Pipes for the request to kill the descendants, and its answer.
_ask: int | None = None
_answer: int | None = None


def start(reading: int, writing: int) -> tuple[int, ...]:
    """Fork the watchdog, which watches these two descriptors; returns those that no child may inherit.

    Call it once, before there are threads. If the fork fails, that is logged and the peer runs without a watchdog.
    """
    global _peer, _watchdog, _ask, _answer
    _peer = os.getpid()
    # With the time, as a later peer may have the same pid.
    os.environ[MARK] = f"{_peer}-{time.time_ns()}"
    # Registered first, so it runs last: other exit handlers may need their children.
    atexit.register(end_children)
    try:
        os.setpgid(0, 0)
    except OSError:
        pass  # already the leader of a session, and so of its group
    fds: list[int] = []
    try:
        fds += os.pipe()
        fds += os.pipe()
        asked, _ask, _answer, answers = fds
        _watchdog = os.fork()
    except OSError as error:
        log(f"no watchdog: {error.strerror}; what is started here may be left when this process is killed")
        for fd in fds:
            os.close(fd)
        _ask = _answer = None
        return ()
    if _watchdog == 0:
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


def end_children() -> None:
    """Kill all descendants of this process, at its end. Takes some ms, at most 0.5 s; any thread; never raises."""
    if os.getpid() != _peer:
        return  # a fork of the peer
    if _ask is not None and _answer is not None:
        try:
            os.write(_ask, b".")
            # The answer is not read: two threads may wait for it.
            if _polled(_answer, select.POLLIN, ANSWER_SECONDS) & select.POLLIN:
                return
        except OSError:
            pass  # somebody killed the watchdog
    _kill_descendants(spared=_watchdog)


def _watch(asked: int, answers: int, reading: int, writing: int, leads: bool) -> None:
    """Wait for the end of the peer or its owner, then kill the rest. `leads`: the peer leads a process group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _wait(asked, answers, {reading: select.POLLIN, writing: select.POLLOUT})
    # While it is the parent, its pid cannot be reused; just after its end that is unlikely.
    alive = os.getppid() == _peer
    _kill_descendants(spared=os.getpid(), peer_alive=alive)
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
        if end is not None:
            seconds: float | None = max(0.0, end - time.monotonic())
        else:
            seconds = None if POLL_TELLS_ENDS else LOOK_SECONDS
        ready = poller.poll(None if seconds is None else seconds * 1000)
        if any(fd == asked for fd, _ in ready):
            if not os.read(asked, 1):
                return
            _kill_descendants(spared=os.getpid())
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


def _polled(fd: int, events: int, seconds: float) -> int:
    poller = select.poll()
    poller.register(fd, events)
    return next((seen for _, seen in poller.poll(seconds * 1000)), 0)


def _kill_descendants(spared: int, peer_alive: bool = True) -> None:
    # Once the peer is gone, its pid may be reused.
    for pid in _descendants(_peer if peer_alive else None):
        if pid != spared:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass  # it has ended, or is another user's


def _descendants(root: int | None) -> set[int]:
    """The descendants of `root`, and all processes with the mark."""
    if not os.path.exists(f"{PROC}/self/stat"):
        return _descendants_by_psutil(root)
    mark = f"{MARK}={os.environ[MARK]}\0".encode()
    children: dict[int, list[int]] = {}
    found = []
    for pid, parent, environment in _processes():
        children.setdefault(parent, []).append(pid)
        if mark in environment:
            found.append(pid)
    if root is not None:
        found += children.get(root, ())
    for pid in found:
        found += (child for child in children.get(pid, ()) if child not in found)
    return set(found) - {root}


def _processes() -> Iterator[tuple[int, int, bytes]]:
    """The pid, parent and environment of each process. As psutil does, whose import takes 25 ms."""
    for name in os.listdir(PROC):
        if name.isdecimal():
            line = _read(f"{PROC}/{name}/stat")
            if line:
                # After the name, which is in brackets and may hold anything: the state, the parent.
                yield int(name), int(line.rpartition(b")")[2].split()[1]), _read(f"{PROC}/{name}/environ")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""  # ended meanwhile, or another user's


def _descendants_by_psutil(root: int | None) -> set[int]:
    try:
        import psutil
    except Exception:
        return set()  # not installed
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == os.environ[MARK]:
                found.add(process.pid)
        except psutil.Error:
            continue  # ended meanwhile, or another user's
    if root is not None:
        try:
            found.update(process.pid for process in psutil.Process(root).children(recursive=True))
        except psutil.Error:
            pass
    return found
