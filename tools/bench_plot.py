"""Draws speed against accuracy from `dinov3 bench --json`: a panel a case, a point a form.

    dinov3 bench --json > bench.json
    python tools/bench_plot.py bench.json [--out docs/images/bench.png]

The largest relative error of a token (the shipped model's weights) on a logarithmic axis against the times of eager. Left out
are eager itself, which has no error and is the line at 1, and the forms whose error was not measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"kernels": "#0b6e4f", "torch": "#2f6db5"}  # of our engines
OTHERS = "#b5542f"


def label_heights(rows: list[dict[str, Any]], apart: float) -> list[float]:
    """Where the names stand: at their points, or as far above as the name below a point of like error needs."""
    heights: list[float] = []
    for i, row in enumerate(rows):
        below = [h for h, other in zip(heights, rows[:i]) if 0.03 < other["error"] / row["error"] < 30]
        heights.append(max([row["ratio"], *(h + apart for h in below)]))
    return heights


def panel(axes: Any, case: str, rows: list[dict[str, Any]], most: float) -> None:
    model, size, batch = case.split(":")
    axes.set_title(f"{model.removeprefix('dinov3_')}, {size} px × {batch}", fontsize=11)
    axes.axhline(1, color="0.6", linewidth=1, zorder=0)
    axes.text(2, 1, "eager", fontsize=8, color="0.4", ha="right", va="bottom")
    rows = sorted((row for row in rows if row["error"]), key=lambda row: row["ratio"])
    for row, height in zip(rows, label_heights(rows, 0.045 * most)):
        x, y = row["error"], row["ratio"]
        colour = COLOURS.get(row["form"].split(", ")[-1], OTHERS)
        axes.errorbar(x, y, yerr=[[y - row["least"]], [row["most"] - y]], fmt="o", color=colour, linewidth=0.8)
        axes.text(1.45 * x, height, row["form"], fontsize=8, color=colour, va="center")
    axes.set_xscale("log")
    axes.set_xlim(1e-7, 3)
    axes.set_ylim(0, most)
    axes.set_xlabel("largest relative error of a token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="what `dinov3 bench --json` printed")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "bench.png")
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text())
    cases = list(dict.fromkeys(row["case"] for row in rows))
    most = 1.05 * max(row["most"] for row in rows)
    figure = Figure(figsize=(4.2 * len(cases), 4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False, sharey=True)[0], cases):
        panel(axes, case, [row for row in rows if row["case"] == case], most)
    figure.axes[0].set_ylabel("times eager, CPU time")
    figure.savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
