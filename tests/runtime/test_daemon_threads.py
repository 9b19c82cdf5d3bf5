"""daemon_threads: an executor like Python's own, less the wait for its threads at the end of the process."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError

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
