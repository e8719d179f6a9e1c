"""`bbb-ao plan`, and the short form of it that `bbb-ao train` prints first."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bbb_ao.cli.tables import print_table
from bbb_ao.errors import ResourceError

if TYPE_CHECKING:
    from bbb_ao.planning import Limits, Plan
    from bbb_ao.recipes.stages import Recipe


def plan_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory (config.json suffices) or hub id.")],
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="Shipped recipe or YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE...", help="Change the recipe, e.g. stages.0.lr=1e-4."),
    ] = None,
    output: Annotated[str, typer.Option(metavar="DIR", help="Where the result would go, for its disk.")] = ".",
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda [cuda where there is one].")] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Time a few steps on the device.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what `train` would do with MODEL: layers, bits, bytes, memory, disk and time; no weight is loaded."""
    from bbb_ao.modeldir import CONFIG, check_config, fetch_model
    from bbb_ao.recipes.loader import load_recipe

    settings = load_recipe(recipe, overrides or [])
    directory = fetch_model(model, (CONFIG,))
    check_config(directory)
    from bbb_ao.outputs import check_space
    from bbb_ao.planning import check_limits, make_plan, read_limits
    from bbb_ao.recipes.loading import choose_device

    place = choose_device(device)
    found = make_plan(directory, settings, place, probe)
    limits = read_limits(place, output)
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "available": asdict(limits)}))
        return
    _print_layers(found)
    _print_memory(found)
    print_summary(found, limits)
    try:
        check_limits(settings, list(found.phases), limits)
        check_space(output, found.run_bytes)
    except ResourceError as error:
        typer.echo(f"`train` would refuse it: {error}")


def check_plan(directory: Path, recipe: "Recipe", device: Any, output: str) -> None:
    """Print the short form of a run's plan.

    Raises:
        ResourceError: it cannot fit; names what to change.
        RecipeError, ModelError: as `make_plan`.
    """
    from bbb_ao.planning import check_limits, make_plan, read_limits

    found = make_plan(directory, recipe, device, probe=False)
    limits = read_limits(device, output)
    print_summary(found, limits)
    check_limits(recipe, list(found.phases), limits)


def print_summary(found: "Plan", limits: "Limits") -> None:
    """A few lines: layers, size, memory, disk and time, each beside what is there."""
    from bbb_ao.outputs import size

    def beside(needed: int, free: int | None) -> str:
        return size(needed) + ("" if free is None else f" of {size(free)} free")

    typer.echo(
        f"{found.architecture}: {len(found.layers)} layers to pack, {len(found.skipped)} weights left as they are"
    )
    typer.echo(
        f"result: {found.bits_per_weight:.3f} bits per weight stored, {found.default_bits_per_weight:.3f} read at the "
        f"default width; {size(found.checkpoint_bytes)}"
    )
    typer.echo(f"disk: {beside(found.run_bytes, limits.output)}, with the state of the run")
    if limits.device is not None:
        typer.echo(f"GPU memory: {beside(found.device_bytes, limits.device)}")
    typer.echo(f"memory: {beside(found.host_bytes, limits.host)}")
    if found.temporary_bytes:
        typer.echo(f"temporary files: {beside(found.temporary_bytes, limits.temporary)}")
    if found.seconds is not None:
        for name, seconds in zip(found.stages, found.seconds, strict=True):
            typer.echo(f"{name}: {_duration(seconds)}")
        if None not in found.seconds:
            typer.echo(f"training: {_duration(sum(seconds or 0.0 for seconds in found.seconds))} on {found.device}")


def _print_layers(found: "Plan") -> None:
    heads = ("layer", "out x in", "stored", "split", "padding", "bits", "act_bits", "bits_per_weight", "bytes")
    rows: list[tuple[Any, ...]] = [
        (
            layer.name,
            f"{layer.out_features} x {layer.in_features}",
            layer.stored_features,
            layer.split_channels,
            layer.padding,
            layer.bits,
            layer.act_bits or 16,
            layer.bits_per_weight,
            layer.bytes,
        )
        for layer in found.layers
    ]
    print_table([heads, *rows])
    for name, reason in found.skipped:
        typer.echo(f"left as it is: {name}: {reason}")


def _print_memory(found: "Plan") -> None:
    """A line for each phase: the GPU's and the host's terms."""
    from bbb_ao.outputs import size

    for phase in found.phases:
        for where, terms in (("GPU", phase.device), ("host", phase.host), ("disk", {"streams": phase.disk})):
            shown = {term: count for term, count in terms.items() if count}
            if shown:
                parts = ", ".join(f"{term} {size(count)}" for term, count in shown.items())
                typer.echo(f"{phase.name}: {where} {size(sum(shown.values()))} ({parts})")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown: a step is too long to be tried on a CPU"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.1f} {unit}"
    return f"about {seconds:.0f} s"
