"""A second process that ends what the peer cannot: what it leaves behind, and itself once its owner is gone.

Python alone cannot promise that: a SIGKILL leaves it no moment, a C call that holds the interpreter no turn. So the
peer makes itself leader of a process group and forks this watchdog while it is small and has one thread. It sleeps
until

- the peer is gone, however it went, be it with its whole group, in which the watchdog is not: then it kills what it
  left: its group, and what bears its mark, a variable in the environment of all that it starts;
- the owner is gone, which it is when both descriptors of frames have no other end any more: then the peer has a grace
  to leave by itself, after which it is killed, and with it its descendants and its group;
- the peer, about to leave, asks for the end of its descendants: then these are killed, also those that are in a session
  of their own. Looking for them takes hundreds of calls, each of which would cost the peer a turn of its interpreter.

PR_SET_PDEATHSIG would be no help: it strikes when the *thread* that started the peer ends, which need not be an owner's
death, and it takes the peer before anybody has seen what that had started.
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

# A peer whose interpreter runs is gone after 10 ms, beside 64 busy threads after 80 to 280. The promise is 1 s.
GRACE_SECONDS = 0.3
# What the peer waits at most for the end of its descendants; it takes 3 ms.
ANSWER_SECONDS = 0.5
# Asked for no event, Linux's poll still tells that the other end is gone. That of macOS then tells nothing: there it is
# asked for room to write, which there mostly is, so only from time to time.
POLL_TELLS_ENDS = sys.platform.startswith("linux")
LOOK_SECONDS = 0.1
PROC = "/proc"
# In the environment of what the peer starts, and what that starts: how they are known once their parent is gone.
MARK = "DSPY_BRIDGE_PEER"

# The process that has the watchdog. Its forks have these names too, but no right to them.
_peer = 0
_watchdog = 0
# Where the peer asks, and where it is answered.
_ask: int | None = None
_answer: int | None = None


def start(reading: int, writing: int) -> tuple[int, ...]:
    """Fork the watchdog, which watches these two descriptors; return those that no child may have.

    To be called once, before there are threads. If there can be no watchdog, that is logged and the peer goes without.
    """
    global _peer, _watchdog, _ask, _answer
    _peer = os.getpid()
    # The number alone will be another's one day, and be in the environment of what this one has left.
    os.environ[MARK] = f"{_peer}-{time.time_ns()}"
    # The first to be registered runs as the last: exit handlers may need what they have started.
    atexit.register(end_children)
    try:
        os.setpgid(0, 0)
    except OSError:
        pass  # the leader of a session, and so of its group
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
    """Kill all descendants of this process. For its end: takes some ms, at most 0.5 s, on any thread; never raises."""
    if os.getpid() != _peer:
        return  # a fork that ends has not this duty
    if _ask is not None and _answer is not None:
        try:
            os.write(_ask, b".")
            # The answer stays there: of two threads that end the process, one would take that of the other.
            if _polled(_answer, select.POLLIN, ANSWER_SECONDS) & select.POLLIN:
                return
        except OSError:
            pass  # somebody killed the watchdog
    _kill_descendants(spared=_watchdog)


def _watch(asked: int, answers: int, reading: int, writing: int, leads: bool) -> None:
    """Wait for the end of the peer or its owner, then end the rest. `leads`: the peer has a group of its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _wait(asked, answers, {reading: select.POLLIN, writing: select.POLLOUT})
    # As long as it is our parent, its number is nobody else's; just after its end, hardly anybody's.
    alive = os.getppid() == _peer
    _kill_descendants(spared=os.getpid(), peer_alive=alive)
    if alive:
        os.kill(_peer, signal.SIGKILL)
    if leads:
        try:
            os.killpg(_peer, signal.SIGKILL)
        except OSError:
            pass  # nobody is left in it


def _wait(asked: int, answers: int, frames: dict[int, int]) -> None:
    """Return when the peer is gone, or when it was to be: both `frames` have no other end any more, for a while."""
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
                pass  # the peer did not wait; the next read says that it is gone
        for fd in [fd for fd, usual in frames.items() if _polled(fd, usual, 0) & (select.POLLHUP | select.POLLERR)]:
            # One end alone is no death. It would be told again and again.
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
    # Once the peer is gone, its number is anybody's.
    for pid in _descendants(_peer if peer_alive else None):
        if pid != spared:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass  # ended meanwhile, or another user's


def _descendants(root: int | None) -> set[int]:
    """What `root` started and what those started, and all that bear the mark."""
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
    """All processes, their parents, the environments of the user's own. As psutil does, whose import takes 25 ms."""
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
