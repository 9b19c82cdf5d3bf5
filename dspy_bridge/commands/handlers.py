"""The six commands: arguments checked once, then the call. No DSPy is imported before a program needs it."""

from __future__ import annotations

import os
import time

from dspy_bridge import __version__
from dspy_bridge.commands import arguments
from dspy_bridge.commands.program_registry import Entry, Registry, working
from dspy_bridge.dispatch.call import Call, Command
from dspy_bridge.errors import InvalidArgs, ProgramNotFound, SetupFailed
from dspy_bridge.runtime.gc_freeze import GcFreezer
from dspy_bridge.runtime.worker_threads import WorkerThreads
from dspy_bridge.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from typing import Any

    from dspy_bridge.lm.dspy_setup import Models
    from dspy_bridge.programs.program import Program
    from dspy_bridge.settings import Settings

_CREATE_ARGS = (
    "id",
    "signature",
    "program_type",
    "lm",
    "adapter",
    "config",
    "options",
    "tools",
    "demos",
    "state",
    "state_path",
)
# What made DSPy's set-up fail may pass. Until the next attempt, requests get the last failure.
_SETUP_AGAIN_SECONDS = 1.0
# DSPex's adapter sends `options` to a bridge that never read them: they are accepted, and unused.
_EXECUTE_ARGS = ("program_id", "inputs", "config", "lm", "options")


