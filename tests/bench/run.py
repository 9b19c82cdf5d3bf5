"""`make bench`: measures what bench.exs has, prints the table of docs/performance.md, writes bench.json.

Each figure is a ratio within one run; bench.json also names the machine. `ROW=agent,tokens` measures these rows alone.
`--publish` writes the table into docs/performance.md, four lines of it into the README, the sidecar's figures into
docs/coming-from.md, and draws docs/charts/bench.svg.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MEGABYTE = 1 << 20
# By row, then by name: `{"median", "low", "high"}` of the rounds.
Figures = dict[str, dict[str, dict[str, float]]]


class Row(NamedTuple):
    """A line of the table. `of`: the row of bench.exs; `ratio`: the name of the figure whose spread is shown."""

    mode: str
    of: str
    what: str
    against: str
    goal: str
    ratio: str
    reached: Callable[[Any], str]
    sidecar: str = ""


# The first ones are those of the README. The sidecar's figures are `row.name` and a format.
ROWS = [
    Row(
        *("free", "agent", "a step of a ReAct agent with a tool in Elixir, 12 at once, CPU", "plain DSPy", "≤ 0.4x"),
        *("ratio", lambda f: f"{f.ratio:.2f}x ({f.peer:.1f} ms)"),
    ),
    Row(
        *("free", "tokens", "a streamed token, 12 streams, CPU of Python", "plain DSPy", "≤ 0.3x"),
        *("ratio", lambda f: f"{f.ratio:.2f}x ({f.peer:.0f} µs)"),
    ),
    Row(
        *("free", "runs", "a run, 64 at once, LM free, CPU", "plain DSPy", "≤ 0.85x"),
        *("cpu_ratio", lambda f: f"{f.cpu_ratio:.2f}x ({f.cpu:.2f} ms)"),
    ),
    Row(
        *("free", "recovery", "from the `kill -9` of Python to the next answer", "–", "–"),
        *("bridge_ms", lambda f: f"{f.bridge_ms:.0f} ms; in a pool of two {f.pool_ms:.0f} ms"),
    ),
    Row(
        *("free", "agent", "the same step, one agent alone, time", "plain DSPy, tool in Python", "–"),
        *("alone_ratio", lambda f: f"{f.alone_ratio:.2f}x ({f.alone:.1f} ms)"),
    ),
    Row(
        *("free", "tokens", "a streamed token to its consumer, CPU of Python and BEAM", "plain DSPy", "–"),
        *("consumer_ratio", lambda f: f"{f.consumer_ratio:.2f}x ({f.both:.0f} µs)"),
    ),
    Row(
        *("free", "journal", "a step of an agent with its journal, CPU of Python and BEAM", "without", "≤ 1.05x"),
        *("ratio", lambda f: f"{f.ratio:.2f}x ({f.with_:.2f} ms)"),
    ),
    Row(
        *("free", "runs", "500 runs, 64 in flight, LM free", "plain DSPy", "≤ 1.0x the time"),
        *("ratio", lambda f: f"{f.ratio:.2f}x ({500_000 / f.ms:.0f}/s)", "sidecar-runs.runs_rate {:.0f}/s"),
    ),
    Row(
        *("free", "runs", "memory after it", "plain DSPy", "≤ 1.08x"),
        *("rss_ratio", lambda f: f"{f.rss_ratio:.2f}x ({f.rss / MEGABYTE:.0f} MB)"),
    ),
    Row(
        *("free", "batch", "1,000 inputs in one call, 64 at once, CPU", "1,000 calls", "≤ 0.95x"),
        *("ratio", lambda f: f"{f.ratio:.2f}x ({f.list:.2f} ms an input)"),
    ),
    Row(
        *("free", "image", "a run with an image of 10 MB, CPU", "plain DSPy", "–"),
        *("ratio", lambda f: f"{f.ratio:.2f}x ({f.cpu:.0f} ms)"),
    ),
    Row(
        *("free", "many", "512 runs of 1 s at once", "what LM and plain DSPy's rate allow", "≥ 0.95x"),
        "ratio",
        lambda f: f"{f.ratio:.2f}x ({f.ms / 1000:.1f} s; one `dspy.LM` alone {f.alone_ms / 1000:.1f} s)",
    ),
    Row(
        *("free", "waiting", "320 runs of 0.2 s, 64 in flight", "one after another", "≥ 25x, ping p99 < 30 ms"),
        *("ratio", lambda f: f"{f.ratio:.0f}x, ping p99 {f.ping_p99_ms:.1f} ms"),
    ),
    Row(
        *("free", "optimizing", "a run while 8 threads optimize a program, median", "without them"),
        *(
            "≤ 1.5x, ping p99 < 30 ms",
            "ratio",
            lambda f: f"{f.ratio:.2f}x ({f.ms:.0f} ms), ping p99 {f.ping_p99_ms:.1f} ms",
        ),
    ),
    Row(
        *("free", "programs", "runs with 10,000 programs", "with one", "≤ 1.05x the time"),
        *("ratio", lambda f: f"{f.ratio:.2f}x, {f.bytes_each / 1024:.0f} KB a program"),
    ),
    Row(
        *("free", "first-ping", "start to first ping", "serial peer", "≤ 0.055x"),
        *("ratio", lambda f: f"{f.ratio:.3f}x ({f.peer:.0f} ms)", "sidecar-pings.first_ms {:.0f} ms"),
    ),
    Row(
        *("free", "first-answer", "start to the first answer", "plain DSPy, its import and a run", "≤ 0.8x"),
        *("ratio", lambda f: f"{f.ratio:.2f}x ({f.bridge:.0f} ms)"),
    ),
    Row(
        *("pinned", "round-trip", "ping round trip, raw port", "bare Python echo", "≤ 1.6x"),
        *("peer_ratio", lambda f: f"{f.peer_ratio:.2f}x ({f.peer:.1f} µs)"),
    ),
    Row(
        *("pinned", "round-trip", "the same, keys in another order", "bare Python echo", "≤ 1.6x"),
        *("sorted_ratio", lambda f: f"{f.sorted_ratio:.2f}x ({f.sorted:.1f} µs)"),
    ),
    Row(
        *("pinned", "pipelined", "8,000 pings, 256 in flight, raw port", "bare echo / serial peer", "≥ 1.0x / ≥ 2x"),
        "to_echo",
        lambda f: f"{f.to_echo:.2f}x / {f.to_serial:.1f}x ({f.peer / 1000:.0f}k/s)",
    ),
    Row(
        *("pinned", "megabyte", "ping with 1 MB of arguments", "serial peer", "≤ 0.5x"),
        *("ratio", lambda f: f"{f.ratio:.2f}x ({f.peer:.2f} ms)", "sidecar-pings.megabyte_ms {:.1f} ms"),
    ),
    Row(
        *("pinned", "round-trip", "`Bridge.call(:ping)` round trip", "bare echo by raw port", "–"),
        *("bridge_ratio", lambda f: f"{f.bridge_ratio:.2f}x ({f.bridge:.1f} µs)", "sidecar-pings.trip_us {:.0f} µs"),
    ),
    Row(
        *("free", "calls", "`Bridge.call(:ping)`, reductions", "the least GenServer", "≤ 1.25x"),
        *("ratio", lambda f: f"{f.ratio:.2f}x ({f.bridge:.0f}); `Pool.call` {f.pool_ratio:.2f}x"),
    ),
    Row(
        *("free", "calls", "256 processes calling it, per CPU time of the BEAM", "the least GenServer", "≥ 0.85x"),
        *("crowd_ratio", lambda f: f"{f.crowd_ratio:.2f}x; `Pool.call` {f.crowd_pool_ratio:.2f}x"),
    ),
    Row(
        *("pinned", "pool", "`Pool.request(:ping)` round trip, one peer", "`Bridge.request(:ping)`", "≤ 1.15x"),
        *("request_ratio", lambda f: f"{f.request_ratio:.2f}x ({f.request_us:.1f} µs)"),
    ),
    Row(
        *("pinned", "pool", "a chunk of `Pool.stream`, the BEAM's CPU", "of `Bridge.stream`", "≤ 1.2x"),
        *("chunk_ratio", lambda f: f"{f.chunk_ratio:.2f}x ({f.chunk_us:.1f} µs)"),
    ),
    Row(
        *("free", "callers", "256 processes calling `Bridge.call(:ping)`", "–", "≥ 100,000/s"),
        *("rate", lambda f: f"{f.rate / 1000:.0f}k/s", "sidecar-runs.calls_krate {:.1f}k/s"),
    ),
    Row(
        *("free", "large", "ping during 5 MB requests, p99", "a 5 MB request", "–"),
        *("", lambda f: f"{f.ping_p99_ms:.1f} ms ({f.large_ms:.1f} ms)"),
    ),
    Row(
        *("free", "restart", "16,000 calls in flight, answered after a `Bridge.restart`", "without it"),
        *("≤ 1.5x the time", "ratio", lambda f: f"{f.ratio:.2f}x ({f.with_:.0f} ms)"),
    ),
    Row(
        *("free", "peers", "16 peers in a pool: runs per second", "2 peers", "–"),
        "",
        lambda f: (
            f"{f.ratio:.2f}x ({f.rate:.0f}/s); all up after {f.start_ms / 1000:.1f} s,"
            f" {f.rss_each / MEGABYTE:.0f} MB each"
        ),
    ),
    Row(
        *("free", "litellm", "the first run that needs LiteLLM", "the next one", "–"),
        "",
        lambda f: (
            f"{f.first_ms / 1000:.1f} s ({f.next_ms:.0f} ms), {f.rss / MEGABYTE:.0f} MB;"
            f" ping p99 {f.ping_p99_ms:.0f} ms"
        ),
    ),
    Row(
        *("free", "installed", "what `mix dspex.setup` installs, with bytecode", "with LiteLLM", "–"),
        *("", lambda f: f"{f.ratio:.2f}x ({f.size / 1e6:.0f} MB, {f.packages:.0f} packages)"),
    ),
]


def measure(mode: str, names: list[str]) -> Figures:
    """The figures of these rows; of all without names."""
    pin = ["taskset", "-c", "0"] if mode == "pinned" and shutil.which("taskset") else []
    command = [*pin, "mix", "run", "--no-start", str(HERE / "bench.exs"), mode, *names]
    # Bytecode is kept, as it is for users.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, cwd=ROOT / "elixir_harness", env=env, stdout=subprocess.PIPE, text=True)
    figures = {}
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            found = json.loads(line)
            figures[found["row"]] = found["figures"]
            medians = ", ".join(f"{name} {value['median']:.4g}" for name, value in sorted(found["figures"].items()))
            print(f"  {found['row']}: {medians}", flush=True)  # noqa: T201
    if process.wait() != 0:
        raise SystemExit(f"bench.exs {mode}: exit {process.returncode}")
    return figures


def medians(figures: Figures, row: str) -> Any:
    """The medians of a row as attributes."""
    return SimpleNamespace(**{f"{name}_" if name == "with" else name: f["median"] for name, f in figures[row].items()})


def line(row: Row, figures: Figures) -> tuple[str, ...]:
    """One line of the table."""
    spread = ""
    if row.ratio:
        found = figures[row.of][row.ratio]
        places = 3 if found["median"] < 0.1 else 0 if found["median"] >= 20 else 2
        spread = f"{found['low']:.{places}f}–{found['high']:.{places}f}"
    reached = row.reached(medians(figures, row.of))
    return row.what, row.against, row.goal, reached, spread, sidecar(row, figures)


def sidecar(row: Row, figures: Figures) -> str:
    """The sidecar's figure of a row, if it has one and was measured."""
    place, _, shown = row.sidecar.partition(" ")
    name, _, figure = place.partition(".")
    if name not in figures:
        return ""
    found = medians(figures, name)
    rates = {"runs_rate": lambda: 500_000 / found.runs_ms, "calls_krate": lambda: found.calls_rate / 1000}
    return shown.format(rates[figure]() if figure in rates else getattr(found, figure))


