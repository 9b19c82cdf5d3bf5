"""daemon_threads: an executor like Python's own, less the wait for its threads at the end of the process."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
from peer import ROOT

from dspy_bridge.runtime.daemon_threads import DaemonThreads

PATIENCE = 20.0


def test_work_runs_beside_each_other_up_to_the_limit_and_what_is_cancelled_first_never_does() -> None:
    threads = DaemonThreads(3, "test")
    meet, release = threading.Barrier(4), threading.Event()

    def work() -> bool:
        meet.wait(PATIENCE)
        return release.wait(PATIENCE)

    running = [threads.submit(work) for _ in range(3)]
    meet.wait(PATIENCE)
    ran: list[str] = []
    unwanted, late = threads.submit(ran.append, "unwanted"), threads.submit(ran.append, "late")
    assert not late.running() and unwanted.cancel() and not running[0].cancel()
    release.set()
    assert all(future.result(PATIENCE) for future in running)
    late.result(PATIENCE)
    assert ran == ["late"]
    with pytest.raises(CancelledError):
        unwanted.result(PATIENCE)


def test_of_what_is_done_nothing_is_kept() -> None:
    """Not by a thread that waits for more, nor by the traceback of an error."""

    class Big:
        pass

    def work(big: Big, fail: bool) -> int:
        return 1 // (not fail)

    threads = DaemonThreads(1, "test")
    gc.disable()
    try:
        for fail in (False, True):
            big, gone = Big(), threading.Event()
            weakref.finalize(big, gone.set)
            future: Future[Any] = threads.submit(work, big, fail)
            assert (future.exception(PATIENCE) is not None) == fail
            del big, future
            assert gone.wait(PATIENCE)
    finally:
        gc.enable()


def test_the_process_ends_while_they_work() -> None:
    """Python's own executor would have it wait for ever."""
    program = """
import threading
from dspy_bridge.runtime.daemon_threads import DaemonThreads
started = threading.Event()
DaemonThreads(1, "test").submit(lambda: (started.set(), threading.Event().wait()))
assert started.wait(20)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=30, check=False, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
