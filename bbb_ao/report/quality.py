"""What the run is worth: perplexity against bits per weight, and tasks."""

import math
import shlex
from collections.abc import Sequence
from itertools import groupby

from bbb_ao.report.figures import NARROW, chart, legend
from bbb_ao.report.markup import missing, paragraph, plain, section, table, tag
from bbb_ao.report.records import Evaluation, Run
from bbb_ao.report.scale import Scale, value_scale
from bbb_ao.report.svg import Axis, Point, Rule, Series, line_chart

NAMES = {"checkpoint": "this run", "round_to_nearest": "round to nearest", "full_precision": "full precision"}
STYLES = {"round_to_nearest": ("other", "ring"), "checkpoint": ("main", "dot")}


def data_sets(run: Run) -> dict[tuple[str, int, int], list[Evaluation]]:
    """Evaluations by (text, windows, tokens in each): figures of different texts do not compare."""
    groups: dict[tuple[str, int, int], list[Evaluation]] = {}
    for row in run.evaluations:
        groups.setdefault((row.data, row.windows, row.window), []).append(row)
    return groups


def perplexity_section(run: Run) -> str:
    """Perplexity against bits per weight, a chart for each text; tasks of lm-eval as a table."""
    groups = data_sets(run)
    text = (
        "Lower is better. Bits per weight count everything that a width reads: codes, scales, zero points and split "
        "channels. Rounding to nearest, on the same grid, is what can be had without training."
    )
    parts = [paragraph(text)]
    command = shlex.join(["bbb-ao", "eval", str(run.directory), "--data", "FILE", "--baseline", run.model or "MODEL"])
    if not groups:
        when = "Not measured yet" if run.saved else "Not to be measured before the run is finished; then"
        parts.append(missing(f"{when}, with a text that the run did not train on:", command))
    elif not all({row.of for row in rows} >= NAMES.keys() for rows in groups.values()):
        parts.append(missing("Full precision or round to nearest is not measured on every text. To add it:", command))
    for number, ((data, windows, window), rows) in enumerate(groups.items()):
        parts.append(tag("h3", plain(f"{data}, {windows} windows of {window} tokens")))
        parts.append(chart(f"perplexity-{number}", lambda name, width, rows=rows: _chart(name, width, rows)))
        parts.append(_table(data, rows))
    if run.tasks:
        heads = ("task", "metric", "bits", "value", "standard error", "samples", "backend", "batch")
        cells = [
            (
                *(row.task, row.metric, row.bits or "", f"{row.value:.4f}"),
                "" if row.stderr is None else f"{row.stderr:.4f}",
                *(str(row.samples), row.backend, str(row.batch)),
            )
            for row in run.tasks
        ]
        parts.append(table("Tasks", heads, cells, folded=False))
    return section("perplexity", "Perplexity against size", *parts)


def _table(data: str, rows: Sequence[Evaluation]) -> str:
    heads = ("model", "bits", "bits per weight", "perplexity", "backend", "batch", "device")
    cells = [
        (
            *(NAMES.get(row.of, row.of), row.bits or ""),
            "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}",
            *(f"{row.ppl:.4f}", row.backend, str(row.batch), row.device),
        )
        for row in rows
    ]
    return table(f"Perplexity on {data}", heads, cells)


def _chart(identity: str, width: float, rows: Sequence[Evaluation]) -> str:
    wide = width > NARROW
    series, keys = [], []
    for of, (kind, marker) in STYLES.items():
        known = [(row.bits_per_weight, row) for row in rows if row.of == of and row.bits_per_weight is not None]
        # Widths that read the same planes stand above one another, the narrower first.
        known.sort(key=lambda pair: (pair[0], pair[1].bits or ""))
        points = [
            Point(read, row.ppl, f"{NAMES[of]}, {row.bits} bits: {row.ppl:.4f} at {read:.3f} bits per weight")
            for read, row in known
        ]
        if points:
            series.append(Series(NAMES[of] if wide else "", points, kind, marker))
            keys.append((kind, NAMES[of]))
    full = [row.ppl for row in rows if row.of == "full_precision"]
    rules = [Rule(value, f"full precision {value:.2f}" if wide else "") for value in full]
    widths = [point.x for each in series for point in each.points]
    low, high = min(widths, default=2.0), max(widths, default=3.0)
    # Whole bits at the ends, unless the widths lie so far apart that they need a logarithm.
    x = value_scale(widths, log=True) if high > 2 * low else Scale(math.floor(low), math.floor(high) + 1)
    y = value_scale([row.ppl for row in rows])
    picture = line_chart(
        identity,
        (width, 320.0),
        Axis(x, "bits per weight", [tick for tick in (2, 3, 4, 5, 6, 8, 10, 16) if x.shows(tick)] if x.log else None),
        Axis(y, "perplexity (log scale)" if y.log else "perplexity"),
        series,
        ("Perplexity against bits per weight", f"{_figures(rows)}. The table below has all figures."),
        rules,
        _width_marks(rows),
    )
    named = [*keys, *(("rule", f"full precision {value:.2f}") for value in full)]
    return picture if wide else legend(*named) + picture


def _figures(rows: Sequence[Evaluation]) -> str:
    """The chart in words."""
    return "; ".join(
        f"{NAMES.get(row.of, row.of)}{f' at {row.bits} bits' if row.bits else ''} {row.ppl:.2f}" for row in rows
    )


def _width_marks(rows: Sequence[Evaluation]) -> list[tuple[float, str]]:
    """Where the run's widths lie on the axis of bits per weight; widths that read the same bytes share a mark."""
    own = [(row.bits_per_weight, row.bits or "") for row in rows if row.of == "checkpoint" and row.bits_per_weight]
    marks = []
    for read, group in groupby(sorted(own), key=lambda pair: pair[0]):
        names = [bits for _, bits in group]
        marks.append((read, "mixed" if names == ["mixed"] else f"{', '.join(names)} bits"))
    return marks
