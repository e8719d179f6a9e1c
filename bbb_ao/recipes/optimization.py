"""What block-wise and end-to-end stages share: parameters, optimizer, schedule, autocast and the training loop."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bbb_ao.errors import NumericsError
from bbb_ao.qat_linear import QATLinear, qat_linears
from bbb_ao.recipes.replay import Recorded
from bbb_ao.recipes.stages import Recipe, Stage
from bbb_ao.splitting import split_mask


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 autocast on CUDA, and on CPUs that multiply bfloat16 natively; float32 elsewhere."""
    if device.type == "cuda" or (device.type == "cpu" and _cpu_multiplies_bfloat16()):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def stream_dtype(device: torch.device) -> torch.dtype:
    """Type of cached hidden states: that of the matrix products."""
    with autocast(device):
        return torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: linear warm-up over warmup * steps, then half a cosine down to 0."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of sequence numbers: epoch after epoch in a fresh seeded order, none left out.

    Yields:
        int64 [batch_size] (at most `count`).
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, count)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if order.numel() < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def stage_steps(stage: Stage, sequences: int) -> int:
    """Optimizer steps of a stage (for each block, in a block stage)."""
    return max(1, round(stage.epochs * sequences / min(stage.batch_size, sequences)))


def trainable_groups(module: nn.Module, stage: Stage, train_norms: bool) -> list[dict]:
    """Parameter groups for AdamW, `requires_grad` set accordingly: QATLinears, their scales, and norms.

    Norms are the one-dimensional parameters outside Linears. A stage with `train: scales` takes the scales alone,
    without zero points; one with `keep_bits` the weights alone, as norms, biases and scales serve the kept width too.
    Everything else is frozen.
    """
    if stage.keep_bits is not None:
        module.requires_grad_(False)
        return [
            {"params": [linear.weight.requires_grad_() for linear in qat_linears(module).values()], "peak": stage.lr}
        ]
    if stage.train == "scales":
        module.requires_grad_(False)
        only = [linear.scale.requires_grad_() for linear in qat_linears(module).values() if linear.scale is not None]
        return [{"params": only, "peak": stage.lr if stage.lr_scale is None else stage.lr_scale}]
    weights: list[Tensor] = []
    scales: list[Tensor] = []
    owned: set[int] = set()
    for linear in qat_linears(module).values():
        weights += [parameter for parameter in (linear.weight, linear.bias) if parameter is not None]
        scales += [parameter for parameter in (linear.scale, linear.zero_point) if parameter is not None]
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            owned |= {id(parameter) for parameter in linear.parameters(recurse=False)}
    norms = [p for p in module.parameters() if id(p) not in owned and p.dim() == 1] if train_norms else []
    chosen = {id(parameter) for parameter in (*weights, *scales, *norms)}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    lr_scale = stage.lr if stage.lr_scale is None else stage.lr_scale
    groups = [{"params": weights + norms, "peak": stage.lr}, {"params": scales, "peak": lr_scale}]
    return [group for group in groups if group["params"]]


class CopiesRate:
    """Slows the two copies of split channels down: both get the same gradient, so their sum moves twice as fast.

    After every step, w = w_before + factor * (w_after - w_before) in the split columns.
    """

    def __init__(self, module: nn.Module, factor: float) -> None:
        self.factor = factor
        self.columns: list[tuple[QATLinear, Tensor]] = []
        if factor != 1:
            for linear in qat_linears(module).values():
                if linear.ocs_index is not None:
                    mask = split_mask(linear.ocs_index, linear.in_features)
                    self.columns.append((linear, mask.nonzero().flatten()))

    def before(self) -> list[Tensor]:
        return [linear.weight.detach()[:, columns] for linear, columns in self.columns]

    def after(self, before: list[Tensor]) -> None:
        with torch.no_grad():
            for (linear, columns), old in zip(self.columns, before, strict=True):
                linear.weight[:, columns] = torch.lerp(old, linear.weight[:, columns], self.factor)


class TailAverage:
    """The mean of parameters over the last `share` of `steps` steps; 0 keeps their last values."""

    def __init__(self, parameters: list[Tensor], share: float, steps: int) -> None:
        self.parameters = [parameter.detach() for parameter in parameters]
        self.first = steps - round(share * steps)
        self.means: list[Tensor] = []

    def after(self, step: int) -> None:
        """Take in the values after step `step`, from 0."""
        if step == self.first:
            self.means = [parameter.clone() for parameter in self.parameters]
        elif step > self.first:
            torch._foreach_lerp_(self.means, self.parameters, 1 / (step - self.first + 1))

    def finish(self) -> None:
        """Set the parameters to their means."""
        if self.means:
            torch._foreach_copy_(self.parameters, self.means)


@contextmanager
def codes_kept(module: nn.Module, stage: Stage, higher: Stage | None, teacher: nn.Module) -> Iterator[None]:
    """Keep what a stage must keep of every code below `module`.

    All of them with `train: scales` (see `QATLinear.freeze_codes`), their top bits with `keep_bits` (see
    `QATLinear.keep_top_bits`).

    Args:
        higher: the stage before this one; where it kept bits too, the weights go on from where it left them.
        teacher: the full-precision twin of `module`.
    """
    linears = qat_linears(module)
    for name, linear in linears.items():
        if stage.train == "scales":
            linear.freeze_codes()
        elif stage.keep_bits is not None:
            goes_on = higher is not None and higher.keep_bits is not None
            twin = None if goes_on else teacher.get_submodule(name).get_parameter("weight").detach()
            linear.keep_top_bits(stage.keep_bits, twin)
    try:
        yield
    finally:
        for linear in linears.values():
            linear.thaw_codes()
            linear.bounds = None


