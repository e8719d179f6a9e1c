"""What block-wise and end-to-end stages share: parameters, optimizer, schedule, autocast and the training loop."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from bbb_ao.errors import NumericsError, ResourceError
from bbb_ao.qat_linear import QATLinear, qat_linears
from bbb_ao.recipes.loop_state import LoopState, Saving, TailAverage
from bbb_ao.recipes.memory import Memory
from bbb_ao.recipes.replay import WARM_UP, Recorded
from bbb_ao.recipes.stages import Recipe, Stage
from bbb_ao.splitting import split_mask

# Losses are looked at every so many steps.
CHECKED = 50
DIVERGED = 3.0
LOWER = "fix: lower the stage's lr"


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


class Bounds:
    """Keeps the weights of QATLinears that have bounds within them; see `QATLinear.keep_top_bits`."""

    def __init__(self, module: nn.Module) -> None:
        self.linears = [linear for linear in qat_linears(module).values() if linear.bounds is not None]

    def after(self) -> None:
        """Move what a step has taken out of its bounds to the nearest weight within them."""
        if self.linears:
            weights = [linear.weight.detach() for linear in self.linears]
            lowest, highest = zip(*(linear.bounds for linear in self.linears if linear.bounds is not None), strict=True)
            torch._foreach_clamp_min_(weights, list(lowest))
            torch._foreach_clamp_max_(weights, list(highest))


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

    @classmethod
    def of(cls, losses: list[Tensor], how: str) -> "Fit":
        """From the losses of all steps, scalars on the device."""
        values = torch.stack(losses).float().cpu()
        tenth = max(1, len(losses) // 10)
        return cls(values[:tenth].mean().item(), values[-tenth:].mean().item(), len(losses), how)


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
    optimizer: torch.optim.Optimizer,
    copies: CopiesRate,
    bounds: Bounds,
    clip: float | None,
    micro_batch: int,
    loss_of: Callable[..., Tensor],
    *batch: Tensor,
) -> Tensor:
    """One optimizer step on a batch, in micro-batches; the mean loss before it, a scalar on the device.

    Raises:
        torch.OutOfMemoryError: with every parameter as it was.
        ResourceError: memory ran out in the optimizer's step.
    """
    optimizer.zero_grad(set_to_none=True)
    size = len(batch[0])
    losses = []
    for part in zip(*(tensor.split(micro_batch) for tensor in batch), strict=True):
        loss = loss_of(*part) * (len(part[0]) / size)
        loss.backward()
        losses.append(loss.detach())
    if clip is not None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    before = copies.before()
    try:
        optimizer.step()
        copies.after(before)
        bounds.after()
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"optimizer: memory: expected room for its state, got: {str(error).splitlines()[0]}; "
            "fix: use a device with more, or block stages alone"
        ) from error
    return torch.stack(losses).sum()


def stage_rows(stage: Stage, generated: int, total: int) -> Tensor:
    """Numbers of a stage's sequences among `total`, of which the last `generated` are generated: int64."""
    first = total - generated if stage.text == "generated" else 0
    return torch.arange(first, total - generated if stage.text == "calibration" else total)


