"""`make growth`: what a unit of work costs as there is more of it; some 10 minutes.

Prints the table of docs/performance.md; with `--publish` writes it there and draws docs/charts/growth.svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

from run import ROOT, Figures, lines, measure, put

SVG = ROOT / "docs" / "charts" / "growth.svg"
WHAT = {
    "programs": "a run, with programs",
    "in-flight": "a run, in flight",
    "streams": "a token, with streams at once",
}


def table(figures: Figures) -> list[tuple[str, ...]]:
    """What, how many, CPU of a unit, memory."""
    rows = []
    for name, what in WHAT.items():
        found = figures[name]
        for size in sizes(figures, name):
            cpu, memory = found[f"{size} µs"]["median"], found[f"{size} MB"]["median"]
            rows.append((what, f"{size:,}", f"{cpu:.0f} µs", f"{memory:.0f} MB"))
    for size in (10_000, 100_000, 1_000_000):
        memory = figures["calls"][f"{size} MB"]["median"]
        rows.append(("after calls of all kinds", f"{size:,}", "", f"{memory:.0f} MB"))
    return rows


def sizes(figures: Figures, name: str) -> list[int]:
    return sorted(int(key.split()[0]) for key in figures[name] if key.endswith("µs"))


def draw(figures: Figures, target: Path = SVG) -> None:
    """The cost of a unit at each size, next to that at the smallest."""
    from chart import BAR, TEXT, save, svg_pyplot

    figure, axes = svg_pyplot().subplots(1, len(WHAT), figsize=(7.2, 2.2), sharey=True)
    for axis, (name, what) in zip(axes, WHAT.items(), strict=True):
        at = sizes(figures, name)
        costs = [figures[name][f"{size} µs"]["median"] / figures[name][f"{at[0]} µs"]["median"] for size in at]
        axis.plot(at, costs, marker="o", color=BAR)
        axis.set_xscale("log")
        axis.set_ylim(0, 2)
        axis.set_title(what, color=TEXT, fontsize=9)
        axis.tick_params(colors=TEXT, length=0)
        axis.axhline(1, color=TEXT, linewidth=0.5)
        for spine in axis.spines.values():
            spine.set_color(TEXT)
    axes[0].set_ylabel("CPU, 1 = the first", color=TEXT, fontsize=9)
    save(figure, target)


def main() -> None:
    """Measure, print, write."""
    figures = measure("growth", [])
    text = lines(("what", "how many", "CPU of Python", "memory of Python"), table(figures))
    print(f"\n{text}")  # noqa: T201
    if "--publish" in sys.argv:
        put(ROOT / "docs/performance.md", "growth", text)
        draw(figures)


if __name__ == "__main__":
    main()