class Commands:
    """What the commands do, over one registry of programs."""

    def __init__(self, settings: Settings, setup: Callable[[], None], load: Callable[[], Mapping[str, Any]]) -> None:
        """`setup` runs once before DSPy is imported; `load` tells what runs, for `get_stats`."""
        self._settings = settings
        self._setup = setup
        self._load = load
        self._started = time.monotonic()
        self._registry = Registry()
        self._models: Models | None = None
        # Why there are none, and when that was.
        self._setup_failed: tuple[str, float] | None = None
        self._loader: Any = None
        self._gc = GcFreezer()
        self._threads = WorkerThreads()
        self._versions: dict[str, str] | None = None

    def table(self) -> dict[str, Command]:
        """The commands by name."""
        return {
            "ping": Command(self.ping),
            "create_program": Command(self.create_program),
            "execute_program": Command(self.execute_program, limited=True),
            "list_programs": Command(self.list_programs),
            "get_stats": Command(self.get_stats),
            "cleanup": Command(self.cleanup),
        }

    def ping(self, _args: dict[str, Any], _call: Call) -> messages.Encoded:
        """`{"status": "ok", "timestamp": unix seconds}`."""
        return messages.pong(time.time())

    def create_program(self, args: dict[str, Any], call: Call) -> Coroutine[Any, Any, dict[str, Any]]:
        """`{"program_id", "status": "created"}` once the program is loaded."""
        arguments.refuse_unknown(args, _CREATE_ARGS)
        id = arguments.text(args, "id")
        if args.get("signature") is None:
            raise InvalidArgs("signature: missing; expected text or an object with inputs and outputs")
        arguments.optional_object(args, "config")
        arguments.optional_object(args, "lm")
        entry = self._registry.add(id, args)
        call.on_reply = lambda created: self._settle(entry, created)
        return self._create(entry)

    def execute_program(self, args: dict[str, Any], call: Call) -> Coroutine[Any, Any, dict[str, Any]]:
        """The output fields of one call of a program; for a list of inputs `{"results": […]}`."""
        arguments.refuse_unknown(args, _EXECUTE_ARGS)
        id = arguments.text(args, "program_id")
        inputs = args.get("inputs")
        if not isinstance(inputs, (dict, list)):
            raise InvalidArgs("inputs: expected an object of the signature's input fields, or a list of such objects")
        config = arguments.optional_object(args, "config")
        lm = arguments.optional_object(args, "lm")
        entry = self._registry.get(id)
        if entry is None:
            raise ProgramNotFound(id)
        if isinstance(inputs, dict):
            return self._execute(entry, inputs, config, lm, call)
        return self._execute_all(entry, inputs, config, lm, call)

    def list_programs(self, args: dict[str, Any], _call: Call) -> Any:
        """`{"programs": [ids]}`, with `details` or `state` also those; `program_ids` narrows both."""
        details = arguments.flag(args, "details")
        state = arguments.flag(args, "state")
        ids = arguments.program_ids(args)
        wanted = None if ids is None else set(ids)
        entries = [entry for entry in self._registry.answered() if wanted is None or entry.id in wanted]
        listed: dict[str, Any] = {"programs": [entry.id for entry in entries]}
        if details or state:
            listed["details"] = [entry.details() for entry in entries]
        return self._add_states(listed, entries) if state else listed

    def get_stats(self, _args: dict[str, Any], _call: Call) -> dict[str, Any]:
        """Counts, sizes in bytes, times in seconds (uptime) and ms (quantiles)."""
        import psutil

        if self._versions is None:
            # 2 ms on the reading thread; what is installed does not change under a process that runs it.
            self._versions = _versions()
        memory = psutil.Process().memory_info()
        return {
            "programs_count": len(self._registry.answered()),
            "memory_usage": {"rss": memory.rss, "vms": memory.vms},
            "uptime": time.monotonic() - self._started,
            **self._load(),
            "threads": self._threads.counts(),
            "pid": os.getpid(),
            "versions": self._versions,
        }

    def cleanup(self, args: dict[str, Any], _call: Call) -> dict[str, Any]:
        """`{"status": "cleaned", "programs_removed"}`: all programs, or those in `program_ids`."""
        # Misspelt, `program_ids` would remove all.
        arguments.refuse_unknown(args, ("program_ids",))
        count = self._registry.remove(arguments.program_ids(args))
        self._removed(count)
        return {"status": "cleaned", "programs_removed": count}

    def _settle(self, entry: Entry, created: bool) -> None:
        if not created:
            self._registry.discard(entry)
        elif self._registry.confirm(entry):
            self._removed(1)

    def _removed(self, count: int) -> None:
        if self._gc.removed(count) and self._loader is not None:
            self._loader.submit(self._gc.freeze)

    # On the event loop.

    async def _create(self, entry: Entry) -> dict[str, Any]:
        await self._program(entry)
        return {"program_id": entry.id, "status": "created"}

    async def _execute(
        self, entry: Entry, inputs: dict[str, Any], config: dict[str, Any] | None, lm: dict[str, Any] | None, call: Call
    ) -> dict[str, Any]:
        entry, program = await self._working(entry, call)
        _count(entry)
        return await program.call(inputs, config, lm, call, stream=call.request.stream)

    async def _execute_all(
        self, entry: Entry, inputs: list[Any], config: dict[str, Any] | None, lm: dict[str, Any] | None, call: Call
    ) -> dict[str, Any]:
        from dspy_bridge.commands import batch
        from dspy_bridge.runtime import large_inputs

        entry, program = await self._working(entry, call)

        async def one(item: Any) -> dict[str, Any]:
            if not isinstance(item, dict):
                raise InvalidArgs("inputs: expected an object of the signature's input fields")
            _count(entry)
            return await program.call(item, config, lm, call, stream=False, limit=large_inputs.LARGE_IN_BATCH)

        return {"results": await batch.run(inputs, one, call, stream=call.request.stream)}

    async def _add_states(self, listed: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
        """In a thread: a state may be large, and what tells it may be code of the host's own."""
        import asyncio

        for entry, detail in zip(entries, listed["details"], strict=True):
            # It has been answered, and so it has been loaded.
            program = await self._program(entry)
            try:
                detail["state"] = await asyncio.to_thread(program.state)
            except Exception as error:
                from dspy_bridge.logs import peer_log

                detail["state"] = None
                peer_log.exception(error)
        return listed

    async def _working(self, entry: Entry, call: Call) -> tuple[Entry, Program]:
        """The program that an execute means: the one before, where the creation of the last one fails.

        From here on the call is metered, if it asks for that: meters need DSPy, which is there by now.
        """
        import asyncio

        while True:
            try:
                program = await self._program(entry)
                if call.request.meta:
                    call.meter = _meter()
                return entry, program
            except (SetupFailed, asyncio.CancelledError):
                raise
            except BaseException:  # a constructor of the host's own may raise anything
                # Its create has been told why. For an execute the id means what it meant before.
                self._registry.discard(entry)
                before = working(entry)
                if before is None:
                    raise ProgramNotFound(entry.id) from None
                entry = before

    async def _program(self, entry: Entry) -> Program:
        import asyncio

        if entry.loading is None:
            loop = asyncio.get_running_loop()
            if self._loader is None:
                from dspy_bridge.runtime.daemon_threads import DaemonThreads

                # One thread: DSPy lets only the thread that configured it first configure it again.
                self._loader = DaemonThreads(1, "dspy_bridge-loader")
            load = loop.run_in_executor(self._loader, self._make, entry.definition)
            entry.loading = load
            # Whoever waited for it may have given up: a failure that nobody hears of is no news for the log.
            load.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Shielded: whoever gives up waiting does not stop it for the others.
        return await asyncio.shield(entry.loading)

    # On the loader's thread.

    def _make(self, definition: dict[str, Any]) -> Program:
        if self._models is None:
            self._models = self._load_dspy()
        from dspy_bridge.programs.program import Program

        program = Program(definition, self._models, self._threads)
        if self._gc.loaded():
            self._gc.freeze()
        return program

    def _load_dspy(self) -> Models:
        if self._setup_failed is not None and time.monotonic() < self._setup_failed[1] + _SETUP_AGAIN_SECONDS:
            raise SetupFailed(self._setup_failed[0])
        self._setup()
        try:
            from dspy_bridge.lm.dspy_setup import Models

            models = Models(self._settings)
        except BaseException as error:  # code of the host's and DSPy's own, which may raise anything
            from dspy_bridge.logs import peer_log

            why = str(error) if isinstance(error, SetupFailed) else f"DSPy cannot be set up: {error}"
            why = f"{why}; the peer's log has the traceback under {peer_log.exception(error)}"
            self._setup_failed = why, time.monotonic()
            raise SetupFailed(why) from None
        self._gc.freeze()  # DSPy itself is half a million objects
        return models


def _count(entry: Entry) -> None:
    entry.execution_count += 1
    entry.last_executed = time.time()


def _meter() -> Any:
    from dspy_bridge.lm.usage import Meter

    return Meter()


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"dspy_bridge": __version__, "python": platform.python_version()}
    for name in ("dspy", "psutil"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
