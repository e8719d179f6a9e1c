"""What a run needs on the disk of its output, from shapes alone; docs/resuming.md says what is written when.

run = max over stages of  generated + blocks + checkpoints of the stages before + the larger of
          the states of its loop, two while one replaces another, and
          one beside the blocks that are saved again;
      and at the end      generated + blocks + checkpoints + result
"""

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from bbb_ao.passes import find_blocks
from bbb_ao.recipes.optimization import stage_rows, stage_steps
from bbb_ao.recipes.skeleton import pack_skeleton, stored_bytes, trained_bytes
from bbb_ao.recipes.stages import Recipe, Stage


@dataclass(frozen=True)
class DiskUse:
    """Bytes of tensors on the disk of a run's output.

    Attributes:
        result: of the checkpoint.
        run: the most at any moment, with the run's state and the checkpoints of finished stages.
    """

    result: int
    run: int


def disk_use(model: Any, student: Any, recipe: Recipe, save_steps: int | None) -> DiskUse:
    """What a run writes beside small files (configuration, tokenizer, log).

    Args:
        model, student: on the meta device, the student as from `prepare_skeleton`.
        save_steps: steps after which a loop is saved, as of `RunFolder`; None for a run that keeps no state.
    """
    sizes: dict[int, int] = {}
    last = len(recipe.stages) - 1
    for number in range(last + 1) if save_steps else (last,):
        widest = recipe.stages[number].widths[0]
        if widest not in sizes:
            sizes[widest] = stored_bytes(pack_skeleton(copy.deepcopy(student), model, recipe.until(number)))
    result = sizes[recipe.stages[-1].widths[0]]
    if save_steps is None:
        return DiskUse(result, result)
    blocks = [block for _, block in find_blocks(student)]
    held = 8 * recipe.generated * recipe.sequence_length + sum(map(stored_bytes, blocks))
    most = 0
    for stage in recipe.stages:
        most = max(most, held + _at_work(blocks, stage, recipe, save_steps))
        # The last stage's checkpoint is the result.
        held += sizes[stage.widths[0]]
    return DiskUse(result, max(most, held))


def _at_work(blocks: list[nn.Module], stage: Stage, recipe: Recipe, save_steps: int) -> int:
    """What a stage holds beside the finished blocks: states of a loop, and blocks that replace earlier ones."""
    if not stage.epochs:
        return 0
    trained = [trained_bytes(block, stage, recipe) for block in blocks]
    saved = [stored_bytes(block) for block in blocks]
    whole = sum if stage.scope == "model" else max
    steps = stage_steps(stage, len(stage_rows(stage, recipe.generated, recipe.sequences + recipe.generated)))
    # No state is saved behind the last step. Each has the parameters, AdamW's moments, and the mean where there is one.
    states = min(2, (steps - 1) // save_steps)
    loop = whole(trained) * (3 + (recipe.average > 0))
    return max(states * loop, min(1, states) * loop + whole(saved))
