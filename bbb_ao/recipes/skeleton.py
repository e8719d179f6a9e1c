"""A model without its weights: built from config.json on the meta device, then prepared and packed in shape alone.

The code is that of training, `prepare_student`, so that layers, indices and skipped weights are the same.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bbb_ao.modeldir import check_config
from bbb_ao.packed_head import find_head
from bbb_ao.packed_linear import PackedLinear
from bbb_ao.qat_linear import QATLinear, become, qat_linears
from bbb_ao.recipes.loading import LOADING_ERRORS, refused_by_transformers
from bbb_ao.recipes.optimization import codes_kept, trainable_groups
from bbb_ao.recipes.prepare import Prepared, prepare_student, recipe_grid
from bbb_ao.recipes.stages import Recipe, Stage
from bbb_ao.safetensors_header import read_header
from bbb_ao.splitting import choose_index

aten = torch.ops.aten
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Answered(TorchDispatchMode):
    """Answers for tensors without values what torch does not.

    Models ask whether a mask is full, whether positions are those of one sequence, whether numbers are finite: in
    training all of it is so. For the shapes of experts' products torch knows bfloat16 alone.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        if func.overloadpacket is aten._grouped_mm:
            first, second = args[:2]
            groups = (args[2].numel(),) if first.dim() == second.dim() == 2 else first.shape[:-2]
            return first.new_empty(*groups, first.shape[-2], second.shape[-1])
        return func(*args, **(kwargs or {}))


def build_skeleton(directory: str | Path) -> Any:
    """The causal language model of a directory on the meta device, in evaluation mode, in the type it is loaded in.

    Only config.json is needed.

    Raises:
        ModelError: the configuration is missing, unsafe, or no model that transformers builds.
    """
    check_config(directory)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or _stored_dtype(Path(directory)))
    except LOADING_ERRORS as error:
        raise refused_by_transformers(directory, "model", error) from error
    return model.eval()


def _stored_dtype(directory: Path) -> torch.dtype:
    """The type of the first weight on disk, as transformers chooses where the configuration is silent; else float32."""
    entries = [entry for file in sorted(directory.glob("*.safetensors"))[:1] for entry in read_header(file).values()]
    return next((DTYPES[entry.dtype] for entry in entries if entry.dtype in DTYPES), torch.float32)


def prepare_skeleton(model: nn.Module, recipe: Recipe) -> tuple[Any, Prepared]:
    """The student of a model on the meta device, float32, and what preparation decided.

    Rules of channel splitting are those of the analysis; training also verifies each on numbers.

    Raises:
        RecipeError, ModelError: see `prepare_student`, and `find_head` where the recipe packs the head.
    """
    if recipe.head_bits is not None:
        find_head(model)
    student = copy.deepcopy(model).float()
    with torch.device("meta"), Answered():
        prepared = prepare_student(student, recipe, None)
    return student, prepared


@contextmanager
def training(block: nn.Module, stage: Stage, recipe: Recipe) -> Iterator[list[dict]]:
    """A prepared block as a stage trains it: its parameter groups, with codes kept where the stage keeps some."""
    # Kept bits as from a stage before that kept them: the master stays, and no twin is read.
    with codes_kept(block, stage, stage, block):
        yield trainable_groups(block, stage, recipe.train_norms)


def trained_bytes(block: nn.Module, stage: Stage, recipe: Recipe) -> int:
    """Of the parameters that a stage trains, float32."""
    with training(copy.deepcopy(block), stage, recipe) as groups:
        return sum(4 * parameter.numel() for group in groups for parameter in group["params"])


def pack_skeleton(student: Any, model: nn.Module, recipe: Recipe) -> Any:
    """Buffers of the packed student's shapes and types, in place, as `compress.pack` makes them."""
    dtype = next(model.parameters()).dtype
    for qat in qat_linears(student).values():
        become(qat, PackedLinear.allocate(qat, max(recipe.stages[-1].widths), dtype))
    if recipe.head_bits is not None:
        _, head = find_head(student)
        become(head, _packed_head(head, recipe, dtype))
    types = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, tensor in (*student.named_parameters(), *student.named_buffers()):
        tensor.data = tensor.data.to(types.get(name, tensor.dtype))
    return student


def _packed_head(head: nn.Linear, recipe: Recipe, dtype: torch.dtype) -> PackedLinear:
    grid, bits = recipe_grid(recipe), recipe.head_bits
    assert bits is not None, "asked for by the recipe"
    index = choose_index(torch.zeros(head.in_features), 0.0, grid.group_size)
    # Shapes alone: the index may be on the meta device as well.
    meta = None if index is None else index.to("meta")
    packed = PackedLinear.allocate(QATLinear.from_linear(head, bits, grid=grid, index=meta), bits, dtype)
    packed.fixed_bits = True
    return packed


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that are saved, each counted once (a tied head is its embedding)."""
    saved = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
