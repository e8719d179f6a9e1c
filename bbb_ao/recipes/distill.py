"""End-to-end stages: the whole student against the full-precision model's distribution.

loss = T**2 * KL(softmax(z / T) || softmax(z_q / T)), the mean over all positions, with z the teacher's and z_q the
student's logits; a sum over the stage's widths with their weights. Source: design.md, section 1.5.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bbb_ao.passes import find_blocks
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.optimization import Fit, autocast, fit
from bbb_ao.recipes.stages import Recipe, Stage


def divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T**2 * KL(teacher || student), mean over positions; logits are [batch, tokens, vocabulary]."""
    teacher = F.log_softmax(teacher_logits.flatten(0, -2).float() / temperature, -1)
    student = F.log_softmax(student_logits.flatten(0, -2).float() / temperature, -1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


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
        return fit(blocks, stage, recipe, len(sequences), loss_of, seed, stage.name, on_step, load)
    finally:
        set_training_bits(student, stage.widths[-1], stage.act_bits)
        student.requires_grad_(False).to("cpu")
        teacher.to(home)
