"""Other libraries' 2-bit weight-only linear layers, as `layers.Layer`s: humming-kernels and gemlite.

Neither is a dependency: each is imported where it is used. Both get random codes, scales and zero points in their own
form, are tuned as their authors advise, and are compared with their own dequantized weight.
"""

import copy
import importlib
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

import torch
from layers import CHECKED_ROWS, GROUP_SIZE, Layer, copies_for, nbytes
from torch import Tensor

BITS = 2
# gemlite adds partial sums into a bfloat16 output with atomics, up to one for every 32 columns.
TOLERANCE = 0.1


def load(module: str, package: str) -> Any:
    """Import a peer.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{package} is not installed ({error}); fix: put its wheel in .whl_peers") from None


def make_humming(n: int, k: int, rotation: int, rows: Sequence[int], generator: torch.Generator) -> Layer:
    """humming's W2A16 with groups of 32: E4M3 scales, one float32 a tensor, whole zero points.

    It stores 2-bit zero points in 4 bits, so that a weight takes 2.375 bits, as ours does. Kernels are those of its
    heuristics, which its documentation calls optional to override; they are compiled at once for all of `rows`.
    """
    layer_module = load("humming.layer", "humming-kernels")
    tune = load("humming.tune", "humming-kernels")
    kernel = load("humming.kernel.humming", "humming-kernels").HummingKernel
    config = {
        "dtype": "uint2",
        "group_size": GROUP_SIZE,
        "scale_dtype": "float8e4m3",
        "scale_2_type": "tensor",
        "has_zero_point": True,
    }
    layer = layer_module.HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    draw = {"device": generator.device, "generator": generator}

    def words(height: int, width: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (height, width), dtype=torch.int64, **draw).to(torch.int32)

    groups = k // GROUP_SIZE
    tensors = {
        "weight": words(n, k * BITS // 32),
        "weight_scale": torch.rand(n, groups, **draw).add(0.5).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.full((1,), 2.0**-6, device=generator.device),
        "zero_point": words(n * BITS // 32, groups),
    }
    dense = layer.weight_schema.dequant_tensors(tensors)[:CHECKED_ROWS].double()
    layer.load_from_tensors(tensors)
    layer.transform()
    weight_bytes = nbytes(list(layer.parameters()))
    layers = [layer] + [copy.deepcopy(layer) for _ in range(copies_for(weight_bytes, rotation) - 1)]
    ends = sorted(rows)
    intervals = [
        [start, end, tune.get_heuristics_config(layer.humming_config, shape_m=end)]
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    tuning = json.dumps(intervals)
    kernel.prepare_kernels(layer.humming_config.to_str(), None, tuning)
    return Layer(
        [lambda x, layer=layer: layer(x, tuning_config=tuning) for layer in layers],
        weight_bytes,
        lambda x: x.double() @ dense.T,
        TOLERANCE,
        {"group_size": GROUP_SIZE, "version": importlib.metadata.version("humming-kernels")},
    )


def make_gemlite(n: int, k: int, rotation: int, rows: Sequence[int], generator: torch.Generator) -> Layer:
    """gemlite's 2-bit weight-only layer at the smallest group size that it takes for every one of `rows`.

    Scales and zero points are bfloat16: 3 bits a weight with groups of 32. Its autotuner runs at the first call with a
    number of rows; `load_tuning` brings back what an earlier run found.
    """
    load("gemlite", "gemlite")
    refused: Exception | None = None
    for group_size in (GROUP_SIZE, 64, 128):
        try:
            layer = _gemlite_layer(n, k, group_size, rotation, generator)
            for m in rows:
                layer.calls[0](torch.randn(m, k, dtype=torch.bfloat16, device=generator.device))
        except Exception as error:  # noqa: BLE001 - the last refusal is raised below
            refused = error
            continue
        return layer
    raise RuntimeError(f"gemlite takes no group size of 32, 64 or 128: {refused}") from refused


def _gemlite_layer(n: int, k: int, group_size: int, rotation: int, generator: torch.Generator) -> Layer:
    core, helper = load("gemlite.core", "gemlite"), load("gemlite.helper", "gemlite")
    draw = {"device": generator.device, "generator": generator}
    codes = torch.randint(0, 2**BITS, (n, k), dtype=torch.uint8, **draw)
    scales = (torch.rand(n, k // group_size, **draw).add(0.5) * 2.0**-6).to(torch.bfloat16)
    zeros = torch.randint(0, 2**BITS, (n, k // group_size), **draw).to(torch.bfloat16)
    processor = helper.A16W2_HQQ_INT(device=str(generator.device), dtype=torch.bfloat16)
    packed = processor.from_weights(codes, scales, zeros)
    tensors, settings = packed.get_tensor_args(), packed.get_meta_args()
    weight_bytes = nbytes(tensors)
    copies = [tensors] + [[t.clone() for t in tensors] for _ in range(copies_for(weight_bytes, rotation) - 1)]
    wide = [t[:CHECKED_ROWS].double().repeat_interleave(group_size, 1) for t in (scales, zeros)]
    dense = (codes[:CHECKED_ROWS].double() - wide[1]) * wide[0]
    return Layer(
        [lambda x, operands=operands: core.forward_functional(x, None, operands, settings) for operands in copies],
        weight_bytes,
        lambda x: x.double() @ dense.T,
        TOLERANCE,
        {"group_size": group_size, "version": importlib.metadata.version("gemlite")},
    )


def set_gemlite_autotune(effort: str) -> None:
    """How many configurations gemlite tries: "fast", its default, or "max"."""
    load("gemlite.core", "gemlite").set_autotune(effort)


def load_tuning(path: str) -> None:
    """Let gemlite use what `save_tuning` wrote, where it exists."""
    load("gemlite", "gemlite").load_config(path, print_error=False)


def save_tuning(path: str) -> None:
    """Write what gemlite's autotuner found, as its authors advise."""
    load("gemlite", "gemlite").cache_config(path)


PEERS = {"humming": make_humming, "gemlite": make_gemlite}
