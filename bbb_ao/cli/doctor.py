"""`bbb-ao doctor`: what is installed, what this machine can run, and what it will run for a checkpoint, and why."""

import os
import platform
import shutil
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bbb_ao.routes import LayerKind

PACKAGES = ("bbb-ao", "torch", "triton", "torchao", "transformers", "safetensors")
# Rows of x and bits of the weight for which each of the GPU's kernels runs, on a layer that fits them all.
PROBES = {"decode": (1, 2), "few_rows": (8, 2), "warpgroup": (16, 2), "dequantize": (2048, 8)}


def doctor(
    directory: Annotated[str | None, typer.Argument(metavar="[DIR]", help="Checkpoint directory.")] = None,
) -> None:
    """Versions, GPU, which kernels compile here, and which will run for the checkpoint DIR and why."""
    config: dict[str, Any] = {}
    if directory is not None:
        from bbb_ao.modeldir import check_checkpoint

        config = check_checkpoint(directory, needs_tokenizer=False)
    for line in _versions():
        typer.echo(line)
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    # Seconds of imports that say nothing on a machine without a GPU.
    triton = "" if capability is None else _triton_problem()
    typer.echo(_device_line(capability))
    if capability is not None:
        for line in _kernel_lines(triton):
            typer.echo(line)
    if config:
        for line in _checkpoint_lines(config, None if triton else capability):
            typer.echo(line)


def _versions() -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name}: not installed{', so that there are no GPU kernels' if name == 'triton' else ''}")
    return lines


def _triton_problem() -> str:
    """Why the GPU kernels cannot be imported, or ""."""
    try:
        import bbb_ao.kernels.packed_linear.cuda  # noqa: F401
    except Exception as error:  # noqa: BLE001  whatever a broken installation raises is what is asked for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return ""


def _device_line(capability: tuple[int, int] | None) -> str:
    import torch

    if capability is not None:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        name = torch.cuda.get_device_name(0)
        number = ".".join(map(str, capability))
        return f"GPU: {name}, compute capability {number}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)
    compiled = f"torch.compile uses {compiler}" if compiler else "no C++ compiler, so that torch.compile cannot be used"
    threads = torch.get_num_threads()
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"GPU: none that torch can use; everything runs on the CPU, {count}; {compiled}"


def _kernel_lines(triton: str) -> list[str]:
    """Compile and run every GPU kernel once on a small layer, against the CPU."""
    if triton:
        return [f"kernels: none, Triton cannot be used ({triton}); packed layers dequantize in plain torch"]
    before = os.environ.get("BBB_AO_TUNING")
    # A first use would otherwise be measured and kept.
    os.environ["BBB_AO_TUNING"] = "off"
    try:
        return [f"kernel {name}: {_try_kernel(name, *probe)}" for name, probe in PROBES.items()] + [_tuning_line()]
    finally:
        os.environ.pop("BBB_AO_TUNING")
        if before is not None:
            os.environ["BBB_AO_TUNING"] = before


def _try_kernel(name: str, rows: int, bits: int) -> str:
    import torch

    from bbb_ao.grid import Grid
    from bbb_ao.kernels.packed_linear.cuda import kernel_for
    from bbb_ao.packed_linear import PackedLinear
    from bbb_ao.verify_packed import reference_product

    if kernel_for(rows, bits, True, torch.cuda.get_device_capability()) != name:
        return "not for this GPU"
    generator = torch.Generator().manual_seed(0)
    layer = PackedLinear(256, 256, 256, Grid(), bits)
    for part in (layer.plane_high, layer.plane_mid, layer.plane_low, layer.zero_point):
        if part is not None:
            part.random_(0, 256, generator=generator)
    layer.scale.random_(40, 80, generator=generator)
    layer.scale_exponent.zero_()
    x = torch.randn(rows, 256, generator=generator).to("cuda", torch.bfloat16)
    layer.to("cuda")
    start = time.perf_counter()
    try:
        y = layer.product(x)
        torch.cuda.synchronize()
        exact, bound = reference_product(layer, x)
    except Exception as error:  # noqa: BLE001  a compiler's failure is what is asked for
        return f"does not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    agrees = bool(((y.double() - exact).abs() <= bound).all())
    return f"{'compiles and agrees with float64' if agrees else 'WRONG RESULT'} ({time.perf_counter() - start:.1f} s)"


def _tuning_line() -> str:
    import torch

    from bbb_ao.kernels.packed_linear.tuning import SHIPPED, cache_folder, device_name

    file = f"{device_name(torch.cuda.current_device())}.json"
    sources = [str(folder / file) for folder in (SHIPPED, cache_folder()) if (folder / file).is_file()]
    known = " then ".join(sources) or "none for this GPU yet"
    return f"tuned settings: {known}; unknown shapes are measured on first use and kept in {cache_folder()}"


def layer_kinds(config: dict[str, Any]) -> "Counter[LayerKind]":
    """The kinds of packed layers that a checked configuration describes, and how many there are of each."""
    import torch

    from bbb_ao.grid import Grid
    from bbb_ao.routes import LayerKind

    quantization = config["quantization_config"]
    grid = Grid(**quantization["grid"])
    stored = config.get("dtype") or config.get("torch_dtype")
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(str(stored), torch.bfloat16)
    kinds: Counter[LayerKind] = Counter()
    for shape in quantization["modules"].values():
        opened = shape["max_bits"] if shape.get("fixed_bits") else shape.get("bits") or config.get("bits")
        widest = shape["max_bits"]
        bits = opened if type(opened) is int and 2 <= opened <= widest else widest
        sizes = (shape["out_features"], shape["stored_features"], bits, widest, shape["act_bits"])
        kinds[LayerKind(*sizes, grid, dtype)] += 1
    return kinds


def _checkpoint_lines(config: dict[str, Any], capability: tuple[int, int] | None) -> list[str]:
    from bbb_ao.routes import ROW_COUNTS, cpu_route, gpu_route

    lines = []
    for kind, count in layer_kinds(config).items():
        activations = "" if kind.act_bits is None else f", {kind.act_bits}-bit activations"
        shape = f"{kind.out_features} x {kind.stored_features} at {kind.bits} bits"
        dtype = str(kind.dtype).removeprefix("torch.")
        lines.append(f"{count} layer{'s' if count > 1 else ''} of {shape}{activations}, x in {dtype}:")
        for rows in ROW_COUNTS:
            name, reason = cpu_route(kind, rows) if capability is None else gpu_route(kind, rows, capability)
            lines.append(f"  M = {rows}: {name}{f' ({reason})' if reason else ''}")
    if capability is None:
        lines.append("fused row: under torch.compile only; dequantize: the dense weight, then the library's product")
    elif any("float32" in line for line in lines):
        lines.append('float32 has no kernels: load with dtype="bfloat16"')
    return lines
