"""`bbb-ao verify`: is a checkpoint what was saved, and does this machine compute with it what it stands for?"""

from pathlib import Path
from typing import Annotated

import typer


def verify(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint directory.")],
    files_only: Annotated[bool, typer.Option("--files", help="Compare no products, only the files.")] = False,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda [cuda where there is one].")] = None,
) -> None:
    """Check a checkpoint's files and hashes, then its layers against float64 at every width."""
    from bbb_ao.manifest import MANIFEST, check_manifest
    from bbb_ao.modeldir import check_model_directory

    config = check_model_directory(directory, allow_bitbybit=True, needs_tokenizer=False)
    typer.echo("structure: configuration, index and headers agree")
    manifest = check_manifest(Path(directory))
    if manifest is None:
        typer.echo(f"{MANIFEST}: none, so that changed bytes cannot be told; what bbb_ao saves has one")
    else:
        size = manifest.bytes / 2**20
        typer.echo(f"{MANIFEST}: {len(manifest.files)} files, {manifest.tensors} tensors, {size:.1f} MiB as saved")
    if files_only:
        return
    if "quantization_config" not in config:
        typer.echo("no packed layers: nothing to compare")
        return
    _compare(directory, device)


def _compare(directory: str, device: str | None) -> None:
    from bbb_ao.recipes.loading import choose_device, load_model
    from bbb_ao.verify_packed import WidthCheck, verify_packed

    def line(check: WidthCheck) -> None:
        typer.echo(
            f"{check.bits} bits: {check.layers} layers as the fake-quant reference, "
            f"largest error {check.share:.3f} of its bound ({check.layer})"
        )

    place = choose_device(device)
    # The types that the kernels of the device are made for.
    verify_packed(load_model(directory, "bfloat16" if place.type == "cuda" else "float32").to(place), line)
