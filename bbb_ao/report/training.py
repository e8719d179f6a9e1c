"""How the run went: losses, time and memory."""

import shlex
from collections.abc import Sequence

from bbb_ao.report.figures import chart
from bbb_ao.report.markup import missing, paragraph, section, table
from bbb_ao.report.records import Run, StageLog
from bbb_ao.report.scale import count_scale, count_ticks, finite, short, value_scale
from bbb_ao.report.svg import Axis, Point, Series, bar_chart, line_chart

GIB = 2**30


def no_log(run: Run) -> str:
    """What stands where the log would have told."""
    if run.log is not None:
        return missing("The log does not have it: the run did not get that far.")
    text = f"It is in the run's log, which is not at {run.directory}.log.jsonl. With the log:"
    return missing(text, f"bbb-ao report {shlex.quote(str(run.directory))} --log FILE")


def loss_section(run: Run) -> str:
    """The loss of every block in every stage, and of stages that train the whole model."""
    stages = [stage for stage in run.stages.values() if not stage.end_to_end]
    parts = []
    if any(stage.fits for stage in stages):
        text = (
            "Mean squared error of each block's output against full precision, relative to the mean square of what the "
            "block adds to its input; 0 is exact. A dot is the mean over the last tenth of a stage's steps, the line "
            "to it starts at the mean over the first. Where a stage trains several widths, their losses are added."
        )
        parts += [paragraph(text), chart("loss", lambda name, width: _loss_chart(name, width, stages))]
        parts.append(_loss_table(stages))
    for stage in run.stages.values():
        for fit in stage.fits.values() if stage.end_to_end else ():
            change = f"{short(fit.first_loss)} over the first tenth of {fit.steps} steps, {short(fit.last_loss)}"
            parts.append(paragraph(f"End to end, {stage.name}: loss {change} over the last, nats per token."))
    return section("loss", "Loss by block and stage", *(parts or [no_log(run)]))


def _loss_table(stages: Sequence[StageLog]) -> str:
    heads = ["block", *(f"{stage.name}, {when}" for stage in stages for when in ("first", "last"))]
    rows = []
    for number in range(max(stage.blocks for stage in stages)):
        fits = [stage.fits.get(number) for stage in stages]
        losses = [value for fit in fits for value in ((fit.first_loss, fit.last_loss) if fit else (None, None))]
        rows.append((str(number), *("" if value is None else f"{value:.4g}" for value in losses)))
    return table("Loss by block and stage", heads, rows)


def _loss_chart(identity: str, width: float, stages: Sequence[StageLog]) -> str:
    series, last = [], []
    for stage in stages:
        fits = sorted(stage.fits.values(), key=lambda fit: fit.number)
        points = [
            Point(
                fit.number,
                fit.last_loss,
                f"{stage.name}, {fit.name}: {short(fit.first_loss)} to {short(fit.last_loss)} in {fit.steps} steps",
                fit.first_loss,
            )
            for fit in fits
        ]
        series.append(Series(stage.name, points, "main" if stage is stages[-1] else "muted"))
        losses = finite(fit.last_loss for fit in fits)
        last.append(f"{stage.name} {short(max(losses))}" if losses else f"{stage.name} none")
    count = max(stage.blocks for stage in stages)
    values = [value for each in series for point in each.points for value in (point.y, point.start or 0.0)]
    return line_chart(
        identity,
        (width, 340.0),
        Axis(count_scale(count), "block", count_ticks(count, int(width / 60))),
        Axis(value_scale(values, log=True), "relative squared error (log scale)"),
        series,
        ("Loss by block and stage", f"Largest last loss of a block: {', '.join(last)}. The table below has all."),
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s"


def whole_time(run: Run) -> float:
    """Seconds of all phases."""
    return sum(finite(phase.seconds for phase in run.phases.values()))


def peaks(run: Run) -> dict[str, float]:
    """The most memory of each kind, bytes: "host", and "GPU" where there was one."""
    phases = run.phases.values()
    gpu = [phase.device_peak_bytes for phase in phases if phase.device_peak_bytes is not None]
    found = {"host": [phase.host_peak_bytes for phase in phases], "GPU": gpu}
    return {name: max(finite(values)) for name, values in found.items() if finite(values)}


def cost_section(run: Run) -> str:
    """Time and memory of every phase."""
    phases = list(run.phases.values())
    if not phases:
        return section("cost", "Time and memory", no_log(run))
    times = [(phase.name, phase.seconds, duration(phase.seconds)) for phase in phases]
    whole, spoken = duration(whole_time(run)), ", ".join(f"{name} {text}" for name, _, text in times)
    text = (
        f"{whole} on {run.device or 'a device that the log does not name'}. Memory is the most that the process had "
        "held by the end of a phase."
    )
    heads = ["phase", "seconds", *(f"{name} memory, GiB" for name in peaks(run))]
    rows = [
        (
            *(phase.name, f"{phase.seconds:.1f}", f"{phase.host_peak_bytes / GIB:.2f}"),
            *("" if value is None else f"{value / GIB:.2f}" for value in [phase.device_peak_bytes][: len(heads) - 3]),
        )
        for phase in phases
    ]

    def draw(identity: str, width: float) -> str:
        return bar_chart(identity, width, times, ("Time of every phase", f"{whole} in all: {spoken}."))

    name = "Time and memory by phase"
    return section("cost", "Time and memory", paragraph(text), chart("time", draw), table(name, heads, rows, False))
