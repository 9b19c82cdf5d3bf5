"""docs/charts/bench.svg: how many times as fast as the HTTP sidecar, from the figures of `make bench`.

`run.py --publish` draws it from the run; `chart.py bench.json` draws it again from the file that a run wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

SVG = Path(__file__).resolve().parents[2] / "docs" / "charts" / "bench.svg"
# One that can be read on a light and on a dark page: the background is neither.
TEXT = "#7d8590"
BAR = "#2f81f7"


class Bar(NamedTuple):
    """`times`: how many times as fast; `reached` and `sidecar`: the two figures, as docs/performance.md shows them."""

    what: str
    times: float
    reached: str
    sidecar: str

    @property
    def shown(self) -> str:
        """`times`, as exact as it is worth."""
        return f"{self.times:.{0 if self.times >= 10 else 1}f}"


def bars(figures: dict[str, Any]) -> list[Bar]:
    """Only what both sides were measured at."""
    f = {row: {name: value["median"] for name, value in of.items()} for row, of in figures.items()}
    pings, sidecar = f["sidecar-pings"], f["sidecar-runs"]
    first, sidecar_first = f["first-ping"]["peer"], pings["first_ms"]
    trip, sidecar_trip = f["round-trip"]["bridge"], pings["trip_us"]
    calls, sidecar_calls = f["callers"]["rate"], sidecar["calls_rate"]
    big, sidecar_big = f["megabyte"]["peer"], pings["megabyte_ms"]
    runs, sidecar_runs = f["runs"]["ms"], sidecar["runs_ms"]
    return [
        Bar("start to first ping", sidecar_first / first, f"{first:.0f} ms", f"{sidecar_first:.0f} ms"),
        Bar(
            "pings of 256 callers",
            calls / sidecar_calls,
            f"{calls / 1000:.0f}k/s",
            f"{sidecar_calls / 1000:.1f}k/s",
        ),
        Bar("ping round trip", sidecar_trip / trip, f"{trip:.1f} µs", f"{sidecar_trip:.0f} µs"),
        Bar("ping with 1 MB", sidecar_big / big, f"{big:.2f} ms", f"{sidecar_big:.1f} ms"),
        Bar(
            "runs, LM free",
            sidecar_runs / runs,
            f"{500_000 / runs:.0f}/s",
            f"{500_000 / sidecar_runs:.0f}/s",
        ),
    ]


def draw(figures: dict[str, Any], target: Path = SVG) -> None:
    """The same figures give the same bytes."""
    pyplot = svg_pyplot()
    shown = bars(figures)
    figure, axes = pyplot.subplots(figsize=(7.2, 2.5))
    drawn = axes.barh([bar.what for bar in shown], [bar.times for bar in shown], color=BAR, height=0.6, left=0)
    for patch, bar in zip(drawn, shown, strict=True):
        axes.annotate(
            f"{bar.shown}x: {bar.reached}, sidecar {bar.sidecar}",
            (bar.times, patch.get_y() + patch.get_height() / 2),
            xytext=(6, 0), textcoords="offset points", va="center", color=TEXT,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.set_xscale("log")
    # From 1, which is the sidecar; room for the text at the right.
    axes.set_xlim(1, max(bar.times for bar in shown) * 12)
    axes.set_xticks([1, 10, 100], ["1 = HTTP sidecar", "10x", "100x"])
    axes.tick_params(colors=TEXT, length=0)
    axes.tick_params(axis="x", which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(TEXT)
    save(figure, target)


def svg_pyplot() -> Any:
    """`matplotlib.pyplot` for charts that `save` writes."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text; ids come from the contents alone.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dspy_bridge", "font.size": 10})
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, target: Path) -> None:
    """Writes a chart without date and background."""
    from matplotlib import pyplot

    figure.tight_layout(pad=0.3)
    figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())["figures"])
