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

# A lazy program whose load failed is loaded again after so long: it may take long, and most failures are not temporary;
# that of DSPy's set-up may be.
_RELOAD_SECONDS = 60.0
_SETUP_SECONDS = 1.0


class ProgramLoader:
    """One per peer. DSPy lets only the thread that configured it first configure it again, so there is one thread."""

    def __init__(self, settings: Settings, threads: WorkerThreads) -> None:
        """`threads` are for modules without an async forward."""
        self._settings = settings
        self._threads = threads
        self._lms: LMs | None = None

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
            seconds = _SETUP_SECONDS if isinstance(error, SetupFailed) else _RELOAD_SECONDS
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
        """Calls of LMs that wait for the limits of their account, and what is known of DSPy once it is set up."""
        if self._lms is None:
            return {"lm_waiting": 0, "default_adapter": None, "degraded": [], "react": None}
        from dspy_bridge.lm import dspy_internals, lm_call
        from dspy_bridge.programs import agents

        return {
            "lm_waiting": lm_call.waiting(),
            "default_adapter": self._lms.default_adapter,
            "degraded": sorted(dspy_internals.degraded),
            "react": agents.version(self._settings.react),
        }

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
        try:
            return Program(definition, self._lms, self._threads)
        except SystemError:
            # Two threads parsed Python at once: python/cpython issue 106905, up to 3.11.
            return Program(definition, self._lms, self._threads)

    def _load_dspy(self) -> LMs:
        try:
            return _import()(self._settings)
        except BaseException as error:  # user code and DSPy's own may raise anything
            why = str(error) if isinstance(error, SetupFailed) else f"DSPy cannot be set up: {error}"
            raise SetupFailed(f"{why}; the peer's log has the traceback under {logs.exception(error)}") from None


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
