"""The whole page: one file of HTML, with its style inside, that asks nothing of the network."""

import re
from importlib.resources import files

from bbb_ao.report.layers import channels_section, errors_section
from bbb_ao.report.markup import missing, paragraph, plain, section, shell, table, tag
from bbb_ao.report.quality import data_sets, perplexity_section
from bbb_ao.report.records import Run
from bbb_ao.report.scale import short
from bbb_ao.report.training import GIB, cost_section, duration, loss_section, peaks, whole_time

# By this a report is known before it is overwritten.
MARK = '<meta name="generator" content="bbb-ao report">'
# The browser refuses whatever a mistake might let in.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(run: Run) -> str:
    """The report of a run; the same run gives the same text."""
    head = (
        '<meta charset="utf-8">',
        MARK,
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        tag("title", plain(f"{run.name}: bbb-ao report")),
        tag("style", (files("bbb_ao.report") / "page.css").read_text(encoding="utf-8")),
    )
    sections = (
        perplexity_section,
        loss_section,
        errors_section,
        channels_section,
        cost_section,
        _recipe_section,
        _reproduce_section,
    )
    body = _header(run) + tag("main", *(part(run) for part in sections))
    lines = ("<!doctype html>", '<html lang="en">', *head, "<body>", body, "</body>", "</html>", "")
    return "\n".join(lines)


def _header(run: Run) -> str:
    name = re.search(r"^name: (.{1,100})$", run.recipe or "", re.MULTILINE)
    subject = " ".join([f"recipe {name[1]}" if name else "", f"on {run.model}" if run.model else ""]).strip()
    lines = [paragraph(line) for line in (subject[:1].upper() + subject[1:], _state(run)) if line]
    return tag("header", tag("h1", plain(run.name)), *lines, _figures(run))


def _state(run: Run) -> str:
    if run.saved:
        return "Finished; the checkpoint is saved."
    if not run.stages:
        return "Not finished: no stage has begun."
    number, stage = max(run.stages.items())
    return f"Not finished: stage {number + 1}, {stage.name}, has done {len(stage.fits)} of {stage.blocks} blocks."


def _figures(run: Run) -> str:
    """The few numbers that come first."""
    shown: list[tuple[str, str]] = []
    stored = None if run.bits_per_weight is None else f"{run.bits_per_weight:.2f}"
    for rows in list(data_sets(run).values())[:1]:
        own = [(row.bits_per_weight, row) for row in rows if row.of == "checkpoint" and row.bits_per_weight]
        for read, row in [min(own, key=lambda pair: pair[0])] if own else []:
            shown.append((f"perplexity at {row.bits} bits", f"{row.ppl:.2f}"))
            shown += [("in full precision", f"{each.ppl:.2f}") for each in rows if each.of == "full_precision"]
            shown += [(f"bits/weight at {row.bits} bits", f"{read:.2f}")] if f"{read:.2f}" != stored else []
    shown += [("bits/weight stored", stored)] if stored else []
    shown += [("time", duration(whole_time(run)))] if run.phases else []
    shown += [(f"{name} memory", f"{short(most / GIB)} GiB") for name, most in peaks(run).items()]
    cells = [tag("div", tag("dt", plain(name)), tag("dd", plain(value))) for name, value in shown]
    return tag("dl", *cells, class_="figures")


def _recipe_section(run: Run) -> str:
    """What the run depends on, and the resolved recipe."""
    facts = [
        ("model", run.model),
        ("calibration text", "{:,} sequences of {:,} tokens".format(*run.sequences) if run.sequences else None),
        ("device", run.device),
        *(run.versions.items()),
    ]
    known = [(name, value) for name, value in facts if value]
    parts = [tag("div", table("What the run depends on", (), known, False), class_="facts")] if known else []
    if run.recipe:
        text = tag("pre", tag("code", plain(run.recipe)), tabindex="0")
        parts.append(tag("details", tag("summary", "Recipe with every key"), text))
    return section("recipe", "Recipe and versions", *(parts or [missing("Neither recipe nor log is there.")]))


def _reproduce_section(run: Run) -> str:
    if run.command is None:
        told = missing("The command is not known: the run was started from Python, or its log is not there.")
        return section("reproduce", "To reproduce", told)
    text = "The same command gives the same weights on the same machine, with the same data and versions."
    return section("reproduce", "To reproduce", paragraph(text), shell(run.command))
