"""What stands behind the last decoder block: the final norm, the language-model head, and what is done with logits."""

import copy
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
    """The forward of every block of a head: returns what the head was given, in a tuple where the model's blocks do."""

    in_tuple: bool
    states: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.states,) if self.in_tuple else self.states


class Head(nn.Module):
    """Hidden states behind the last decoder block, [batch, tokens, hidden], to logits, [batch, tokens, vocabulary].

    It is the model itself with blocks that hold nothing and return the given states, so that norm, projection and soft
    cap are the model's own in any architecture. Its weights are the model's, shared; those of the blocks are not among
    them, nor is an embedding that is not tied to the projection.

    Args:
        model: a causal language model in evaluation mode; it is not changed.
        ids: [1, tokens], int64; the head is tried on the first of them.
    Raises:
        ModelError: there, its logits are not the model's.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        super().__init__()
        blocks, embedding = find_blocks(model), model.get_input_embeddings()
        output, expected = _last(model, blocks[-1][1], ids[:, :TRIED])
        self.given = _Given(isinstance(output, tuple))
        self.embedded: int = embedding.weight.shape[1]
        stack = model.get_submodule(blocks[0][0].rpartition(".")[0])
        replaced = {id(stack): nn.ModuleList(_emptied(block, self.given) for _, block in blocks)}
        # What the memo holds is not copied.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model: Any = copy.deepcopy(model, {**shared, **replaced, id(embedding): nn.Identity()})
        with torch.no_grad():
            error = (self(output[0] if self.given.in_tuple else output) - expected).abs()
        if not bool((error <= TOLERANCE * expected.abs().max()).all()):
            raise ModelError(
                f"{type(model).__name__}: logits: expected them to follow from the last decoder block's output, "
                f"got an error of {error.max().item():.3g}; fix: leave logits out of the recipe"
            )

    def forward(self, states: Tensor) -> Tensor:
        self.given.states = states
        # Every block returns the states, whatever enters it.
        entering = states.new_zeros(*states.shape[:-1], self.embedded)
        logits = self.model(inputs_embeds=entering, use_cache=False).logits
        self.given.states = None
        return logits


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
    twin.__dict__.update(_modules={}, _parameters={}, _buffers={}, forward=forward)
    return twin
