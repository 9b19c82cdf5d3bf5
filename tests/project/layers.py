"""Reads `mix xref graph` from `make check`; exits 1 if a module of the harness uses one of a higher layer."""

from __future__ import annotations

import re
import sys

# From the lowest. A name is a folder or a module of `lib/dspex/python_bridge/`; it uses its own layer and those before.
LAYERS = [
    ("values", "error otp os protocol programs options python"),
    ("events", "telemetry"),
    ("the process of a bridge, and tools that a peer calls", "calls tools bridge/"),
    ("calls and streams", "client bridge.ex"),
    ("core", "monitor supervisor environment_check"),
    ("pool", "pool"),
    ("durable runs", "durable"),
    ("programs as modules", "program"),
    ("measuring and optimizing", "evaluate optimize"),
    ("stub", "stub"),
    ("tooling", "doctor venv top history mix application"),
]


def layer(path: str) -> int:
    """The index of a file's layer. A name that ends in `/` or `.ex` tells a folder from the module of the same name."""
    room = path.split("/")[0]
    name = room.removesuffix(".ex")
    names = {name, f"{name}/" if "/" in path else room}
    for index, (_, rooms) in enumerate(LAYERS):
        if names & set(rooms.split()):
            return index
    raise SystemExit(f"{path} is in no layer of {__file__}")


def main() -> int:
    arrows: list[tuple[str, str]] = []
    source = ""
    for line in sys.stdin:
        path = re.sub(r"^lib/(dspex/(python_bridge/)?)?", "", line.strip(" |`-\n").split(" ")[0])
        if line.startswith(("lib/", "test/")):
            source = path
        elif line.startswith(("|-- lib/", "`-- lib/")) and not source.startswith("test/"):
            arrows.append((source, path))
    up = {(source, target) for source, target in arrows if layer(source) < layer(target)}
    for source, target in sorted(up):
        sys.stdout.write(f"{source} ({LAYERS[layer(source)][0]}) uses {target} ({LAYERS[layer(target)][0]})\n")
    return not arrows or bool(up)


if __name__ == "__main__":
    sys.exit(main())
