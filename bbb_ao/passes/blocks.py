"""Find the decoder blocks of a model and say which of their weights can be quantized."""

from collections.abc import Iterator

from torch import Tensor, nn

from bbb_ao.errors import ModelError
from bbb_ao.qat_linear import QATLinear, is_plain_linear


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks, in order, as (fqn, block).

    They are the children of one `nn.ModuleList`: among the lists inside `model.get_decoder()` (where the model has it,
    so that an encoder or a vision tower does not count) whose children all are containers that hold a matrix, the one
    with the most parameters, the outermost where two tie.

    Raises:
        ModelError: no such list.
    """
    names = {module: name for name, module in model.named_modules()}
    for root in _search_roots(model):
        candidates = [module for module in root.modules() if isinstance(module, nn.ModuleList) and _is_stack(module)]
        if candidates:
            stack = max(candidates, key=lambda module: sum(tensor.numel() for tensor in _tensors(module)))
            return [(f"{names[stack]}.{i}".removeprefix("."), block) for i, block in enumerate(stack)]
    raise ModelError(
        f"{type(model).__name__}: decoder blocks: expected an nn.ModuleList of layers that hold weight matrices, "
        "got none; fix: pass a decoder-only Hugging Face model"
    )


def _search_roots(model: nn.Module) -> Iterator[nn.Module]:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if isinstance(decoder, nn.Module) and any(module is decoder for module in model.modules()):
        yield decoder
    yield model


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    # Buffers too: the weights of a packed model are buffers.
    yield from module.parameters()
    yield from module.buffers()


def _is_stack(modules: nn.ModuleList) -> bool:
    # Lists of bare Linears or embeddings (heads of multi-codebook models) are not decoder blocks.
    return len(modules) > 0 and all(
        any(True for _ in child.children()) and any(tensor.dim() >= 2 for tensor in _tensors(child))
        for child in modules
    )


def block_linears(block: nn.Module) -> list[str]:
    """Names, relative to `block`, of the Linears that can be quantized, in module order ("" for the block itself)."""
    return [
        name for name, module in block.named_modules() if isinstance(module, nn.Linear) and not _linear_defect(module)
    ]


def _linear_defect(linear: nn.Linear) -> str:
    if isinstance(linear, QATLinear):
        return "already prepared (QATLinear), expected an nn.Linear"
    weight = linear.weight
    if weight.numel() == 0:
        return f"zero-sized weight {list(weight.shape)}"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"weight is already {weight.dtype}, expected float16, bfloat16, float32 or float64"
    if type(weight) is not nn.Parameter:
        return f"weight is a {type(weight).__name__}, expected a plain parameter"
    if not is_plain_linear(linear):
        return f"{type(linear).__name__} computes something else than x @ weight^T + bias"
    return ""


def unsupported_weights(block: nn.Module) -> list[tuple[str, str]]:
    """Weight matrices of the block that stay as they are, as (name relative to the block, reason)."""
    found: list[tuple[str, str]] = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            if defect := _linear_defect(module):
                found.append((name, defect))
        elif not isinstance(module, nn.Embedding):
            for parameter, weight in module.named_parameters(recurse=False):
                if weight.dim() >= 2:
                    found.append((f"{name}.{parameter}".removeprefix("."), _parameter_reason(module, weight)))
    return found


def _parameter_reason(module: nn.Module, weight: Tensor) -> str:
    kind = type(module).__name__
    if kind == "Conv1D":
        return "Conv1D (a transposed weight [in_features, out_features]), expected an nn.Linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"a convolution ({kind}), expected an nn.Linear"
    if weight.dim() >= 3:
        return f"{weight.dim()}-D weight {list(weight.shape)} of {kind} (fused experts), expected an nn.Linear each"
    return f"weight of {kind} (a router or a bare F.linear), expected an nn.Linear"
