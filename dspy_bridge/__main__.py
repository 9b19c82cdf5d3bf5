"""The command line: serve frames on stdin and stdout (what a port opens), `--version`, `--help`."""

from __future__ import annotations

import importlib.machinery
import os
import signal
import sys
import threading

from dspy_bridge import __version__, settings
from dspy_bridge.port import stdio, watchdog
from dspy_bridge.wire.json_values import MAX_INT_DIGITS


def main() -> int:
    """Run the port program. Returns the exit code: 0 after the end of input, 2 for an invalid argument or setting."""
    # There is nothing to drain before a request was received.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if hasattr(sys, "set_int_max_str_digits"):
        # The protocol's limit takes precedence over PYTHONINTMAXSTRDIGITS.
        sys.set_int_max_str_digits(MAX_INT_DIGITS)
    for argument in sys.argv[1:]:
        if argument in ("--version", "--help", "-h"):
            sys.stdout.write(f"dspy_bridge {__version__}\n" if argument == "--version" else _help())
            return 0
    try:
        chosen = settings.load(os.environ, _flags(sys.argv[1:]))
    except settings.SettingError as error:
        return stdio.refuse(str(error))
    # They decode and encode messages, and come with DSPy. Without them only pings would be answered.
    missing = [name for name in ("jiter", "orjson") if importlib.machinery.PathFinder.find_spec(name) is None]
    if missing:
        text = f"{' and '.join(missing)} cannot be imported by {sys.executable}; expected a Python with DSPy"
        return stdio.refuse(f"{text}: mix dspex.setup makes one")
    if os.isatty(0):
        return stdio.refuse("stdin is a terminal: this program is opened by a port; try --help")
    # Before importing anything that might print.
    try:
        reading, writing = stdio.take()
    except OSError:
        return stdio.refuse("stdin or stdout is closed: this program is opened by a port")
    # A fork, so before there are threads and before much is imported.
    own = watchdog.start(reading, writing)
    stdio.keep_from_children(reading, writing, *own)
    _serve(chosen, reading, writing)
    watchdog.served = True
    return 0


def _serve(chosen: settings.Settings, reading: int, writing: int) -> None:
    from dspy_bridge.commands.handlers import Commands
    from dspy_bridge.port import reader
    from dspy_bridge.port.frame_writer import FrameWriter
    from dspy_bridge.wire import messages

    # 8 MB, as glibc gives. musl gives 128 KB, where deeply nested answers of an LM overflow the stack.
    threading.stack_size(8 << 20)
    writer = FrameWriter(writing, reader.exit_now)

    def send_log(level: str, logger: str, message: str, traceparent: str | None) -> None:
        # Records wait in a bounded queue of their own, not among the replies.
        writer.wait_for_room(lambda: False)
        writer.send([messages.encode_log(level, logger, message, traceparent)])

    dispatcher = Commands(chosen, writer.send, send_log=send_log, when_room=writer.when_room).dispatcher
    # After the watchdog was forked, which must outlive the peer.
    stdio.raise_oom_score()
    reader.serve(reading, writer, dispatcher, chosen.max_frame_bytes, chosen.drain_ms)


def _flags(arguments: list[str]) -> dict[str, str]:
    """The texts of `--name value` and `--name=value`. Raises `SettingError`, without values, which may be secrets."""
    names = {setting.flag: setting.name for setting in settings.SETTINGS}
    flags: dict[str, str] = {}
    left = iter(arguments)
    for argument in left:
        flag, equals, after = argument.partition("=")
        if flag not in names:
            raise settings.SettingError(f"unknown argument {flag}; --help lists all")
        text = after if equals else next(left, None)
        if text is None:
            raise settings.SettingError(f"{flag}: expected a value")
        flags[names[flag]] = text
    return flags


def _help() -> str:
    flags = "\n".join(
        f"  {setting.flag} VALUE\n      {setting.help} [{setting.variable}; default: {setting.default or 'none'}]"
        for setting in settings.SETTINGS
    )
    return f"""An Erlang port program that serves DSPy: frames of a 4-byte length and JSON.

usage: python -m dspy_bridge [--version] [--help] [--NAME VALUE …]

{flags}

A flag wins over its environment variable. Secrets belong in the environment: ps shows flags.
"""


if __name__ == "__main__":
    sys.exit(main())
