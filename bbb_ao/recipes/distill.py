"""End-to-end stages: the whole student against the full-precision model's distribution, or against the text.

With p = softmax(z / T) the teacher's and q = softmax(z_q / T) the student's distribution, the mean over positions of

    forward_kl   T**2 * KL(p || q)
    reverse_kl   T**2 * KL(q || p)
    mixed_kl     T**2 * (g * KL(q || p) + (1 - g) * KL(p || q)), g = mean of p(next token of the text) at T = 1
    next_token   -log q(next token of the text) at T = 1, over all positions but the last

is summed over the stage's widths with their weights. Sources: design.md, section 1.5; the mixture and its g are
BitDistiller's (Du et al., arXiv 2402.10631, equations of CAKLD).
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
from bbb_ao.recipes.optimization import Fit, autocast, codes_kept, fit, stage_rows
from bbb_ao.recipes.stages import Recipe, Stage
from bbb_ao.recipes.streams import record_calls


def divergence(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0, reverse: float = 0.0
) -> Tensor:
    """T**2 * (reverse * KL(student || teacher) + (1 - reverse) * KL(teacher || student)), mean over positions.

    Args:
        teacher_logits, student_logits: [batch, tokens, vocabulary].
        reverse: share of the reverse divergence, 0 to 1.
    """
    teacher = F.log_softmax(teacher_logits.flatten(0, -2).float() / temperature, -1)
    student = F.log_softmax(student_logits.flatten(0, -2).float() / temperature, -1)
    total = torch.zeros((), device=student.device)
    if reverse < 1:
        total = total + (1 - reverse) * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    if reverse > 0:
        total = total + reverse * F.kl_div(teacher, student, reduction="batchmean", log_target=True)
    return temperature**2 * total


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of ids[:, 1:] under logits[:, :-1]: [batch, tokens, vocabulary], ids [batch, tokens]."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def confidence(teacher: nn.Module, sequences: Tensor, micro_batch: int, device: torch.device) -> float:
    """Mean probability that the teacher gives to the text's tokens, 0 to 1; sequences [sequences, tokens], int64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for rows in sequences.split(micro_batch):
        ids = rows.to(device)
        with autocast(device):
            logits = teacher(ids, use_cache=False).logits[:, :-1]
        picked = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])
        total += picked.exp().sum(dtype=torch.float64)
    return total.item() / sequences[:, 1:].numel()


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
    higher: Stage | None = None,
) -> Fit:
    """Train the student's blocks end to end for one stage; embeddings, head and final norm stay as they are.

    Args:
        sequences: [sequences, tokens], int64; the last `recipe.generated` of them are generated.
        teacher: in evaluation mode.
        seed, on_step: as in `fit`.
        higher: the stage before this one in the schedule, or None.
    """
    student.requires_grad_(False)
    home = next(teacher.parameters()).device
    blocks = nn.ModuleList([student.get_submodule(name) for name, _ in find_blocks(student)])
    twins = nn.ModuleList([block for _, block in find_blocks(teacher)])
    sequences = sequences[stage_rows(stage, recipe.generated, len(sequences))]
    teacher.to(device)
    # eval: attention dropout would only blur the target.
    student.to(device).eval()

    def load(rows: Tensor) -> tuple[Tensor, ...]:
        return (sequences[rows].to(device),)

    try:
        loss_of = _model_loss(teacher, student, sequences, stage, recipe, device)
        with codes_kept(blocks, stage, higher, twins), usual_masks(teacher, student, sequences[:1]):
            return fit(blocks, stage, recipe, len(sequences), loss_of, seed, stage.name, on_step, load)
    finally:
        set_training_bits(student, stage.widths[-1], stage.act_bits)
        student.requires_grad_(False).to("cpu")
        teacher.to(home)


def _model_loss(
    teacher: nn.Module, student: nn.Module, sequences: Tensor, stage: Stage, recipe: Recipe, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The loss of a micro-batch of ids, [batch, tokens], summed over the stage's widths with their weights."""
    factors = stage.loss_weights or (1.0,) * len(stage.widths)
    reverse = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(stage.objective)
    if stage.objective == "mixed_kl":
        reverse = confidence(teacher, sequences, recipe.micro_batch or min(4, len(sequences)), device)

    def loss_of(ids: Tensor) -> Tensor:
        target = None
        if reverse is not None:
            with torch.no_grad(), autocast(device):
                target = teacher(ids, use_cache=False).logits
        total = torch.zeros((), device=device)
        for width, factor in zip(stage.widths, factors, strict=True):
            if factor == 0:
                continue
            set_training_bits(student, width, stage.act_bits)
            with autocast(device):
                logits = student(ids, use_cache=False).logits
            if target is None or reverse is None:
                loss = next_token_loss(logits, ids)
            else:
                loss = divergence(target, logits, stage.kl_temperature, reverse)
            total = total + factor * loss
        return total

    return loss_of
