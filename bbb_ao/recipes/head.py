"""What stands behind the last decoder block: the final norm, the language-model head, and what is done with logits."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bbb_ao.errors import ModelError
from bbb_ao.passes import find_blocks

# Tokens that a head is tried on, and the largest error there relative to the largest logit; bfloat16 rounds to 2**-9.
TRIED = 8
TOLERANCE = 2**-6


@dataclass
class _Given:
    """The forward of every block of a head: returns what the head was given, as the model's blocks return it.

    Attributes:
        length: of the tuple that they return, whose further members become None; 0 where they return a tensor.
    """

    length: int
    states: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.states, *[None] * (self.length - 1)) if self.length else self.states


class Head(nn.Module):
    """Hidden states behind the last decoder block, [batch, tokens, hidden], to logits, [batch, tokens, vocabulary].

    It is the model itself with blocks that hold nothing and return the given states, so that norm, projection and soft
    cap are the model's own in any architecture. Its weights are the model's, shared; those of the blocks are not among
    them, nor is an embedding that is not tied to the projection.

    Args:
        model: a causal language model in evaluation mode; it is not changed.
        ids: [1, tokens], int64; the head is tried on the first of them.
    Raises:
        ModelError: there, its logits are not the model's, where these are finite: float16 may overflow in the model and
            not in the float32 of training.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        super().__init__()
        blocks, embedding = find_blocks(model), model.get_input_embeddings()
        output, expected = _last(model, blocks[-1][1], ids[:, :TRIED])
        in_tuple = isinstance(output, tuple)
        self.given = _Given(len(output) if in_tuple else 0)
        self.embedded: int = embedding.weight.shape[1]
        stack = model.get_submodule(blocks[0][0].rpartition(".")[0])
        replaced = {id(stack): nn.ModuleList(_emptied(block, self.given) for _, block in blocks)}
        # What the memo holds is not copied.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model: Any = copy.deepcopy(model, {**shared, **replaced, id(embedding): nn.Identity()})
        if hasattr(self.model.config, "output_router_logits"):
            # A loss of mixtures of experts that needs what blocks without weights do not make.
            self.model.config.output_router_logits = False
        self._try(type(model).__name__, output[0] if in_tuple else output, expected)

    @torch.no_grad()
    def _try(self, name: str, states: Tensor, expected: Tensor) -> None:
        wanted = f"{name}: logits: expected them to follow from the last decoder block's output"
        try:
            logits = self(states)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            got = f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
            raise ModelError(f"{wanted}, got {got}; fix: --set logits=0") from problem
        known = expected.isfinite()
        error = (logits - expected).abs().where(known, 0.0)
        if not bool((error <= TOLERANCE * expected.abs().where(known, 0.0).max()).all()):
            raise ModelError(f"{wanted}, got an error of {error.max().item():.3g}; fix: --set logits=0")

    def forward(self, states: Tensor) -> Tensor:
        # Every block returns the states, whatever enters it.
        entering = states.new_zeros(*states.shape[:-1], self.embedded)
        self.given.states = states
        try:
            return self.model(inputs_embeds=entering, use_cache=False).logits
        finally:
            # Where memory ran out, they would hold all that they were computed from.
            self.given.states = None


def _last(model: nn.Module, block: nn.Module, ids: Tensor) -> tuple[Any, Tensor]:
    """What the last block returns for ids, and the model's logits."""
    outputs: list[Any] = []
    handle = block.register_forward_hook(lambda block, args, output: outputs.append(output))
    try:
        with torch.no_grad():
            logits = model(ids.to(next(model.parameters()).device), use_cache=False).logits
    finally:
        handle.remove()
    return outputs[-1], logits


def _emptied(block: nn.Module, forward: _Given) -> nn.Module:
    """A block without weights that keeps what models ask blocks for, such as their kind of attention."""
    twin = copy.copy(block)
    nothing: dict[str, Any] = {name: {} for name in ("_modules", "_parameters", "_buffers")}
    hooks: dict[str, Any] = {name: OrderedDict() for name in ("_forward_hooks", "_forward_pre_hooks")}
    twin.__dict__.update(nothing, **hooks, forward=forward)
    return twin
