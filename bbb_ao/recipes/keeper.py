"""Keeps a run's tensors in its folder: finished blocks, generated text, and the loop at work.

What is not kept is made again when the run goes on, which gives the same numbers on the same machine: the capture, the
channels' ranks and the split come from the model and the recipe, the streams from the finished blocks.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bbb_ao.errors import ResumeError
from bbb_ao.qat_linear import qat_linears
from bbb_ao.recipes.identity import Inputs, recipe_record
from bbb_ao.recipes.memory import Memory, Noticing
from bbb_ao.recipes.optimization import Fit
from bbb_ao.recipes.run_folder import AFRESH, FORMAT_VERSION, RunFolder
from bbb_ao.recipes.stages import Recipe

# A change of these in the stage at work moves its schedule, so that its loop begins again.
SCHEDULE = {"epochs", "batch_size"}


class Keeper:
    """The state of a run, by stage and block.

    Args:
        run: its open folder, whose record fits the recipe and the inputs but for `changed`.
        recipe: what the run trains by.
        inputs: of the run; see `identity`.
        changed: names of settings that were amended.
        save_stage: writes the checkpoint of a finished stage: (student, stage number, directory).
    Attributes:
        memory: how the run fits into memory, as it was found out so far.
        resumed: whether there was something to go on from.
    """

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        inputs: Inputs,
        save_stage: Callable[[nn.Module, int, Path], None],
        changed: Iterable[str] = (),
    ) -> None:
        self.run, self._recipe, self._save_stage = run, recipe, save_stage
        self.resumed, changed = bool(run.record), set(changed)
        self._record: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "stage": 0,
            "block": 0,
            "loop": None,
            "generated": None,
            "blocks": {},
            "fits": [[] for _ in recipe.stages],
            "micro_batch": recipe.micro_batch,
            "cache": recipe.cache,
            **run.record,
            "names": [stage.name for stage in recipe.stages],
            "recipe": recipe_record(recipe),
            **inputs._asdict(),
        }
        if changed & SCHEDULE:
            self._record["loop"] = None
        if changed & {"micro_batch", "cache"}:
            self._record |= {"micro_batch": recipe.micro_batch, "cache": recipe.cache}
        self.memory = Memory(self._record["micro_batch"], self._record["cache"])

    @property
    def stage(self) -> int:
        """Number of the stage at work; as many as there are when all are finished."""
        return self._record["stage"]

    @property
    def block(self) -> int:
        """How many blocks of the stage at work are finished; 1 when a model stage is."""
        return self._record["block"]

    def fits(self, stage: int) -> list[Fit]:
        """Results of a stage's finished blocks."""
        return [Fit(**values) for values in self._record["fits"][stage]]

    def generated(self, write: Callable[[], Tensor]) -> Tensor:
        """The text that the model wrote: as saved, or from `write`, and saved."""
        if (name := self._record["generated"]) is None:
            name = "generated.safetensors"
            self._commit({name: {"ids": write()}}, generated=name)
        return load_file(self.run.path(name))["ids"]

    def restore(self, student: nn.Module, notice: Noticing) -> None:
        """Give the student's blocks what they had learned, and say where the run goes on.

        Args:
            student: prepared, on the CPU.
        Raises:
            ResumeError: the saved blocks have other shapes or channels.
        """
        for name, file in self._record["blocks"].items():
            block, held = student.get_submodule(name), load_file(self.run.path(file))
            for key, linear in qat_linears(block).items():
                if f"{key}.scale" in held:
                    linear.learn_scales()
            own = block.state_dict()
            shared, fixed = own.keys() & held.keys(), {key for key, _ in block.named_buffers()}
            differs = own.keys() ^ held.keys()
            differs |= {key for key in shared if own[key].shape != held[key].shape}
            differs |= {key for key in shared & fixed if not torch.equal(own[key], held[key])}
            if differs:
                raise ResumeError(
                    f"{self.run.path(file)}: {min(differs)}: expected what this machine and version prepare, got "
                    f"another; fix: go on where the run began, {AFRESH}"
                )
            block.load_state_dict(held)
        if self.resumed:
            values = {"stage": self.stage, "block": self.block, "step": (self._record["loop"] or {}).get("step", 0)}
            notice("resume", f"{self.run.folder}: going on from {self.run.position}", **values)
        # Preparation was the last that could refuse the recipe; from here on there is something to go on from.
        self._commit({})

    def blocks_done(self, number: int, blocks: Mapping[str, nn.Module], fit: Fit) -> None:
        """Save finished blocks.

        Args:
            number: of the block in its stage; 0 in a model stage, where `blocks` are all of them.
            blocks: by their names in the model.
        """
        files = {name: f"stage-{self.stage + 1}-{name}.safetensors" for name in blocks}
        fits = [list(stage) for stage in self._record["fits"]]
        fits[self.stage].append(asdict(fit))
        self._commit(
            {files[name]: block.state_dict() for name, block in blocks.items()},
            blocks=self._record["blocks"] | files,
            fits=fits,
            block=number + 1,
            loop=None,
        )

    def stage_done(self, student: nn.Module) -> None:
        """Write the checkpoint of the stage at work, unless it is the last, and go to the next one."""
        name = self._record["names"][self.stage].replace(" ", "-")
        folder = self.run.path(f"{self.stage + 1}-{name}")
        if self.stage + 1 < len(self._record["names"]) and not folder.exists():
            self._save_stage(student, self.stage, folder)
        self._commit({}, stage=self.stage + 1, block=0, loop=None)

    def loop(self, number: int) -> "LoopFile":
        """Where the loop of a block of the stage at work is saved; number 0 in a model stage."""
        return LoopFile(self, number)

    def _commit(self, tensors: Mapping[str, Mapping[str, Tensor]], **changes: Any) -> None:
        self._record |= changes | {"micro_batch": self.memory.limit, "cache": self.memory.cache}
        record = self._record
        needed = {*record["blocks"].values(), record["generated"], (record["loop"] or {}).get("file")}
        add = {name: partial(_save, held) for name, held in tensors.items()}
        self.run.commit(add, needed - {None}, **record)


class LoopFile:
    """Saves the loop of one block (or model) and gives it back; fits `fit`'s `saving`."""

    def __init__(self, keeper: Keeper, number: int) -> None:
        self.steps = keeper.run.save_steps
        self._keeper, self._number = keeper, number

    def load(self) -> dict[str, Tensor] | None:
        """The loop's tensors, on the CPU, if they were saved."""
        held = self._keeper._record["loop"]
        if held is None or held["block"] != self._number:
            return None
        return load_file(self._keeper.run.path(held["file"]))

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Save the loop after so many steps."""
        file = f"stage-{self._keeper.stage + 1}-block-{self._number + 1}-step-{step}.safetensors"
        self._keeper._commit({file: tensors}, loop={"file": file, "block": self._number, "step": step})


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
