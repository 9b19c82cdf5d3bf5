"""`make bench`: runs bench.exs pinned to one CPU and free, prints the table of docs/performance.md, writes bench.json.

Each figure is a ratio within one run; bench.json also names the machine. `--publish` writes the table into
docs/performance.md, three lines of it into the README, the sidecar's figures into docs/coming-from.md, and draws
docs/bench.svg. One part alone, as lines of JSON, in elixir_harness and with DSPY_BRIDGE_PYTHON set:
`taskset -c 0 mix run --no-start ../tests/bench/bench.exs pool`, or `pinned`, or `free` without taskset.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MEGABYTE = 1 << 20


def measure(mode: str) -> dict[str, Any]:
    """The figures of one part by name."""
    pin = ["taskset", "-c", "0"] if mode == "pinned" and shutil.which("taskset") else []
    command = [*pin, "mix", "run", "--no-start", str(HERE / "bench.exs"), mode]
    # Bytecode is kept, as it is for users.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, cwd=ROOT / "elixir_harness", env=env, stdout=subprocess.PIPE, text=True)
    figures = {}
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            figure = json.loads(line)
            figures[figure["name"]] = figure["value"]
            print(f"  {figure['name']}: {figure['value']}", flush=True)  # noqa: T201
    if process.wait() != 0:
        raise SystemExit(f"bench.exs {mode}: exit {process.returncode}")
    return figures


def rows(f: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """What, against what, the goal, what was reached, and the sidecar where it has the same."""
    trip, piped, first = f["round trip us"], f["pipelined per s"], f["first ping ms"]
    runs, many, waiting = f["500 runs ms"], f["512 of 1 s"], f["320 of 0.2 s"]
    programs, rss, big, restart = f["10,000 programs"], f["rss"], f["1 MB ms"], f["16,000 in a restart"]
    return [
        (
            "start to first ping",
            "serial peer",
            "≤ 0.05x",
            f"{first['peer'] / first['serial']:.3f}x ({first['peer']:.0f} ms)",
            f"{f['sidecar first ping ms']:.0f} ms",
        ),
        (
            "ping round trip, raw port",
            "bare Python echo",
            "≤ 1.3x",
            f"{trip['peer'] / trip['echo']:.2f}x ({trip['peer']:.1f} µs)",
            "",
        ),
        (
            "8,000 pings, 256 in flight, raw port",
            "bare echo / serial peer",
            "≥ 1.0x / ≥ 2x",
            f"{piped['peer'] / piped['echo']:.2f}x / {piped['peer'] / piped['serial']:.1f}x"
            f" ({piped['peer'] / 1000:.0f}k/s)",
            "",
        ),
        (
            "ping with 1 MB of arguments",
            "serial peer",
            "≤ 0.5x",
            f"{big['peer'] / big['serial']:.2f}x ({big['peer']:.2f} ms)",
            f"{f['sidecar 1 MB ms']:.1f} ms",
        ),
        (
            "`Bridge.call(:ping)` round trip",
            "bare echo by raw port",
            "≤ 1.8x",
            f"{trip['bridge'] / trip['echo']:.2f}x ({trip['bridge']:.1f} µs)",
            f"{f['sidecar round trip us']:.0f} µs",
        ),
        (
            "`Pool.request(:ping)` round trip, one peer",
            "`Bridge.request(:ping)`",
            "≤ 1.15x",
            f"{f['Pool.request']['ratio']:.2f}x ({f['Pool.request']['us']:.1f} µs)",
            "",
        ),
        (
            "a chunk of `Pool.stream`, the BEAM's CPU",
            "of `Bridge.stream`",
            "≤ 1.2x",
            f"{f['Pool.stream']['ratio']:.2f}x ({f['Pool.stream']['us']:.1f} µs)",
            "",
        ),
        (
            "256 processes calling `Bridge.call(:ping)`",
            "–",
            "≥ 100,000/s",
            f"{f['calls per s'] / 1000:.0f}k/s",
            f"{f['sidecar calls per s'] / 1000:.1f}k/s",
        ),
        (
            "ping during 5 MB requests, p99",
            "a 5 MB request",
            "–",
            f"{f['during 5 MB']['ping_p99_ms']:.1f} ms ({f['during 5 MB']['large_ms']:.1f} ms)",
            "",
        ),
        (
            "500 runs, 64 in flight, LM free",
            "plain DSPy",
            "≥ 1.0x",
            f"{runs['ratio']:.2f}x ({500_000 / runs['bridge']:.0f}/s)",
            f"{500_000 / f['sidecar 500 runs ms']:.0f}/s",
        ),
        (
            "memory after it",
            "plain DSPy",
            "≤ 1.08x",
            f"{rss['bridge'] / rss['plain']:.2f}x ({rss['bridge'] // MEGABYTE} MB)",
            "",
        ),
        (
            "512 runs of 1 s at once",
            "what LM and plain DSPy's rate allow",
            "≥ 0.95x",
            f"{many['possible_ms'] / many['ms']:.2f}x"
            f" ({many['ms'] / 1000:.1f} s; one `dspy.LM` alone {many['alone_ms'] / 1000:.1f} s)",
            "",
        ),
        (
            "320 runs of 0.2 s, 64 in flight",
            "one after another",
            "≥ 25x, ping p99 < 30 ms",
            f"{waiting['ratio']:.0f}x, ping p99 {waiting['ping_p99_ms']:.1f} ms",
            "",
        ),
        (
            "runs with 10,000 programs",
            "with one",
            "≤ 1.05x the time",
            f"{programs['ratio']:.2f}x, {programs['bytes_each'] / 1024:.0f} KB a program",
            "",
        ),
        (
            "16,000 calls in flight, answered after a `Bridge.restart`",
            "without it",
            "≤ 1.5x the time",
            f"{restart['ratio']:.2f}x ({restart['ms']:.0f} ms)",
            "",
        ),
    ]


def in_short(f: dict[str, Any]) -> str:
    """The three lines of the README."""
    runs, many = f["500 runs ms"], f["512 of 1 s"]
    return (
        f"- A `Bridge.call` of a ping takes {f['round trip us']['bridge']:.1f} µs; over an HTTP sidecar it takes"
        f" {f['sidecar round trip us']:.0f} µs.\n"
        f"- With an LM that costs nothing it makes {500_000 / runs['bridge']:.0f} runs per second,"
        f" {runs['ratio']:.2f}x of plain DSPy; the sidecar makes {500_000 / f['sidecar 500 runs ms']:.0f}/s.\n"
        f"- 512 runs of an LM that takes 1 s finish in {many['ms'] / 1000:.1f} s; with one `dspy.LM` alone they take"
        f" {many['alone_ms'] / 1000:.1f} s."
    )


def lines(head: tuple[str, ...], table: Iterable[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in [head, ("---",) * len(head), *table])


def put(page: Path, mark: str, text: str) -> None:
    """Replaces what stands between two marks."""
    marked = re.compile(rf"(<!-- {mark} -->\n).*(<!-- /{mark} -->)", re.DOTALL)
    page.write_text(marked.sub(lambda marks: f"{marks[1]}{text}\n{marks[2]}", page.read_text()))


def publish(figures: dict[str, Any], table: str) -> None:
    """Writes the figures into every page that has them."""
    from chart import bars, draw

    put(ROOT / "docs/performance.md", "bench", table)
    put(ROOT / "README.md", "speed", in_short(figures))
    compared = [(bar.what, bar.reached, bar.sidecar, f"{bar.shown}x") for bar in bars(figures)]
    put(ROOT / "docs/coming-from.md", "sidecar", lines(("what", "this", "HTTP sidecar", "times"), compared))
    draw(figures)


def main() -> None:
    """Measure, print, write."""
    figures = {**measure("pinned"), **measure("free")}
    table = lines(("what", "against", "goal", "reached", "HTTP sidecar"), rows(figures))
    print(f"\n{table}")  # noqa: T201
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    (ROOT / "bench.json").write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")
    if "--publish" in sys.argv:
        publish(figures, table)


if __name__ == "__main__":
    main()
