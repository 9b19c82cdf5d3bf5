"""The command line: serve frames on stdin and stdout (what a port opens), `--selftest`, `--version`, `--help`."""

from __future__ import annotations

import gc
import os
import signal
import sys

from dspy_bridge import __version__, settings
from dspy_bridge.port import stdio, watchdog
from dspy_bridge.port.stderr import refuse
from dspy_bridge.wire.json_values import MAX_INT_DIGITS

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping
    from typing import NoReturn

    from dspy_bridge.settings import Settings


def main() -> int:
    """Run the port program. Returns the exit code: 0 after the end of input, 2 for an invalid argument or setting."""
    # There is nothing to drain before a request was received.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if hasattr(sys, "set_int_max_str_digits"):
        # The protocol's limit takes precedence over PYTHONINTMAXSTRDIGITS.
        sys.set_int_max_str_digits(MAX_INT_DIGITS)
    flags: Mapping[str, str] = {}
    if len(sys.argv) > 1:
        parser = _parser()
        arguments, unknown = parser.parse_known_args()
        if unknown:
            # The values of flags may be secrets.
            before = ["", *unknown]
            names = [
                text.partition("=")[0]
                for text, last in zip(unknown, before, strict=False)
                if text.startswith("-") or not last.startswith("-")
            ]
            return refuse(f"unknown arguments {' '.join(names)}; --help lists all")
        if arguments.version or arguments.help:
            return _print(f"dspy_bridge {__version__}\n" if arguments.version else parser.format_help())
        if arguments.selftest:
            from dspy_bridge import selftest

            return selftest.main()
        flags = {name: text for name, text in vars(arguments).items() if isinstance(text, str)}
    try:
        chosen = settings.load(os.environ, flags)
    except settings.SettingError as error:
        return refuse(str(error))
    if os.isatty(0):
        return refuse("stdin is a terminal: this program is opened by a port; try --selftest or --help")
    # Before importing anything that might print.
    try:
        reading, writing = stdio.take()
    except OSError:
        return refuse("stdin or stdout is closed: this program is opened by a port")
    # The imports leave no garbage; a collection would cost the first ping 0.7 ms.
    gc.disable()
    # A fork, so before there are threads and before much is imported.
    own = watchdog.start(reading, writing)
    stdio.keep_from_children(reading, writing, *own)
    _serve(chosen, reading, writing)
    return 0


def _serve(chosen: Settings, reading: int, writing: int) -> None:
    from dspy_bridge import app
    from dspy_bridge.port import reader
    from dspy_bridge.port.frame_writer import FrameWriter
    from dspy_bridge.runtime import allocator, thread_stacks
    from dspy_bridge.wire import messages

    thread_stacks.enlarge()
    writer = FrameWriter(writing, reader.exit_now)

    def send_log(level: str, logger: str, message: str, traceparent: str | None) -> None:
        # Records wait in a bounded queue of their own, not among the replies.
        writer.wait_for_room(lambda: False)
        writer.send([messages.encode_log(level, logger, message, traceparent)])

    dispatcher = app.build_dispatcher(chosen, writer.send, send_log=send_log, when_room=writer.when_room)
    gc.enable()
    # After the watchdog was forked, which must outlive the peer.
    allocator.raise_oom_score()
    reader.serve(reading, writer, dispatcher, chosen.max_frame_bytes, chosen.drain_ms)


def _print(text: str) -> int:
    # argparse's own actions ignore that a disk is full.
    try:
        with open(1, "w", closefd=False) as stdout:
            stdout.write(text)
    except OSError as error:
        return refuse(f"stdout: {error.strerror}")
    return 0


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
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text, then exit")
    parser.add_argument("--version", action="store_true", help="show the version, then exit")
    parser.add_argument(
        "--selftest", action="store_true", help="drive a peer through all six commands with offline/echo, then exit"
    )
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
