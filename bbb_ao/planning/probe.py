"""How long a run takes: a few training steps of one block of the real shapes, scaled by the number of steps.

    block stage:  blocks * (steps * step + sequences * (prefixes + 1) * forward)
    model stage:  blocks * steps * (step + batch * forward)

with `step` the time of an optimizer step on a batch, `forward` that of a pass over one sequence, and `prefixes` the
streams that the stage feeds. Weights and states are random. Left out: preparation, the head, packing and files.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from bbb_ao.passes import find_blocks
from bbb_ao.planning.job import Job
from bbb_ao.planning.trace import materialize, materialize_call, step_loss
from bbb_ao.recipes.blockwise import stream_widths
from bbb_ao.recipes.optimization import Bounds, CopiesRate, autocast, make_optimizer, update
from bbb_ao.recipes.replay import WARM_UP, Recorded
from bbb_ao.recipes.skeleton import training
from bbb_ao.recipes.stages import Stage

# Floating-point operations of a step on a CPU beyond which one sequence stands for the batch, or nothing is timed.
CPU_OPERATIONS = 1.5e11
SECONDS = 0.5  # of timed steps, once there are two


@dataclass(frozen=True)
class Times:
    """Seconds of one optimizer step of a block, and of its forward pass over one sequence."""

    step: float
    forward: float


def stage_seconds(job: Job) -> list[float | None]:
    """For each stage, 0 where it does not train; None where a step is too long to be tried on a CPU."""
    known: dict[Any, Times | None] = {}
    found: list[float | None] = []
    for number, stage in enumerate(job.recipe.stages):
        if not stage.epochs:
            found.append(0.0)
            continue
        # Widths cost the same; their number, quantized activations and what is trained do not.
        key = (len(stage.widths), stage.act_bits is None, stage.train, stage.keep_bits, job.batch(stage))
        if key not in known:
            known[key] = probe(job, stage)
        times = known[key]
        found.append(None if times is None else _scaled(job, number, times))
    return found


def _scaled(job: Job, number: int, times: Times) -> float:
    stage, blocks, steps = job.recipe.stages[number], len(job.blocks), job.steps(job.recipe.stages[number])
    if stage.scope == "model":
        return blocks * steps * (times.step + job.batch(stage) * times.forward)
    higher = job.recipe.stages[number - 1] if number else None
    streams = len(set(stream_widths(stage, higher, job.recipe))) + 1
    return blocks * (steps * times.step + job.block_sequences * streams * times.forward)


def probe(job: Job, stage: Stage) -> Times | None:
    """Time steps of the block in the middle of the model; None where one is too long for a CPU."""
    number = len(job.blocks) // 2
    weights = sum(parameter.numel() for parameter in job.blocks[number].parameters())
    rows = job.batch(stage)
    if job.on_cpu:
        rows = min(rows, int(CPU_OPERATIONS / (6 * weights * job.recipe.sequence_length)))
        if not rows:
            return None
    generator = torch.Generator(job.device).manual_seed(0)
    block = materialize(job.blocks[number], job.device, partial(_draw, generator)).eval()
    call = materialize_call(job.calls[number], job.device)
    shape = (rows, job.recipe.sequence_length, job.hidden)
    hidden, target = (torch.randn(shape, generator=generator, device=job.device) for _ in range(2))
    twin = materialize(find_blocks(job.model)[number][1], job.device, partial(_draw, generator)).float()
    ahead = [twin.requires_grad_(False).eval()] * job.recipe.lookahead
    copies = CopiesRate(block, job.recipe.copies_lr_factor)

    def loss_of(hidden: Tensor, target: Tensor) -> Tensor:
        return step_loss(block, ahead, call, stage, hidden, target)

    def forward() -> Any:
        with torch.no_grad(), autocast(job.device):
            return call(block, hidden[:1])

    with training(block, stage, job.recipe) as groups:
        recipe, size = job.recipe, job.micro_batch(stage)
        one = partial(update, make_optimizer(groups), copies, Bounds(block), recipe.gradient_clip, size, loss_of)
        step = partial(Recorded(one, job.steps(stage)), hidden, target)
        warm_up = WARM_UP + 1 if job.recorded(stage) else 1
        seconds = _seconds(step, warm_up, job.device)
    return Times(seconds * job.batch(stage) / rows, _seconds(forward, 1, job.device))


def _draw(generator: torch.Generator, tensor: Tensor) -> None:
    tensor.normal_(0, 0.02, generator=generator)


def _seconds(function: Callable[[], Any], warm_up: int, device: torch.device) -> float:
    """Mean time of a call, over two at least, behind `warm_up` calls."""
    for _ in range(warm_up):
        function()
    _wait(device)
    start = time.perf_counter()
    for calls in count(1):
        function()
        _wait(device)
        spent = time.perf_counter() - start
        if spent > SECONDS and (calls > 1 or spent > 2 * SECONDS):
            return spent / calls
    raise AssertionError("the loop returns")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
