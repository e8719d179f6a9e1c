"""What one training step or forward pass holds at its worst moment, traced on tensors without values.

The blocks, the fake quantization and autograd are the real ones, so the sum over activations, intermediates saved for
the backward pass, casts and gradients needs no formula for each architecture.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bbb_ao.passes import block_linears, find_blocks
from bbb_ao.planning.live_bytes import peak_bytes
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.distill import divergence, masks_given, stage_loss
from bbb_ao.recipes.optimization import autocast, stream_dtype
from bbb_ao.recipes.prepare import squares_of
from bbb_ao.recipes.skeleton import Answered, training
from bbb_ao.recipes.stages import Recipe, Stage
from bbb_ao.recipes.statistics import compared
from bbb_ao.recipes.streams import BlockCall


@contextmanager
def without_values() -> Iterator[None]:
    """Tensors that are made here have a device, a shape and a type, and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), Answered():
        yield


def materialize(module: nn.Module, device: torch.device, fill: Callable[[Tensor], Any] = lambda tensor: None) -> Any:
    """A copy of a module of the meta device with memory on `device`: zeros, floating-point ones passed to `fill`."""
    held: dict[int, Any] = {}
    for tensor in _tensors(module):
        value = torch.zeros_like(tensor, device=device, requires_grad=False)
        if value.is_floating_point():
            fill(value)
        held[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    # What the memo holds is not copied.
    return copy.deepcopy(module, held)


def materialize_call(call: BlockCall, device: torch.device) -> BlockCall:
    """A call recorded on the meta device with zeros on `device`, and full masks."""

    def held(tensor: Tensor) -> Tensor:
        make = torch.ones_like if tensor.dtype == torch.bool else torch.zeros_like
        return make(tensor, device=device)

    args, kwargs = tree_map_only(Tensor, held, (call.args, dict(call.kwargs)))
    return BlockCall(args, kwargs, call.folded)


def step_loss(
    student: nn.Module,
    ahead: Sequence[nn.Module],
    call: BlockCall,
    stage: Stage,
    hidden: Tensor,
    target: Tensor,
    head: nn.Module | None = None,
) -> Tensor:
    """The block loss of a micro-batch, summed over the stage's widths (`blockwise`, without its constants).

    Args:
        ahead: full-precision blocks that the output runs through; one target stands for all.
        hidden, target: [batch, tokens, hidden].
        head: gives the logits behind the last of them, which are compared as well.
    """
    total = torch.zeros((), device=target.device)
    with torch.no_grad(), autocast(target.device):
        logits = None if head is None else head(target)
    for width, factor in zip(stage.widths, stage.loss_weights or (1.0,) * len(stage.widths), strict=True):
        if factor == 0:
            continue
        set_training_bits(student, width, stage.act_bits)
        output = hidden
        for block in (student, *ahead):
            with autocast(target.device):
                output = call(block, output).float()
            total = total + factor * (output - target).square().mean()
        if head is not None and logits is not None:
            with autocast(target.device):
                own = head(output)
            total = total + factor * divergence(logits, own)
    return total


def step_bytes(
    block: nn.Module,
    teacher: nn.Module,
    call: BlockCall,
    stage: Stage,
    recipe: Recipe,
    shape: tuple[int, int, int],
    device: torch.device,
    accumulates: bool,
    head: nn.Module | None = None,
) -> int:
    """Activations, fake-quantized tensors, casts and gradients of one optimizer step of a block, at the worst moment.

    Args:
        block: the prepared block, teacher: a full-precision one, float32; both on the meta device.
        head: stands for the last step of the recipe's lookahead; float32, on the meta device.
        shape: [micro-batch, tokens, hidden].
        accumulates: gradients are there from the start, from the second micro-batch on.
    """
    with without_values():
        student, call = materialize(block, device).eval(), materialize_call(call, device)
        behind = recipe.lookahead - (head is not None)
        ahead = [materialize(teacher, device).requires_grad_(False).eval()] * behind
        held_head = None if head is None else materialize(head, device).requires_grad_(False)
        hidden, target = torch.empty(shape, device=device), torch.empty(shape, device=device)
        with training(student, stage, recipe):

            def step() -> None:
                for _ in range(1 + accumulates):
                    step_loss(student, ahead, call, stage, hidden, target, held_head).backward()

            held = [student, *ahead] if held_head is None else [student, *ahead, held_head]
            known = [*map(_tensors, held), call.args, call.kwargs, hidden, target]
            return peak_bytes(step, known)


def norms_bytes(block: nn.Module, call: BlockCall, shape: tuple[int, int, int], device: torch.device) -> int:
    """A forward pass of a full-precision block, with the squares of what enters each Linear; see `activation_norms`.

    Args:
        block: on the meta device, float32.
        shape: [micro-batch, tokens, hidden].
    """
    with without_values(), torch.no_grad():
        working, call = materialize(block, device).eval(), materialize_call(call, device)
        # Of the block itself: a weight without values is no plain parameter.
        for name in block_linears(block):
            working.get_submodule(name).register_forward_pre_hook(_square)
        states = torch.empty(shape, dtype=stream_dtype(device))

        def run() -> Any:
            output = None
            # The last output is there until the next one is.
            for _ in range(2):
                with autocast(device):
                    output = call(working, states.to(device).float()).float()
            return output

        return peak_bytes(run, [_tensors(working), call.args, call.kwargs, states])


def _square(linear: nn.Module, args: tuple[Any, ...]) -> None:
    squares_of(args[0])


def errors_bytes(
    teacher: nn.Module,
    block: nn.Module,
    call: BlockCall,
    widths: tuple[int, int | None],
    shape: tuple[int, int, int],
    device: torch.device,
) -> int:
    """A forward pass of a full-precision block and of the student's, every output compared; see `layer_errors`.

    Args:
        teacher, block: on the meta device, float32.
        widths: of weights and activations.
        shape: [1, tokens, hidden].
    """
    with without_values(), torch.no_grad():
        exact, student = materialize(teacher, device).eval(), materialize(block, device).eval()
        call, states = materialize_call(call, device), torch.empty(shape, device=device)
        set_training_bits(student, *widths)

        def run() -> Any:
            with compared(exact, student), autocast(device):
                return call(exact, states).float(), call(student, states).float()

        return peak_bytes(run, [_tensors(exact), _tensors(student), call.args, call.kwargs, states])


def model_step_bytes(
    model: nn.Module,
    student: nn.Module,
    calls: list[BlockCall],
    stage: Stage,
    recipe: Recipe,
    shape: tuple[int, int],
    device: torch.device,
    accumulates: bool,
) -> int:
    """The same for an end-to-end step of a model: both models' logits, and all blocks' activations and gradients.

    Args:
        model, student: on the meta device, the student prepared.
        calls: of the model's blocks.
        shape: [micro-batch, tokens].
    """
    with without_values():
        teacher, held_student = pair = [materialize(each, device).eval() for each in (model, student)]
        held = [materialize_call(call, device) for call in calls]
        held_student.requires_grad_(False)
        trained = nn.ModuleList([block for _, block in find_blocks(held_student)])
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        # A share of a half computes both divergences.
        reverse = {"forward_kl": 0.0, "reverse_kl": 1.0, "mixed_kl": 0.5}.get(stage.objective)
        with training(trained, stage, recipe), masks_given(pair, held):

            def step() -> None:
                for _ in range(1 + accumulates):
                    stage_loss(teacher, held_student, stage, reverse, ids).backward()

            return peak_bytes(step, [*map(_tensors, pair), [(call.args, call.kwargs) for call in held], ids])


def shortened(model: nn.Module, first: int, count: int) -> nn.Module:
    """A copy of a model of the meta device with `count` of its blocks alone, from number `first` on."""
    result: Any = copy.deepcopy(model)
    stack: Any = result.get_submodule(find_blocks(result)[0][0].rpartition(".")[0])
    del stack[first + count :]
    del stack[:first]
    result.config.get_text_config().num_hidden_layers = count
    return result


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
