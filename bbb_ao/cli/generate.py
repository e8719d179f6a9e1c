"""`bbb-ao generate`: continue a prompt, token by token on stdout; the speed stands on stderr."""

import math
from typing import Annotated

import typer

from bbb_ao.errors import RecipeError

BudgetOption = Annotated[
    float | None, typer.Option(metavar="GB", help="Instead of --bits: the widest width whose weights fit.")
]
DeviceOption = Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda [cuda where there is one].")]


def generate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint directory.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue.")],
    bits: Annotated[int | None, typer.Option(metavar="N", min=2, max=8, help="Weight width [DIR's own].")] = None,
    budget_gb: BudgetOption = None,
    draft_bits: Annotated[
        int | None, typer.Option(metavar="N", min=2, max=8, help="Draft at this width, verify at --bits [widest].")
    ] = None,
    draft_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Drafted at a time.")] = 4,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="At most [128].")] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0, help="Of the samples; 0 takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**63 - 1, help="Of the samples.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the chat template.")] = False,
    device: DeviceOption = None,
) -> None:
    """Continue PROMPT at one of the widths that DIR holds, on stdout as it comes."""
    widths = check_opening(directory, bits, budget_gb)
    from bbb_ao.cli.completion import Request, Writer, check_widths

    text = [{"role": "user", "content": prompt}] if chat else prompt
    request = Request(text, bits, draft_bits, draft_tokens, max_new_tokens, temperature, seed)
    check_widths(request, widths)
    done = Writer.open(directory, device, budget_gb).write(request, lambda piece: typer.echo(piece, nl=False))
    typer.echo()
    typer.echo(done.summary, err=True)


def check_opening(directory: str, bits: int | None, budget_gb: float | None) -> list[int]:
    """Refuse a directory, or a budget that it cannot be opened under, before anything is loaded.

    Returns:
        the widths that it holds; none for a model that is not packed.
    Raises:
        RecipeError: bits and a budget, or a budget without widths to choose from; ModelError: the directory.
    """
    from bbb_ao.modeldir import check_model_directory

    if bits is not None and budget_gb is not None:
        raise RecipeError("--bits: expected it or --budget-gb, got both; fix: give one")
    if budget_gb is not None and not 0 < budget_gb < math.inf:
        raise RecipeError(f"--budget-gb: expected a positive number of GB, got {budget_gb:g}; fix: give one")
    config = check_model_directory(directory, allow_bitbybit=True)
    if "quantization_config" not in config:
        if budget_gb is not None:
            raise RecipeError(f"--budget-gb: expected a bbb_ao checkpoint, got {directory}; fix: leave it out")
        return []
    from bbb_ao.checkpoint import openable_widths

    return openable_widths(directory)
