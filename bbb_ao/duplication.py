"""Channel duplication behind a producer: a norm whose output is gathered once for all its consumers."""

from torch import Tensor, nn

from bbb_ao.splitting import expand_channels


def duplicate_output(module: nn.Module, index: Tensor) -> None:
    """Let `module` deliver the stored columns: output[..., k] = output[..., index[k]], zero where index[k] is padding.

    The index becomes the buffer `duplicate_index` (int32 [stored_features]) beside the module's own parameters, whose
    names in the state dict stay the same; torch.compile fuses the gather into the norm.

    Raises:
        ValueError: the module duplicates its output already.
    """
    if hasattr(module, "duplicate_index"):
        raise ValueError(f"{type(module).__name__}: its output is duplicated already; apply the plan to a fresh model")
    module.register_buffer("duplicate_index", index)
    module.register_forward_hook(_duplicate)


def _duplicate(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return expand_channels(output, module.duplicate_index)  # type: ignore[arg-type]


def undo_duplicate_output(module: nn.Module) -> None:
    """Take back `duplicate_output`."""
    del module._buffers["duplicate_index"]
    for key, hook in list(module._forward_hooks.items()):
        if hook is _duplicate:
            del module._forward_hooks[key]
