"""End-to-end stages: the whole student against the full-precision model's distribution.

loss = T**2 * KL(softmax(z / T) || softmax(z_q / T)), the mean over all positions, with z the teacher's and z_q the
student's logits; a sum over the stage's widths with their weights. Source: design.md, section 1.5.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbb_ao.passes import find_blocks
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.optimization import Fit, autocast, fit
from bbb_ao.recipes.stages import Recipe, Stage
from bbb_ao.recipes.streams import record_calls


def divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T**2 * KL(teacher || student), mean over positions; logits are [batch, tokens, vocabulary]."""
    teacher = F.log_softmax(teacher_logits.flatten(0, -2).float() / temperature, -1)
    student = F.log_softmax(student_logits.flatten(0, -2).float() / temperature, -1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@contextmanager
def usual_masks(teacher: nn.Module, student: nn.Module, ids: Tensor) -> Iterator[None]:
    """Give the blocks of both models the attention masks of an ordinary call.

    While a CUDA graph is recorded, transformers builds masks that it leaves out otherwise, and attention with them
    takes another kernel, which is slower and rounds differently.

    Args:
        ids: [1, tokens], int64, of the length that the models will be called with.
    """
    calls = record_calls(teacher, [block for _, block in find_blocks(teacher)], ids)
    handles = []
    for model in (teacher, student):
        for (_, block), call in zip(find_blocks(model), calls, strict=True):
            if "attention_mask" in call.kwargs:
                hook = partial(_with_mask, call.kwargs["attention_mask"])
                handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_mask(mask: Any, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, {**kwargs, "attention_mask": mask}


def train_model_stage(
    teacher: nn.Module,
    student: nn.Module,
    sequences: Tensor,
    stage: Stage,
    recipe: Recipe,
    device: torch.device,
    seed: int,
    on_step: Callable[[int, int, Callable[[], float]], None] | None = None,
) -> Fit:
    """Train the student's blocks end to end for one stage; embeddings, head and final norm stay as they are.

    Args:
        sequences: [sequences, tokens], int64.
        teacher: in evaluation mode.
        seed, on_step: as in `fit`.
    """
    student.requires_grad_(False)
    home = next(teacher.parameters()).device
    blocks = nn.ModuleList([student.get_submodule(name) for name, _ in find_blocks(student)])
    teacher.to(device)
    # eval: attention dropout would only blur the target.
    student.to(device).eval()
    factors = stage.loss_weights or (1.0,) * len(stage.widths)

    def load(rows: Tensor) -> tuple[Tensor, ...]:
        return (sequences[rows].to(device),)

    def loss_of(ids: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device):
            target = teacher(ids, use_cache=False).logits
        total = torch.zeros((), device=device)
        for width, factor in zip(stage.widths, factors, strict=True):
            if factor == 0:
                continue
            set_training_bits(student, width, stage.act_bits)
            with autocast(device):
                logits = student(ids, use_cache=False).logits
            total = total + factor * divergence(target, logits, stage.kl_temperature)
        return total

    try:
        with usual_masks(teacher, student, sequences[:1]):
            return fit(blocks, stage, recipe, len(sequences), loss_of, seed, stage.name, on_step, load)
    finally:
        set_training_bits(student, stage.widths[-1], stage.act_bits)
        student.requires_grad_(False).to("cpu")
        teacher.to(home)
