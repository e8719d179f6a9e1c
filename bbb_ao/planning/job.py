"""What is planned: a model without weights, its prepared student, a recipe and a device."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from bbb_ao.passes import find_blocks
from bbb_ao.recipes.head import Head
from bbb_ao.recipes.optimization import stage_rows, stage_steps, stream_dtype
from bbb_ao.recipes.prepare import Prepared
from bbb_ao.recipes.replay import WORTHWHILE
from bbb_ao.recipes.sequences import check_length
from bbb_ao.recipes.skeleton import Answered, prepare_skeleton
from bbb_ao.recipes.stages import Recipe, Stage
from bbb_ao.recipes.streams import BlockCall, record_calls


@dataclass(frozen=True)
class Job:
    """One training run, in shapes.

    Attributes:
        model: the full-precision model on the meta device, in the type it is loaded in.
        student: the same after preparation, float32.
        prepared: plans and names of the quantized layers.
        calls: how the model calls each block, for one sequence of the recipe's length.
        head: what stands behind the model's blocks, where the recipe's loss looks at logits.
        recipe: what will be run; device: where blocks are trained.
    """

    model: Any
    student: Any
    prepared: Prepared
    calls: list[BlockCall]
    head: Head | None
    recipe: Recipe
    device: torch.device

    @classmethod
    def prepare(cls, model: Any, recipe: Recipe, device: torch.device) -> "Job":
        """Raises RecipeError, ModelError: as training does for this model and recipe."""
        check_length(recipe, model)
        student, prepared = prepare_skeleton(model, recipe)
        ids = torch.zeros(1, recipe.sequence_length, dtype=torch.int64)
        with torch.device("meta"), Answered():
            calls = record_calls(model, [block for _, block in find_blocks(model)], ids)
            head = Head(model, ids) if recipe.logits else None
        return cls(model, student, prepared, calls, head, recipe, device)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The student's decoder blocks."""
        return [block for _, block in find_blocks(self.student)]

    @cached_property
    def largest(self) -> int:
        """Number of the block with the most weights; the last of equal ones."""
        return max(range(len(self.blocks)), key=lambda number: (tensor_bytes(self.blocks[number]), number))

    @cached_property
    def traced(self) -> dict[Any, int]:
        """Traces that were made, by what they depend on."""
        return {}

    @property
    def on_cpu(self) -> bool:
        """The device is the host."""
        return self.device.type == "cpu"

    def name(self, number: int) -> str:
        """Of a stage, for people: "stage 1 w8a16"."""
        return f"stage {number + 1} {self.recipe.stages[number].name}"

    @property
    def hidden(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def block_sequences(self) -> int:
        """Sequences whose streams go through the blocks: the calibration text, and what block stages read beside it."""
        read = any(stage.scope == "block" and stage.text != "calibration" for stage in self.recipe.stages)
        return self.recipe.sequences + (self.recipe.generated if read else 0)

    @property
    def stream_bytes(self) -> int:
        """One stream: hidden states of every sequence, [sequences, tokens, hidden]."""
        elements = self.block_sequences * self.recipe.sequence_length * self.hidden
        return elements * stream_dtype(self.device).itemsize

    def rows(self, stage: Stage) -> int:
        """Sequences that a stage trains on."""
        return len(stage_rows(stage, self.recipe.generated, self.recipe.sequences + self.recipe.generated))

    def steps(self, stage: Stage) -> int:
        """Optimizer steps of a stage, for each block in a block stage; 0 where it only sets the widths."""
        return stage_steps(stage, self.rows(stage)) if stage.epochs else 0

    def recorded(self, stage: Stage) -> bool:
        """Whether a stage's steps are replayed as a CUDA graph; see `recipes.replay`."""
        return not self.on_cpu and self.steps(stage) >= WORTHWHILE

    def batch(self, stage: Stage) -> int:
        """Sequences of one optimizer step."""
        return min(stage.batch_size, self.rows(stage))

    def micro_batch(self, stage: Stage) -> int:
        """Sequences of one forward pass in training."""
        return min(self.recipe.micro_batch or stage.batch_size, self.batch(stage))

    def accumulates(self, stage: Stage) -> bool:
        """A step has several micro-batches."""
        return self.batch(stage) > self.micro_batch(stage)

    @property
    def stream_batch(self) -> int:
        """Sequences of one forward pass between blocks."""
        return self.recipe.micro_batch or min(4, self.block_sequences)


def tensor_bytes(module: nn.Module) -> int:
    """Of parameters and buffers, tied ones once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(module))


def float32_bytes(module: nn.Module) -> int:
    """The same with every floating-point tensor in float32."""
    return sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in _tensors(module))


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
