"""Where it hurts: the error of every layer, and the channels that stand out."""

import re
from collections.abc import Sequence

from bbb_ao.report.figures import MOST_PANELS, chart, legend, panels
from bbb_ao.report.markup import paragraph, plain, section, table, tag
from bbb_ao.report.records import Run, Site
from bbb_ao.report.scale import Scale, count_scale, count_ticks, finite, short, value_scale
from bbb_ao.report.svg import Axis, Point, Series, line_chart
from bbb_ao.report.training import no_log

# Of what was before, and of what came of it.
STYLES = {"before": "muted", "after": "main"}


def layer_place(name: str) -> tuple[int, str]:
    """Number of the block and name within it, of a layer's full name; further numbers (of experts) become a star."""
    found = re.fullmatch(r".*?\.(\d{1,6})\.(.+)", name)
    return (int(found[1]), re.sub(r"\.\d+(?=\.|$)", ".*", found[2])) if found else (0, name)


def small_charts(
    identity: str, title: str, groups: dict[str, dict[str, dict[int, float]]], spoken: dict[str, str]
) -> str:
    """A panel for each group, with a line over the blocks for each state; all panels share their axes.

    Args:
        groups: heading -> "before" or "after" -> block -> value.
        spoken: the states in words.
    """
    values = [value for lines in groups.values() for line in lines.values() for value in line.values()]
    count = 1 + max((block for lines in groups.values() for line in lines.values() for block in line), default=0)
    x, y = Axis(count_scale(count), "block", count_ticks(count, 6)), Axis(value_scale(values), "")

    def draw(name: str, picture: str, width: float, height: float) -> str:
        series, words = [], []
        for when, line in groups[name].items():
            notes = {block: f"{name}, block {block}, {spoken[when]}: {short(line[block])}" for block in sorted(line)}
            series.append(Series("", [Point(b, line[b], note) for b, note in notes.items()], STYLES[when]))
            words.append(f"{spoken[when]} up to {short(max(finite(line.values()), default=float('nan')))}")
        return line_chart(picture, (width, height), x, y, series, (f"{title}: {name}", f"{', '.join(words)}."))

    drawn = [(name, lambda *place, name=name: draw(name, *place)) for name in groups]
    more = len(groups) - MOST_PANELS
    return panels(drawn, identity) + (paragraph(f"{more} more kinds are in the table.") if more > 0 else "")


def errors_section(run: Run) -> str:
    """Every layer's output error before and after training."""
    title = "Error by layer"
    spoken = {"before": "before training (rounded, channels split)", "after": "after training"}
    known = [when for when in spoken if when in run.errors]
    if not known:
        return section("layers", title, no_log(run))
    groups: dict[str, dict[str, dict[int, float]]] = {}
    for when in known:
        for name, error in run.errors[when].items():
            block, kind = layer_place(name)
            line = groups.setdefault(kind, {}).setdefault(when, {})
            line[block] = max(error, line.get(block, 0.0))
    text = (
        "How far each layer's output is from full precision, at the width at which the checkpoint opens and with the "
        "layers before it quantized too: squared error relative to the squared output, on a few calibration sequences. "
        "All panels have the same axes."
    )
    names = dict.fromkeys(name for when in known for name in run.errors[when])
    rows = [(n, *(short(run.errors[when][n]) if n in run.errors[when] else "" for when in known)) for n in names]
    return section(
        "layers",
        title,
        paragraph(text),
        legend(*((STYLES[when], spoken[when]) for when in known)),
        small_charts("layer", title, groups, spoken),
        table("Relative squared error of every layer", ("layer", *known), rows),
    )


def channels_section(run: Run) -> str:
    """How far the largest channels stand out, before and after splitting."""
    title, sites = "Outlier channels", list(run.sites.values())
    if not sites:
        return section("channels", title, no_log(run))
    split, total = sum(site.split for site in sites), sum(site.channels for site in sites)
    before, after = sum(site.outliers_before for site in sites), sum(site.outliers_after for site in sites)
    joint = any(site.metric == "joint" for site in sites)
    text = (
        "The largest input channel against the median one, for every group of layers that share an input. A channel's "
        f"measure is its largest weight{' times the norm of its activations' if joint else ''}. "
    )
    text += (
        f"Splitting shared {split:,} of {total:,} channels between two copies of half the size. Before it, {before:,} "
        f"channels were above 3 times the median, after it {after:,}, copies counted one by one."
        if split
        else f"This run splits no channel; {before:,} of {total:,} are above 3 times the median."
    )
    spoken = {when: f"{when} splitting" for when in STYLES if split or when == "before"}
    groups: dict[str, dict[str, dict[int, float]]] = {}
    for site in sites:
        first, *others = (layer_place(layer)[1] for layer in site.layers)
        name = ", ".join([first, *(other.rpartition(".")[2] for other in others)])
        for when in spoken:
            groups.setdefault(name, {}).setdefault(when, {})[site.block] = getattr(site, when)[0]
    heads = ("layers", "channels", "split", "largest before", "largest after", "above 3 before", "above 3 after")
    rows = [
        (
            *(", ".join(site.layers), str(site.channels), str(site.split)),
            *(short(site.before[0]), short(site.after[0]), str(site.outliers_before), str(site.outliers_after)),
        )
        for site in sites
    ]
    return section(
        "channels",
        title,
        paragraph(text),
        legend(*((STYLES[when], words) for when, words in spoken.items())),
        small_charts("site", "Largest channel over the median", groups, spoken),
        table("Channels of every input", heads, rows),
        *_ranked(max(sites, key=lambda site: max(finite(site.before[:1]), default=0.0)), spoken),
    )


def _ranked(site: Site, spoken: dict[str, str]) -> Sequence[str]:
    """All channels of one input, by rank."""
    y = value_scale([value for when in spoken for value in getattr(site, when)], log=True)

    def draw(identity: str, width: float) -> str:
        series = []
        for when, words in spoken.items():
            pairs = zip(site.ranks, getattr(site, when), strict=True)
            points = [Point(rank, value, f"rank {rank:g}, {words}: {short(value)}") for rank, value in pairs]
            series.append(Series(when, points, STYLES[when]))
        largest = ", ".join(
            f"{short(getattr(site, when)[0])} times the median {words}" for when, words in spoken.items()
        )
        return line_chart(
            identity,
            (width, 280.0),
            Axis(Scale(0.8, 1.25 * max(site.ranks), True), "rank of the channel (log scale)"),
            Axis(y, "times the median channel (log scale)"),
            series,
            (f"Channels of {', '.join(site.layers)} by rank", f"The largest is {largest}."),
        )

    heading = f"The input that stands out most: {', '.join(site.layers)}"
    return tag("h3", plain(heading)), chart("ranks", draw)