def clamp_to_bounds(module: nn.Module) -> None:
    """Move the weights of QATLinears that have bounds to the nearest ones within them."""
    bounded = [linear for linear in qat_linears(module).values() if linear.bounds is not None]
    if bounded:
        weights = [linear.weight.detach() for linear in bounded]
        lowest, highest = zip(*(linear.bounds for linear in bounded if linear.bounds is not None), strict=True)
        torch._foreach_clamp_min_(weights, list(lowest))
        torch._foreach_clamp_max_(weights, list(highest))


@dataclass(frozen=True)
class Fit:
    """Result of one training loop.

    Attributes:
        first_loss, last_loss: means over the first and the last tenth of the steps.
        steps: optimizer steps.
        how: "recorded" where steps were replayed as a CUDA graph, else "eager: " and the reason; see `replay`.
    """

    first_loss: float
    last_loss: float
    steps: int
    how: str


def make_optimizer(groups: list[dict]) -> torch.optim.AdamW:
    """AdamW without weight decay over groups with their `peak` learning rates, in one pass over memory.

    On a GPU its learning rates are tensors, so that a recorded step sees them change.
    """
    device = groups[0]["params"][0].device
    on_gpu = device.type == "cuda"
    for group in groups:
        group["lr"] = torch.tensor(group["peak"], device=device) if on_gpu else group["peak"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=on_gpu)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["peak"] * factor)
        else:
            group["lr"] = group["peak"] * factor


def update(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    copies: CopiesRate,
    recipe: Recipe,
    loss_of: Callable[..., Tensor],
    *batch: Tensor,
) -> Tensor:
    """One optimizer step of `module` on a batch, in micro-batches; the mean loss before it, a scalar on the device."""
    optimizer.zero_grad(set_to_none=True)
    size = len(batch[0])
    losses = []
    for part in zip(*(tensor.split(recipe.micro_batch or size) for tensor in batch), strict=True):
        loss = loss_of(*part) * (len(part[0]) / size)
        loss.backward()
        losses.append(loss.detach())
    if recipe.gradient_clip is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, recipe.gradient_clip)
    before = copies.before()
    optimizer.step()
    copies.after(before)
    clamp_to_bounds(module)
    return torch.stack(losses).sum()


def stage_rows(stage: Stage, generated: int, total: int) -> Tensor:
    """Numbers of a stage's sequences among `total`, of which the last `generated` are generated: int64."""
    first = total - generated if stage.text == "generated" else 0
    return torch.arange(first, total - generated if stage.text == "calibration" else total)


def fit(
    module: nn.Module,
    stage: Stage,
    recipe: Recipe,
    count: int,
    loss_of: Callable[..., Tensor],
    seed: int,
    where: str,
    on_step: Callable[[int, int, Callable[[], float]], None] | None = None,
    load: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
) -> Fit:
    """Train `module` for one stage with AdamW (no weight decay), gradient clipping and the stage's schedule.

    Args:
        count: calibration sequences.
        loss_of: mean loss of a micro-batch of what `load` gave; its gradient is accumulated over a batch.
        seed: of the order of the sequences.
        where: names the module in errors.
        on_step: called with (step, steps, loss) after every step; `loss()` reads the last loss back from the device.
        load: what `loss_of` reads for a batch of sequence numbers, each [batch, ...]; on a GPU such a step is recorded
            (see `replay`). None: the sequence numbers themselves.
    Raises:
        NumericsError: a loss, or at the end a parameter, that is NaN or infinite; the message names `where` and the
            step (from 1).
    """
    groups = trainable_groups(module, stage, recipe.train_norms)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = make_optimizer(groups)
    steps = stage_steps(stage, count)
    copies = CopiesRate(module, recipe.copies_lr_factor)
    recorded = Recorded(partial(update, module, optimizer, copies, recipe, loss_of), steps)
    average = TailAverage(parameters, recipe.average, steps)
    history: list[Tensor] = []
    for step, rows in enumerate(batches(count, stage.batch_size, steps, seed)):
        set_learning_rates(optimizer, learning_rate_factor(step, steps, recipe.warmup))
        history.append(recorded(*((rows,) if load is None else load(rows))))
        average.after(step)
        # Reading the loss waits for the device, so divergence is looked for now and then.
        if step % 50 == 49 or step == steps - 1:
            _check_finite(history[-50:], step, where)
        if on_step is not None:
            on_step(step + 1, steps, history[-1].item)
    average.finish()
    # Gradients of finished blocks would fill the memory.
    optimizer.zero_grad(set_to_none=True)
    # A gradient that overflows in the last step shows in no loss.
    _check_finite([torch.stack([p.detach().float().norm() for p in parameters]).sum()], steps - 1, where, "a weight")
    values = torch.stack(history).float().cpu()
    tenth = max(1, steps // 10)
    return Fit(values[:tenth].mean().item(), values[-tenth:].mean().item(), steps, recorded.how)


def _check_finite(values: list[Tensor], step: int, where: str, what: str = "the loss") -> None:
    """Refuse NaN and infinity among the values of the steps that end with `step` (from 0)."""
    finite = torch.isfinite(torch.stack(values)).cpu()
    if not bool(finite.all()):
        bad = step - len(values) + 2 + int((~finite).nonzero()[0])
        raise NumericsError(f"{where}: {what} is NaN or infinite at step {bad}; fix: lower the stage's lr")
