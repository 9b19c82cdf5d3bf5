"""The six commands. Arguments are checked once, here; DSPy is imported by another thread."""

from __future__ import annotations

import os
import time

from dspy_bridge import __version__
from dspy_bridge.commands import arguments, evaluation, optimization
from dspy_bridge.commands.program_loader import ProgramLoader
from dspy_bridge.commands.program_registry import Entry, Registry, working
from dspy_bridge.dispatch.call import Call, Command
from dspy_bridge.errors import InvalidArgs, LoadFailed, ProgramNotFound, SetupFailed, refuse_unknown
from dspy_bridge.runtime.worker_threads import WorkerThreads
from dspy_bridge.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from typing import Any

    from dspy_bridge.programs.program import Program
    from dspy_bridge.settings import Settings

# DSPex's adapter sends `options`, which no bridge has ever read: accepted and ignored.
_EXECUTE_ARGS = (
    "program_id",
    "inputs",
    "config",
    "lm",
    "attempts",
    "max_concurrency",
    "item_timeout_ms",
    "expected",
    "metric",
    "optimize",
    "options",
)
# Each is at least one more LM call.
_MOST_ATTEMPTS = 10


class Commands:
    """The handlers, over one registry of programs."""

    def __init__(self, settings: Settings, setup: Callable[[], None], load: Callable[[], Mapping[str, Any]]) -> None:
        """`setup` runs before DSPy is imported; `load` gives the dispatcher's counts, for `get_stats`."""
        self._load = load
        self._history_bytes = settings.history_bytes
        self._started = time.monotonic()
        self._registry = Registry()
        self._threads = WorkerThreads()
        self._loader = ProgramLoader(settings, setup, self._threads)
        self._optimizations = optimization.Optimizations(settings.max_optimizes, self._loader)
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

    def preload(self) -> None:
        """Begin DSPy's import. On the event loop's thread."""
        self._loader.preload()

    def importing(self) -> bool:
        """Whether DSPy is being imported, and no program waits for it."""
        return self._loader.importing

    def ping(self, _args: dict[str, Any], _call: Call) -> messages.Encoded:
        """`{"status": "ok", "timestamp": unix seconds}`."""
        return messages.pong(time.time())

    def create_program(self, args: dict[str, Any], call: Call) -> Any:
        """`{"program_id", "status": "created"}`, once the program is loaded; at once, if it is lazy."""
        lazy = arguments.flag(args, "lazy")
        if not lazy:
            arguments.check_definition(args)
        id = arguments.text(args, "id")
        if args.get("signature") is None:
            raise InvalidArgs("signature: missing; expected text or an object with inputs and outputs")
        if lazy:
            if self._registry.add_lazy(id, args):
                self._loader.removed(1)
            return {"program_id": id, "status": "created"}
        entry = self._registry.add(id, args)
        call.on_reply = lambda created: self._settle(entry, created)
        return self._create(entry)

    def execute_program(self, args: dict[str, Any], call: Call) -> Coroutine[Any, Any, dict[str, Any]]:
        """The output fields of one run; `{"results": […]}` for a list of inputs, with a metric also their scores.

        With `optimize`, the state of a better program.
        """
        refuse_unknown(args, _EXECUTE_ARGS)
        id = arguments.text(args, "program_id")
        inputs = args.get("inputs")
        if not isinstance(inputs, (dict, list)):
            raise InvalidArgs("inputs: expected an object of the signature's input fields, or a list of such objects")
        config = arguments.optional_object(args, "config")
        lm = arguments.optional_lm(args)
        attempts = arguments.count(args, "attempts", _MOST_ATTEMPTS) or 1
        limits = {
            "max_concurrency": arguments.count(args, "max_concurrency"),
            "item_timeout_ms": arguments.milliseconds(args, "item_timeout_ms"),
        }
        for name, limit in limits.items():
            if limit is not None and isinstance(inputs, dict):
                raise InvalidArgs(f"{name}: only for a list of inputs")
        evaluated = evaluation.read(args, inputs)
        optimized = optimization.read(args, inputs, evaluated)
        entry = self._registry.get(id)
        if entry is None:
            raise ProgramNotFound(id)
        if optimized is not None:
            return self._optimize(entry, optimized, lm, call)
        options = {"config": config, "lm": lm, "attempts": attempts}
        return self._execute(entry, inputs, options, limits, evaluated, call)

    def list_programs(self, args: dict[str, Any], _call: Call) -> Any:
        """`{"programs": [ids]}`, with `details` and `state` if asked for; `program_ids` selects."""
        details = arguments.flag(args, "details")
        state = arguments.flag(args, "state")
        ids = arguments.program_ids(args)
        wanted = None if ids is None else set(ids)
        entries = [entry for entry in self._registry.answered() if wanted is None or entry.id in wanted]
        listed: dict[str, Any] = {"programs": [entry.id for entry in entries]}
        if state:
            return self._with_states(listed, entries)
        if details:
            listed["details"] = [entry.details() for entry in entries]
        return listed

    def get_stats(self, _args: dict[str, Any], _call: Call) -> dict[str, Any]:
        """Counts, sizes in bytes, times in seconds (uptime) and ms (quantiles)."""
        import psutil

        if self._versions is None:
            # Looking them up takes 2 ms on the reading thread.
            self._versions = _versions()
        memory = psutil.Process().memory_info()
        return {
            "programs_count": len(self._registry.answered()),
            "memory_usage": {"rss": memory.rss, "vms": memory.vms},
            "uptime": time.monotonic() - self._started,
            **self._load(),
            "lm_waiting": self._loader.lm_waiting(),
            "threads": self._optimizations.added_to(self._threads.counts()),
            "pid": os.getpid(),
            "versions": self._versions,
            "degraded": self._loader.degraded(),
        }

    def cleanup(self, args: dict[str, Any], _call: Call) -> dict[str, Any]:
        """`{"status": "cleaned", "programs_removed"}`: all programs, or those in `program_ids`."""
        # With `program_ids` misspelt, all would be removed.
        refuse_unknown(args, ("program_ids",))
        count = self._registry.remove(arguments.program_ids(args))
        self._loader.removed(count)
        return {"status": "cleaned", "programs_removed": count}

    def _settle(self, entry: Entry, created: bool) -> None:
        if not created:
            self._registry.discard(entry)
        elif self._registry.confirm(entry):
            self._loader.removed(1)

    async def _create(self, entry: Entry) -> dict[str, Any]:
        await self._loader.load(entry)
        return {"program_id": entry.id, "status": "created"}

    async def _execute(
        self,
        entry: Entry,
        inputs: dict[str, Any] | list[Any],
        options: dict[str, Any],
        limits: dict[str, Any],
        evaluated: evaluation.Given | None,
        call: Call,
    ) -> dict[str, Any]:
        entry, program = await self._working(entry, call)
        stream = call.request.stream
        if isinstance(inputs, dict):
            _count(entry)
            return await program.call(inputs, call=call, stream=stream, **options)

        from dspy_bridge.commands import batch
        from dspy_bridge.runtime import large_inputs

        async def one(item: Any) -> dict[str, Any]:
            if not isinstance(item, dict):
                raise InvalidArgs("inputs: expected an object of the signature's input fields")
            _count(entry)
            return await program.call(item, call=call, stream=False, limit=large_inputs.LARGE_IN_BATCH, **options)

        if evaluated is not None:
            return await evaluation.run(evaluated, program, inputs, one, call, stream=stream, **limits)
        return {"results": await batch.run(inputs, one, call, stream=stream, **limits)}

    async def _optimize(self, entry: Entry, given: optimization.Given, lm: object, call: Call) -> dict[str, Any]:
        entry, _ = await self._working(entry, call)
        return await self._optimizations.run(given, entry, lm, call)

    async def _with_states(self, listed: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
        """Loads lazy programs. States are dumped in a thread: they may be large, and user code may dump them."""
        import asyncio

        listed["details"] = []
        for entry in entries:
            state = None
            try:
                program = await self._loader.load(entry)
                state = await asyncio.to_thread(program.state)
            except LoadFailed:
                pass  # the details have its error
            except Exception as error:
                from dspy_bridge.logs import peer_log

                peer_log.exception(error)
            listed["details"].append({**entry.details(), "state": state})
        return listed

    async def _working(self, entry: Entry, call: Call) -> tuple[Entry, Program]:
        """The loaded program of an entry, or of the one before it if the entry's creation fails.

        Sets the call's meter, if it asks for one: meters need DSPy, which is imported by now.
        """
        import asyncio

        while True:
            try:
                program = await self._loader.load(entry)
                if call.request.meta:
                    from dspy_bridge.lm.metering.meter import Meter

                    request = call.request
                    call.meter = Meter(
                        self._history_bytes if request.history else None,
                        call.received if request.lm_events else None,
                    )
                return entry, program
            except (SetupFailed, LoadFailed, asyncio.CancelledError):
                raise
            except BaseException:  # user code may raise anything
                # The reply to `create_program` has the error. The id stands for the earlier program again.
                self._registry.discard(entry)
                before = working(entry)
                if before is None:
                    raise ProgramNotFound(entry.id) from None
                entry = before


def _count(entry: Entry) -> None:
    entry.execution_count += 1
    entry.last_executed = time.time()


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