class Steps:
    """The steps of a loop: each in micro-batches that memory has room for, and recorded where that pays (`replay`).

    Args:
        update: (micro-batch, loss_of, tensors of a batch) -> the loss before the step.
        count: of steps.
        load: what `loss_of` reads for a batch of sequence numbers, each [batch, ...]; on a GPU such a step is recorded.
            None: the numbers themselves.
        loss_of, memory, where: as in `fit`.
    """

    def __init__(
        self,
        update: Callable[..., Tensor],
        count: int,
        loss_of: Callable[..., Tensor],
        load: Callable[[Tensor], tuple[Tensor, ...]] | None,
        memory: Memory,
        where: str,
    ) -> None:
        self.update, self.count, self.loss_of, self.load = update, count, loss_of, load
        self.memory, self.where = memory, where
        self.recorded: Recorded | None = None
        self.reliefs = 0

    def __call__(self, rows: Tensor) -> Tensor:
        """One step on the sequences of these numbers; the mean loss before it, a scalar on the device."""
        return self.memory.retry(partial(self._attempt, rows=rows), len(rows), self.where)

    def _attempt(self, micro_batch: int, rows: Tensor) -> Tensor:
        # What is recorded has the micro-batch for which memory did not suffice.
        if self.recorded is None or self.reliefs != self.memory.reliefs:
            self.reliefs = self.memory.reliefs
            self.recorded = Recorded(partial(self.update, micro_batch, self.loss_of), self.count)
        return self.recorded(*((rows,) if self.load is None else self.load(rows)))

    def warm_up(self, batches: Iterable[Tensor]) -> None:
        """Run a loop's first steps again, for nothing, where it goes on: replays then begin at the step at which they
        would have begun. A graph may round differently."""
        for rows in islice(batches, WARM_UP):
            self(rows)


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
    memory: Memory | None = None,
    saving: Saving | None = None,
) -> Fit:
    """Train `module` for one stage with AdamW (no weight decay), gradient clipping and the stage's schedule.

    Args:
        count: calibration sequences.
        loss_of: mean loss of a micro-batch of what `load` gave; its gradient is accumulated over a batch.
        seed: of the order of the sequences.
        where: names the module and the stage in errors.
        on_step: called with (step, steps, loss) after every step; `loss()` reads the last loss back from the device.
        load: see `Steps`.
        memory: sets the micro-batch where memory runs out; None starts with the recipe's.
        saving: where to take the loop up and to save it; None does neither. The result is the same, bit for bit.
    Raises:
        NumericsError: a loss, or at a save or the end a parameter, that is NaN or infinite, or losses that grow (see
            `check_losses`); the message names `where` and the step (from 1).
        ResourceError: memory does not suffice for one sequence.
    """
    steps, optimizer = stage_steps(stage, count), make_optimizer(trainable_groups(module, stage, recipe.train_norms))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    copies, bounds = CopiesRate(module, recipe.copies_lr_factor), Bounds(module)
    state = LoopState(parameters, optimizer, TailAverage(parameters, recipe.average, steps))
    saved = saving.load() if saving else None
    done = 0 if saved is None else state.restore(saved)
    one = partial(update, optimizer, copies, bounds, recipe.gradient_clip)
    train_on = Steps(one, steps, loss_of, load, memory or Memory(recipe.micro_batch), where)
    order = partial(batches, count, stage.batch_size, steps, seed)
    if saved is not None and parameters[0].is_cuda:
        train_on.warm_up(islice(order(), done))
        state.restore(saved)
    for step, rows in islice(enumerate(order()), done, None):
        set_learning_rates(optimizer, learning_rate_factor(step, steps, recipe.warmup))
        state.losses.append(train_on(rows))
        state.average.after(step)
        due = saving is not None and (step + 1) % saving.steps == 0 and step + 1 < steps
        # Reading the losses waits for the device, so divergence is looked for now and then.
        if due or step % CHECKED == CHECKED - 1 or step == steps - 1:
            check_losses(state.losses, where)
        if due and saving is not None:
            # A gradient that overflowed in the last step shows in no loss yet.
            _check_parameters(parameters, step, where)
            saving.save(step + 1, state.tensors())
        if on_step is not None:
            on_step(step + 1, steps, state.losses[-1].item)
    state.average.finish()
    # Gradients of finished blocks would fill the memory.
    optimizer.zero_grad(set_to_none=True)
    _check_parameters(parameters, steps - 1, where)
    return Fit.of(state.losses, train_on.recorded.how if train_on.recorded else "eager: not called")


def check_losses(losses: list[Tensor], where: str) -> None:
    """Refuse a loss that is NaN or infinite among the last CHECKED, and their mean where it has grown.

    Diverging: a mean above DIVERGED and above DIVERGED times the first loss. A block loss of 1 is as bad as leaving the
    block out.

    Args:
        losses: of all steps so far, scalars on the device.
    """
    last = torch.stack(losses[-CHECKED:]).float().cpu()
    finite = torch.isfinite(last)
    if not bool(finite.all()):
        bad = len(losses) - len(last) + 1 + int((~finite).nonzero()[0])
        raise NumericsError(f"{where}: the loss is NaN or infinite at step {bad}; {LOWER}")
    first = losses[0].item()
    if (mean := last.mean().item()) > DIVERGED * max(1.0, first):
        raise NumericsError(
            f"{where}: the loss has grown from {first:.3g} to {mean:.3g} at step {len(losses)}; {LOWER}"
        )


def _check_parameters(parameters: list[Tensor], step: int, where: str) -> None:
    if not bool(torch.isfinite(torch.stack([p.detach().float().norm() for p in parameters]).sum())):
        raise NumericsError(f"{where}: a weight is NaN or infinite at step {step + 1}; {LOWER}")
