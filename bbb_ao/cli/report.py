"""`bbb-ao report`: one HTML file that shows a run."""

from typing import Annotated

import typer


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output directory of a training run, finished or not.")],
    output: Annotated[str | None, typer.Option(metavar="FILE", help="The report [RUN.report.html].")] = None,
    log: Annotated[str | None, typer.Option(metavar="FILE", help="The run's log [RUN.log.jsonl].")] = None,
) -> None:
    """Write one HTML file about RUN: losses, perplexities, outlier channels, errors by layer, time and memory.

    It holds all that it shows and asks nothing of the network.
    """
    from bbb_ao.report import write_report

    typer.echo(f"{write_report(run, output, log)}: open it in a browser")
