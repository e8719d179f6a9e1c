"""Figures from the result files.

    python benchmarks/plots.py [benchmarks/results/kernels.json] [--output docs/figures]

kernels_<model>.svg: time of bf16 / time of each implementation against the rows M, one panel a shape; the band runs
from the 10th to the 90th percentile of the implementation's time. Lines and letters are of a middle grey on no
background, so that the figures read on light and on dark pages.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib  # pyright: ignore[reportMissingImports]

matplotlib.use("svg")

import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]
from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]

BASELINE = "bf16"
GREY = "#808080"
# Each at least 3:1 against white and against GitHub's dark background.
COLORS = {
    "w2a16": "#e8590c",
    "w4a16": "#1c8fd0",
    "w8a16": "#8a63d2",
    "w2a2": "#2f9e44",
    "w4a4": "#c2417f",
    "humming": "#b08900",
    "gemlite": "#0d9a9a",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bbb_ao",
    "font.family": "sans-serif",
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.labelcolor": GREY,
}

Row = dict[str, object]


def speedups(rows: Sequence[Row], impl: str) -> list[tuple[int, float, float, float]]:
    """(m, median, low, high) of bf16's median time / the implementation's times, by m; rows of one shape of a model."""
    times = {(row["impl"], row["m"]): row for row in rows if row.get("microseconds") is not None}
    points = []
    for (name, m), row in times.items():
        base = times.get((BASELINE, m))
        if name == impl and base is not None:
            parts = [base["microseconds"] / row[key] for key in ("microseconds", "high", "low")]  # type: ignore[operator]
            points.append((m, *parts))
    return sorted(points)


def draw_panel(axes: Axes, rows: Sequence[Row], title: str) -> None:
    """One shape: a line and a band for each implementation."""
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle="--", label=BASELINE)
    for impl, color in COLORS.items():
        points = speedups(rows, impl)
        if points:
            m, median, low, high = zip(*points, strict=True)
            axes.plot(m, median, color=color, marker="o", markersize=3, label=impl)
            axes.fill_between(m, low, high, color=color, alpha=0.25, linewidth=0)
    ticks = sorted({int(str(row["m"])) for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(m) for m in ticks], fontsize=8, rotation=45)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(color=GREY, alpha=0.2)
    axes.set_title(title)


def draw_kernels(rows: Sequence[Row], model: str, path: Path) -> None:
    """All shapes of one model, speedup over bf16 against M."""
    rows = [row for row in rows if row["model"] == model]
    shapes = {row["shape"]: f"{row['shape']} ({row['n']} x {row['k']})" for row in rows}
    size = (-(-len(shapes) // 2), min(2, len(shapes)))
    figure, grid = plt.subplots(*size, figsize=(10, 7), squeeze=False, sharex=True, layout="constrained")
    panels = grid.flatten()
    for axes, (shape, title) in zip(panels, shapes.items(), strict=False):
        draw_panel(axes, [row for row in rows if row["shape"] == shape], title)
    for axes in panels[len(shapes) :]:
        axes.set_visible(False)
    figure.supxlabel("rows M")
    figure.supylabel("times as fast as bf16")
    figure.suptitle(f"Llama-3-{model.upper()}, {rows[0].get('device', 'unknown device')}")
    handles = {}
    for axes in panels:
        handles |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent
    parser.add_argument("results", type=Path, nargs="?", default=root / "results" / "kernels.json")
    parser.add_argument("--output", type=Path, default=root.parent / "docs" / "figures")
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text())
    plt.rcParams.update(STYLE)
    for model in dict.fromkeys(row["model"] for row in rows):
        path = arguments.output / f"kernels_{model}.svg"
        draw_kernels(rows, model, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
