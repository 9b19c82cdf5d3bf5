"""The command line: serve frames on stdin and stdout (what a port opens), `--version`, `--help`."""

from __future__ import annotations

import importlib.machinery
import os
import signal
import sys
import threading

from dspy_bridge import __version__, settings
from dspy_bridge.port import stdio, watchdog
from dspy_bridge.port.stdio import refuse
from dspy_bridge.wire.json_values import MAX_INT_DIGITS

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from typing import NoReturn

    from dspy_bridge.settings import Settings

STACK_BYTES = 8 << 20
# What decodes and encodes messages; both come with DSPy.
_NEEDED = ("jiter", "orjson")


def main() -> int:
    """Run the port program. Returns the exit code: 0 after the end of input, 2 for an invalid argument or setting."""
    # There is nothing to drain before a request was received.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if hasattr(sys, "set_int_max_str_digits"):
        # The protocol's limit takes precedence over PYTHONINTMAXSTRDIGITS.
        sys.set_int_max_str_digits(MAX_INT_DIGITS)
    flags: Mapping[str, str] = {}
    if len(sys.argv) > 1:
        arguments, unknown = _parser().parse_known_args()
        if unknown:
            # The values of flags may be secrets.
            before = ["", *unknown]
            names = [
                text.partition("=")[0]
                for text, last in zip(unknown, before, strict=False)
                if text.startswith("-") or not last.startswith("-")
            ]
            return refuse(f"unknown arguments {' '.join(names)}; --help lists all")
        flags = {name: text for name, text in vars(arguments).items() if isinstance(text, str)}
    try:
        chosen = settings.load(os.environ, flags)
    except settings.SettingError as error:
        return refuse(str(error))
    missing = [name for name in _NEEDED if importlib.machinery.PathFinder.find_spec(name) is None]
    if missing:
        # Else only pings would be answered.
        text = f"{' and '.join(missing)} cannot be imported by {sys.executable}; expected a Python with DSPy"
        return refuse(f"{text}: mix dspex.setup makes one")
    if os.isatty(0):
        return refuse("stdin is a terminal: this program is opened by a port; try --help")
    # Before importing anything that might print.
    try:
        reading, writing = stdio.take()
    except OSError:
        return refuse("stdin or stdout is closed: this program is opened by a port")
    # A fork, so before there are threads and before much is imported.
    own = watchdog.start(reading, writing)
    stdio.keep_from_children(reading, writing, *own)
    _serve(chosen, reading, writing)
    watchdog.served = True
    return 0


def _serve(chosen: Settings, reading: int, writing: int) -> None:
    from dspy_bridge.commands.handlers import Commands
    from dspy_bridge.port import reader
    from dspy_bridge.port.frame_writer import FrameWriter
    from dspy_bridge.wire import messages

    # glibc gives as much. musl gives 128 KB, where deeply nested answers of an LM overflow the stack.
    threading.stack_size(STACK_BYTES)
    writer = FrameWriter(writing, reader.exit_now)

    def send_log(level: str, logger: str, message: str, traceparent: str | None) -> None:
        # Records wait in a bounded queue of their own, not among the replies.
        writer.wait_for_room(lambda: False)
        writer.send([messages.encode_log(level, logger, message, traceparent)])

    dispatcher = Commands(chosen, writer.send, send_log=send_log, when_room=writer.when_room).dispatcher
    # After the watchdog was forked, which must outlive the peer.
    stdio.raise_oom_score()
    reader.serve(reading, writer, dispatcher, chosen.max_frame_bytes, chosen.drain_ms)


def _parser() -> argparse.ArgumentParser:
    import argparse

    from dspy_bridge.settings import SETTINGS

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            sys.exit(refuse(message))

    parser = Parser(
        prog="python -m dspy_bridge",
        description="An Erlang port program that serves DSPy: frames of a 4-byte length and JSON.",
        epilog="A flag wins over its environment variable. Secrets belong in the environment: ps shows flags.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dspy_bridge {__version__}")
    for setting in SETTINGS:
        default = f"default: {setting.default}" if setting.default else "default: none"
        parser.add_argument(
            setting.flag,
            dest=setting.name,
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{setting.help} [{setting.variable}; {default}]",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
