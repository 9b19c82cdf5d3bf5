"""The six commands. Arguments are checked once, here; DSPy is imported by another thread."""

from __future__ import annotations

import functools
import os
import time

from dspy_bridge import __version__, logs
from dspy_bridge.commands import arguments
from dspy_bridge.commands.program_loader import ProgramLoader
from dspy_bridge.commands.program_registry import Entry, Registry
from dspy_bridge.dispatch.dispatcher import Dispatcher
from dspy_bridge.errors import InvalidArgs, LoadFailed, Overloaded, ProgramNotFound, SetupFailed, refuse_unknown
from dspy_bridge.port import stdio
from dspy_bridge.runtime.worker_threads import WorkerThreads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from typing import Any

    from dspy_bridge.dispatch.call import Call
    from dspy_bridge.dispatch.dispatcher import Handler
    from dspy_bridge.logs import SendRecord
    from dspy_bridge.programs.program import Program
    from dspy_bridge.settings import Settings


class Commands:
    """The handlers, over one registry of programs, and the `dispatcher` that calls them."""

    def __init__(
        self,
        settings: Settings,
        send: Callable[[Iterable[bytes]], None],
        *,
        send_log: SendRecord | None = None,
        when_room: Callable[..., bool] = lambda _callback, written: False,
    ) -> None:
        """`send` and `when_room`: see `Dispatcher`; `send_log` sends log records, where the settings ask for it."""
        logs.choose(settings.log_level, send_log if settings.log_frames else None)
        self._settings = settings
        self._started = time.monotonic()
        self._registry = Registry()
        self._threads = WorkerThreads()
        self._loader = ProgramLoader(settings, self._threads)
        # How many programs are being optimized.
        self._optimizing = 0
        self.dispatcher = Dispatcher(
            self.table(),
            send,
            # A run has a connection to its LM.
            max_in_flight=min(settings.max_in_flight, stdio.raise_open_files()),
            max_queue=settings.max_queue,
            max_frame_bytes=settings.max_frame_bytes,
            when_room=when_room,
            on_start=self._loader.preload,
        )

    def table(self) -> dict[str, Handler]:
        names = ("ping", "create_program", "execute_program", "list_programs", "get_stats", "cleanup")
        return {name: getattr(self, name) for name in names}

    def ping(self, _args: dict[str, Any], _call: Call) -> dict[str, Any]:
        """`{"status": "ok", "timestamp": unix seconds}`."""
        return {"status": "ok", "timestamp": time.time()}

    def create_program(self, args: dict[str, Any], call: Call) -> Any:
        """`{"program_id", "status": "created"}`, once the program is loaded; at once, if it is lazy."""
        if args.get("lazy") is True:
            arguments.check(args, arguments.LAZY)
            self._registry.add_lazy(args["id"], args)
            return {"program_id": args["id"], "status": "created"}
        arguments.check_create(args)
        entry = self._registry.add(args["id"], args)
        settle = {True: self._registry.confirm, False: self._registry.discard}
        call.on_reply = lambda created: settle[created](entry)
        return self._create(entry)

    def execute_program(self, args: dict[str, Any], call: Call) -> Coroutine[Any, Any, dict[str, Any]]:
        """The outputs of a run; `{"results": […]}` for a list of inputs; with `optimize` a better program's state."""
        arguments.check_execute(args)
        call.limited = True
        entry = self._registry.get(args["program_id"])
        if entry is None:
            raise ProgramNotFound(args["program_id"])
        if args.get("optimize") is not None and call.request.journal is not None:
            raise InvalidArgs("journal: not with optimize")
        work = self._execute if args.get("optimize") is None else self._optimize
        return work(entry, args, call)

    def list_programs(self, args: dict[str, Any], _call: Call) -> Any:
        """`{"programs": [ids]}`, with `details` and `state` if asked for; `program_ids` selects."""
        arguments.check(args, arguments.LIST)
        ids = args.get("program_ids")
        wanted = None if ids is None else set(ids)
        entries = [entry for entry in self._registry.answered() if wanted is None or entry.id in wanted]
        listed: dict[str, Any] = {"programs": [entry.id for entry in entries]}
        if args.get("state"):
            return self._with_states(listed, entries)
        if args.get("details"):
            listed["details"] = [entry.details() for entry in entries]
        return listed

    def get_stats(self, _args: dict[str, Any], _call: Call) -> dict[str, Any]:
        """Counts, sizes in bytes, times in seconds (uptime) and ms (quantiles)."""
        import psutil

        memory = psutil.Process().memory_info()
        return {
            "programs_count": len(self._registry.answered()),
            "memory_usage": {"rss": memory.rss, "vms": memory.vms},
            "uptime": time.monotonic() - self._started,
            **self.dispatcher.counts(),
            **self._loader.lm_stats(),
            "threads": self._threads.counts(),
            "pid": os.getpid(),
            "versions": _versions(),
        }

    def cleanup(self, args: dict[str, Any], _call: Call) -> dict[str, Any]:
        """`{"status": "cleaned", "programs_removed"}`: all programs, or those in `program_ids`."""
        # With `program_ids` misspelt, all would be removed.
        refuse_unknown(args, arguments.CLEANUP)
        arguments.check(args, arguments.CLEANUP)
        return {"status": "cleaned", "programs_removed": self._registry.remove(args.get("program_ids"))}

    async def _create(self, entry: Entry) -> dict[str, Any]:
        await self._loader.load(entry)
        return {"program_id": entry.id, "status": "created"}

    async def _execute(self, entry: Entry, args: dict[str, Any], call: Call) -> dict[str, Any]:
        entry, program = await self._working(entry, call)
        from dspy_bridge.lm import budgets, journal
        from dspy_bridge.runtime import large_inputs

        inputs = args["inputs"]
        options: dict[str, Any] = {name: args.get(name) for name in ("config", "lm")}
        options.update(call=call, attempts=args.get("attempts") or 1, large=large_inputs.are_large(call.size, inputs))

        if args.get("budget") is not None:
            journal.check_hooks("budget")
            options["budget"] = budgets.Budget(**args["budget"])
            call.accounts["budget"] = options["budget"].shown
        if call.request.journal is not None:
            options["journal"] = await journal.Journal.read(call)
            call.accounts["journal"] = options["journal"].counts

        async def one(
            item: Any, ends: float | None = None, index: int | None = None, stream: bool = False
        ) -> dict[str, Any]:
            if not isinstance(item, dict):
                raise InvalidArgs("inputs: expected an object of the signature's input fields")
            entry.execution_count += 1
            entry.last_executed = time.time()
            try:
                return await program.call(item, stream=stream, ends=ends, index=index, **options)
            finally:
                large_inputs.collect()

        if isinstance(inputs, dict):
            return await one(inputs, stream=call.request.stream)

        # They import asyncio, for which no ping waits.
        from dspy_bridge.commands import batch

        if args.get("metric") is not None:
            return await batch.evaluate(args, program, one, call)
        return {"results": await batch.Batch(args, one, call).run()}

    async def _optimize(self, entry: Entry, args: dict[str, Any], call: Call) -> dict[str, Any]:
        entry, _ = await self._working(entry, call)
        from dspy_bridge.optimizing import optimization

        given = await optimization.read(args)
        running, most = self._optimizing, self._settings.max_optimizes
        if running >= most:
            raise Overloaded(f"{running} programs are being optimized: DSPY_BRIDGE_MAX_OPTIMIZES is {most}")
        self._optimizing += 1
        # The optimizer's LM calls have slots of their own.
        call.slot_transferred = True
        call.limiter.release()
        try:
            # Optimizers change the program that they are given.
            program = await self._loader.build(entry.definition)
            return await optimization.run(given, program, args, call, self._threads)
        finally:
            self._optimizing -= 1

    async def _with_states(self, listed: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
        """Loads lazy programs. States are dumped in a thread: they may be large, and user code may dump them.

        Bridges know by an answer, even for no program, that DSPy is imported.
        """
        import asyncio

        await asyncio.wrap_future(self._loader.preload())
        listed["details"] = []
        for entry in entries:
            state = None
            try:
                program = await self._loader.load(entry)
                state = await asyncio.to_thread(program.state)
            except LoadFailed:
                pass  # the details have its error
            except Exception as error:
                logs.exception(error)
            listed["details"].append({**entry.details(), "state": state})
        return listed

    async def _working(self, entry: Entry | None, call: Call) -> tuple[Entry, Program]:
        """The loaded program of an entry, or of the one that its id stands for again if the entry's creation fails.

        Sets the call's meter, if it asks for one: meters need DSPy, which is imported by now.
        """
        import asyncio

        while entry is not None:
            try:
                program = await self._loader.load(entry)
                if call.request.meta:
                    from dspy_bridge.lm.metering.meter import Meter

                    history_bytes = self._settings.history_bytes if call.request.history else None
                    call.meter = Meter(history_bytes, call.received if call.request.lm_events else None)
                return entry, program
            except (SetupFailed, LoadFailed, asyncio.CancelledError):
                raise
            except BaseException:  # user code may raise anything
                # The reply to `create_program` has the error. The id stands for the earlier program again.
                self._registry.discard(entry)
                entry = self._registry.get(entry.id)
        raise ProgramNotFound(call.request.args["program_id"])


@functools.cache
def _versions() -> dict[str, str]:
    # Looking them up takes 2 ms on the reading thread.
    import platform
    from importlib.metadata import version

    own = {"dspy_bridge": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in ("dspy", "psutil")}
