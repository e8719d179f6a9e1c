"""The language-model head in the packed format, at a width of its own."""

from typing import Any

from torch import nn

from bbb_ao.errors import ModelError, NumericsError
from bbb_ao.grid import Grid
from bbb_ao.packed_linear import PackedLinear, packed_linears
from bbb_ao.qat_linear import QATLinear, become
from bbb_ao.splitting import channel_metric, choose_index


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the output projection.

    Raises:
        ModelError: the model has none, or it is no plain nn.Linear.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    name = next((name for name, module in model.named_modules() if module is head), "")
    # A subclass is not plain: QATLinear trains, and others may compute something else.
    if type(head) is not nn.Linear or not name:
        raise ModelError(
            f"{type(model).__name__}: head: expected an nn.Linear as output embedding, got {type(head).__name__}; "
            "fix: leave head_bits out"
        )
    return name, head


def pack_head(model: Any, bits: int, grid: Grid | None = None) -> Any:
    """Round the head to nearest on the weight grid and pack it, in place.

    It keeps its width whatever `set_bits` selects for the model. A head tied to the embedding gets a copy of its own:
    the embedding stays as it is, `config.tie_word_embeddings` becomes False, and both are stored.

    Args:
        model: a Hugging Face causal language model.
        bits: 2 to 8.
        grid: None takes that of the model's packed layers, without which it could not be saved.
    Returns:
        `model`.
    Raises:
        ModelError: see `find_head`.
        ValueError: bits, or a grid with float32 scales.
        NumericsError: a weight that is NaN or infinite.
    """
    name, head = find_head(model)
    grid = grid or next((layer.grid for layer in packed_linears(model).values()), Grid())
    # No splitting: an index only where the last group is padded.
    index = choose_index(channel_metric([head.weight]), 0.0, grid.group_size)
    qat = QATLinear.from_linear(head, bits, grid=grid, index=index)
    try:
        packed = PackedLinear.from_qat(qat, bits, head.weight.dtype)
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from None
    packed.fixed_bits = True
    packed.index_source = None if index is None else f"{name}.ocs_index"
    become(head, packed)
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    for key in [key for key in getattr(model, "all_tied_weights_keys", {}) if key.startswith(f"{name}.")]:
        del model.all_tied_weights_keys[key]
    return model
