"""Loads programs in a thread of its own, which imports DSPy before; the first program sets it up."""

from __future__ import annotations

import functools
import gc
import time

from dspy_bridge import logs
from dspy_bridge.commands import arguments
from dspy_bridge.dispatch import replies
from dspy_bridge.errors import LoadFailed, SetupFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future
    from typing import Any

    from dspy_bridge.commands.program_registry import Entry
    from dspy_bridge.lm.dspy_setup import LMs
    from dspy_bridge.programs.program import Program
    from dspy_bridge.runtime.daemon_threads import DaemonThreads
    from dspy_bridge.runtime.worker_threads import WorkerThreads
    from dspy_bridge.settings import Settings

# The cause of a failed set-up may be temporary. Until the next attempt, requests get the last failure.
_RETRY_SECONDS = 1.0
# The same of a lazy program whose load failed: loading may take long, and most failures are not temporary.
_RELOAD_SECONDS = 60.0
# Changes between two calls of `freeze`. A removed program is 15 KB: fewer are not worth a collection.
EVERY = 256


class GcFreezer:
    """Keeps loaded programs out of full garbage collections, which visit every object and stop all threads.

    With 10,000 programs one took 210 ms, and under load there was one every 1,500 runs: with 5,000 programs this saves
    runs a sixth of their CPU. Frozen objects are not visited, but not collected either, so garbage is collected before:
    4 ms for 256 programs. A removed program is a reference cycle, as its class is one; so after enough removals
    everything is unfrozen first. When due, call `freeze`, on a thread that nobody waits for.
    """

    def __init__(self) -> None:
        # Threads may lose a count to each other.
        self._changes = 0
        self._removed = False

    def changed(self, count: int, removed: bool) -> bool:
        """Count loaded programs, or removed ones. Returns whether `freeze` is due."""
        self._changes += count
        self._removed = self._removed or removed
        return self._changes >= EVERY

    def freeze(self) -> None:
        """Collect garbage, that of removed programs too, and freeze all other objects."""
        removed, self._changes, self._removed = self._removed, 0, False
        if removed:
            gc.unfreeze()
        gc.collect()
        gc.freeze()


class ProgramLoader:
    """One per peer. DSPy lets only the thread that configured it first configure it again, so there is one thread."""

    def __init__(self, settings: Settings, threads: WorkerThreads) -> None:
        """`threads` are for modules without an async forward."""
        self._settings = settings
        self._threads = threads
        self._lms: LMs | None = None
        # The last failure, and when that was.
        self._setup_failed: tuple[str, float] | None = None
        self._gc = GcFreezer()

    async def load(self, entry: Entry) -> Program:
        """The program of an entry, loaded once for all that need it. Raises `LoadFailed` for a lazy one."""
        import asyncio

        if entry.failure is not None and time.monotonic() < entry.reload_at:
            raise LoadFailed(entry.id, entry.failure)
        if entry.loading is None:
            entry.loading = asyncio.create_task(self._load(entry))
            # Retrieved in any case: all waiters may have been cancelled, and asyncio would log the failure.
            entry.loading.add_done_callback(lambda done: done.cancelled() or done.exception())
        # A cancelled waiter does not stop it for the others.
        return await asyncio.shield(entry.loading)

    async def _load(self, entry: Entry) -> Program:
        """Records how the load ended, before any waiter sees it. That of a lazy program may be tried again."""
        try:
            program = await self.build(entry.definition)
        except BaseException as error:  # user code may raise anything
            if not entry.lazy:
                raise
            entry.loading = None
            entry.failure = replies.describe(error)
            seconds = _RETRY_SECONDS if isinstance(error, SetupFailed) else _RELOAD_SECONDS
            entry.reload_at = time.monotonic() + seconds
            raise LoadFailed(entry.id, entry.failure) from None
        entry.loaded, entry.failure = True, None
        return program

    def build(self, definition: dict[str, Any]) -> asyncio.Future[Program]:
        """A program of a definition, loaded anew. On the event loop."""
        import asyncio

        return asyncio.get_running_loop().run_in_executor(self._thread, self._make, definition)

    def preload(self) -> Future[None]:
        """Begin DSPy's import, for which the first program would wait. On the event loop's thread."""
        return self._thread.submit(self._import_dspy)

    def lm_stats(self) -> dict[str, Any]:
        """Calls of LMs that wait for the limits of their account, names inside DSPy that are not as expected, and which
        ReAct agents are; of that nothing before DSPy is set up."""
        if self._lms is None:
            return {"lm_waiting": 0, "degraded": [], "react": None}
        from dspy_bridge.lm import dspy_internals, lm_call
        from dspy_bridge.programs import agents

        degraded, react = sorted(dspy_internals.degraded), agents.version(self._settings.react)
        return {"lm_waiting": lm_call.waiting(), "degraded": degraded, "react": react}

    def removed(self, count: int) -> None:
        """So many programs have been removed: their memory can be collected. From any thread."""
        if self._gc.changed(count, removed=True) and self._lms is not None:
            self._thread.submit(self._gc.freeze)

    @functools.cached_property
    def _thread(self) -> DaemonThreads:
        from dspy_bridge.runtime.daemon_threads import DaemonThreads

        return DaemonThreads(1, "dspy_bridge-loader")

    def _import_dspy(self) -> None:
        try:
            logs.set_up()
            _import()
        except BaseException:
            pass  # the first program imports it again, and its reply has the failure

    def _make(self, definition: dict[str, Any]) -> Program:
        if self._lms is None:
            self._lms = self._load_dspy()
        from dspy_bridge.programs.program import Program

        if definition.get("lazy"):
            arguments.check_create(definition)
        program = Program(definition, self._lms, self._threads)
        if self._gc.changed(1, removed=False):
            self._gc.freeze()
        return program

    def _load_dspy(self) -> LMs:
        if self._setup_failed is not None and time.monotonic() < self._setup_failed[1] + _RETRY_SECONDS:
            raise SetupFailed(self._setup_failed[0])
        try:
            lms = _import()(self._settings)
        except BaseException as error:  # user code and DSPy's own may raise anything
            why = str(error) if isinstance(error, SetupFailed) else f"DSPy cannot be set up: {error}"
            why = f"{why}; the peer's log has the traceback under {logs.exception(error)}"
            self._setup_failed = why, time.monotonic()
            raise SetupFailed(why) from None
        return lms


@functools.cache
def _import() -> type[LMs]:
    """Import DSPy and all that a program needs, without the garbage collections that take 140 of its 500 ms."""
    gc.disable()
    try:
        from dspy_bridge.lm.dspy_setup import LMs
        from dspy_bridge.programs import program  # noqa: F401
    finally:
        gc.freeze()  # 73,000 objects, of which 2,000 are garbage
        gc.enable()
    return LMs
