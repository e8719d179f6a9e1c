"""`bbb-ao serve`: a checkpoint behind HTTP, at the width that each request asks for."""

from typing import Annotated

import typer

from bbb_ao.cli.entry import Signalled
from bbb_ao.cli.generate import DeviceOption, check_opening


def serve(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint directory.")],
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8000,
    budget_gb: Annotated[
        float | None, typer.Option(metavar="GB", help="Hold no more than the widest width whose weights fit.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Answer /v1/completions and /v1/chat/completions, until SIGTERM or Ctrl-C. No authentication, no encryption."""
    check_opening(directory, None, budget_gb)
    from bbb_ao.cli.completion import Writer
    from bbb_ao.cli.http_api import listen

    with listen(Writer.open(directory, device, budget_gb), directory, host, port) as server:
        typer.echo(f"serving {directory} at http://{host}:{server.server_port}/v1")
        try:
            server.serve_forever(poll_interval=0.1)
        except (KeyboardInterrupt, Signalled):
            server.finish()
    typer.echo("stopped")