def in_short(figures: Figures) -> str:
    """The four lines of the README."""
    agent, tokens = medians(figures, "agent"), medians(figures, "tokens")
    runs, recovery = medians(figures, "runs"), medians(figures, "recovery")
    return (
        f"- A step of an agent takes {agent.peer:.1f} ms of CPU, {agent.ratio:.2f}x of plain DSPy.\n"
        f"- A streamed token takes {tokens.peer:.0f} µs of CPU, {tokens.ratio:.2f}x of plain DSPy.\n"
        f"- A run takes {runs.cpu:.2f} ms of CPU, {runs.cpu_ratio:.2f}x of plain DSPy.\n"
        f"- After a `kill -9` of Python the next answer comes {recovery.bridge_ms:.0f} ms later, in a pool of two"
        f" {recovery.pool_ms:.0f} ms."
    )


def lines(head: tuple[str, ...], table: Iterable[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in [head, ("---",) * len(head), *table])


def put(page: Path, mark: str, text: str) -> None:
    """Replaces what stands between two marks."""
    marked = re.compile(rf"(<!-- {mark} -->\n).*(<!-- /{mark} -->)", re.DOTALL)
    page.write_text(marked.sub(lambda marks: f"{marks[1]}{text}\n{marks[2]}", page.read_text()))


def publish(figures: Figures, table: str) -> None:
    """Writes the figures into every page that has them."""
    from chart import bars, draw

    put(ROOT / "docs/performance.md", "bench", table)
    put(ROOT / "README.md", "speed", in_short(figures))
    compared = [(bar.what, bar.reached, bar.sidecar, f"{bar.shown}x") for bar in bars(figures)]
    put(ROOT / "docs/coming-from.md", "sidecar", lines(("what", "this", "HTTP sidecar", "times"), compared))
    draw(figures)


def main() -> None:
    """Measure, print, write."""
    wanted = [name for name in os.environ.get("ROW", "").split(",") if name]
    known = {row.of for row in ROWS}
    if unknown := set(wanted) - known:
        raise SystemExit(f"ROW: no row {', '.join(sorted(unknown))}; expected some of {', '.join(sorted(known))}")
    figures: Figures = {}
    for mode in ("pinned", "free"):
        names = [name for name in dict.fromkeys(row.of for row in ROWS if row.mode == mode) if name in wanted]
        if names or not wanted:
            figures |= measure(mode, names)
    shown = [line(row, figures) for row in ROWS if row.of in figures]
    table = lines(("what", "against", "goal", "reached", "spread", "HTTP sidecar"), shown)
    print(f"\n{table}")  # noqa: T201
    if wanted:
        return
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    (ROOT / "bench.json").write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")
    if "--publish" in sys.argv:
        publish(figures, table)


if __name__ == "__main__":
    main()
