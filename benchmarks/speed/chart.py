"""Draws speed.svg; runs in the peers' environment, which has matplotlib.

``python -m benchmarks.speed.chart RAW.json OUT.svg`` (or ``.png``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from benchmarks.speed.contestants import CONTESTANTS
from benchmarks.speed.shapes import LABELS

SIZES = ("25M", "10")
#: The start of a process is most of it at 10 parameters, and would flatten all the others.
LEFT_OUT = {("10", "optserve.curl")}
COLOURS = {"floors": "#8a8f98", "optserve": "#2563eb", "uds": "#2563eb"}
PEER = "#d97706"


def draw(measured: dict[str, Any], out: Path) -> None:
    """Draw the median time of a step by contestant, one panel for each of SIZES that is there."""
    sizes = [size for size in SIZES if measured["sizes"].get(size)]
    shown = {
        size: [
            one
            for one in CONTESTANTS
            if one.key in measured["sizes"][size] and (size, one.key) not in LEFT_OUT
        ]
        for size in sizes
    }
    mpl.rcParams |= {"svg.hashsalt": "optserve", "svg.fonttype": "path", "font.size": 10}
    heights = [len(shown[size]) + 1.6 for size in sizes]
    figure, panels = plt.subplots(
        len(sizes), 1, figsize=(9, 0.34 * sum(heights) + 0.4), height_ratios=heights, squeeze=False
    )
    for size, axes in zip(sizes, panels[:, 0], strict=True):
        times = [measured["sizes"][size][one.key]["p50_s"] * 1e3 for one in shown[size]]
        colours = [COLOURS.get(one.worker, PEER) for one in shown[size]]
        bars = axes.barh([one.label for one in shown[size]], times, color=colours, height=0.7)
        axes.bar_label(bars, [f"{time:.3g}" for time in times], padding=4)
        axes.invert_yaxis()
        axes.set_xlim(0, max(times) * 1.1)
        axes.set_title(f"{LABELS[size]} parameters: median ms of a step", loc="left", weight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.text(
        0.99, 0.005, "grey: floors   blue: optserve   orange: peers", ha="right", color="#555555"
    )
    figure.tight_layout(rect=(0, 0.025, 1, 1))
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text())["latency"], Path(sys.argv[2]))
