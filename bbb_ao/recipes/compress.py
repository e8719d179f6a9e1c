"""The main job: a Hugging Face model and a recipe in, a packed checkpoint out."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bbb_ao.checkpoint import save_packed
from bbb_ao.convert import convert_model
from bbb_ao.errors import DataError
from bbb_ao.modeldir import check_model_directory, check_weights
from bbb_ao.outputs import check_output_directory, check_space
from bbb_ao.packed_head import find_head, pack_head
from bbb_ao.qat_linear import qat_linears, set_training_bits
from bbb_ao.recipes.blockwise import BlockRun, train_block_stage
from bbb_ao.recipes.disk import disk_use
from bbb_ao.recipes.distill import train_model_stage
from bbb_ao.recipes.generation import GENERATED_AT_ONCE, generate_sequences
from bbb_ao.recipes.head import Head
from bbb_ao.recipes.identity import Inputs, check_hashes, check_recipe, hash_inputs
from bbb_ao.recipes.keeper import Keeper
from bbb_ao.recipes.loading import choose_device, load_model, load_tokenizer
from bbb_ao.recipes.machine import describe_device, peak_memory, versions
from bbb_ao.recipes.memory import Memory
from bbb_ao.recipes.optimization import Fit
from bbb_ao.recipes.prepare import Prepared, prepare_student
from bbb_ao.recipes.run_folder import RunFolder
from bbb_ao.recipes.sequences import check_sequences, read_sequences
from bbb_ao.recipes.skeleton import build_skeleton, prepare_skeleton
from bbb_ao.recipes.sources import resolve_sources
from bbb_ao.recipes.stages import Recipe
from bbb_ao.recipes.statistics import layer_errors
from bbb_ao.storage import footprint


class Reporter(Protocol):
    """What training tells the world; see `progress.Progress`, which draws bars and writes the JSON-lines log."""

    def event(self, kind: str, **values: Any) -> None:
        """Something happened: one line of the log."""
        ...

    def notice(self, kind: str, text: str, **values: Any) -> None:
        """Something happened that the user should read now: a sentence, and a line of the log."""
        ...

    def stage(self, number: int, name: str, blocks: int, done: int = 0) -> None:
        """A stage begins; `blocks` is 1 for an end-to-end stage, `done` how many of them are finished already."""
        ...

    def step(self, step: int, steps: int, loss: Callable[[], float]) -> None:
        """An optimizer step is done."""
        ...

    def block(self, number: int, name: str, fit: Fit) -> None:
        """A block is done."""
        ...


class Silent:
    """A reporter that says nothing."""

    def event(self, kind: str, **values: Any) -> None: ...
    def notice(self, kind: str, text: str, **values: Any) -> None: ...
    def stage(self, number: int, name: str, blocks: int, done: int = 0) -> None: ...
    def step(self, step: int, steps: int, loss: Callable[[], float]) -> None: ...
    def block(self, number: int, name: str, fit: Fit) -> None: ...


@dataclass
class Result:
    """What training gave.

    Attributes:
        model: the trained model: QATLinears from `train`, PackedLinears from `compress`.
        prepared: plans and layer names.
        fits: for each stage, one entry for each block (one for an end-to-end stage).
        seconds: wall time of preparation and training.
        bits_per_weight: everything stored, at the widest width; None before packing.
    """

    model: Any
    prepared: Prepared
    fits: list[list[Fit]] = field(default_factory=list)
    seconds: float = 0.0
    bits_per_weight: float | None = None


def train(
    model: nn.Module,
    sequences: Tensor,
    recipe: Recipe,
    device: torch.device | None = None,
    report: Reporter | None = None,
    generated: Tensor | None = None,
    keeper: Keeper | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Result:
    """Run a recipe's stages on a model.

    Args:
        model: the full-precision Hugging Face model; it serves as the teacher, in evaluation mode, and is not changed.
        sequences: calibration ids, int64 [sequences, tokens].
        device: where blocks are trained; None takes `choose_device()`.
        generated: text of the model's own for stages that ask for it, int64 [recipe.generated, tokens], as from
            `generate_sequences`; None lets the model write it now.
        keeper: saves the run as it goes and continues it; None does neither.
        facts: further values of the log's first event, "run".
    Returns:
        the trained student on the CPU, float32 masters, at the last stage's widths.
    Raises:
        RecipeError, ModelError, NumericsError: see `prepare_student` and `fit`.
        DataError: `sequences` is no matrix of ids of the model's vocabulary.
    """
    check_sequences(sequences, model)
    if recipe.head_bits is not None:
        find_head(model)
    device = device or choose_device()
    with _evaluating(model):
        # Here, so that a model without such a head is refused before it writes text.
        head = Head(model, sequences[:1]) if recipe.logits else None
        if recipe.generated and generated is None:
            write = partial(_generate, model, sequences, recipe, device, report or Silent())
            generated = keeper.generated(write) if keeper else write()
        if recipe.generated and generated is not None:
            check_sequences(generated, model)
            if tuple(generated.shape) != (recipe.generated, sequences.shape[1]):
                raise DataError(
                    f"generated: expected {[recipe.generated, sequences.shape[1]]} ids, got {list(generated.shape)}; "
                    "fix: generate as many sequences, of the same length"
                )
            sequences = torch.cat([sequences, generated])
        return _train(model, head, sequences, recipe, device, report or Silent(), keeper, facts or {})


def _generate(model: nn.Module, sequences: Tensor, recipe: Recipe, device: torch.device, report: Reporter) -> Tensor:
    # Its own limit: sequences written at once are no sequences trained on at once.
    memory = Memory()
    memory.notice = report.notice
    return memory.retry(
        lambda size: generate_sequences(model, sequences, recipe.generated, recipe.seed, device, size),
        GENERATED_AT_ONCE,
        "generation",
    )


def _train(
    model: nn.Module,
    head: Head | None,
    sequences: Tensor,
    recipe: Recipe,
    device: torch.device,
    report: Reporter,
    keeper: Keeper | None,
    facts: Mapping[str, Any],
) -> Result:
    """`train` on [calibration and generated sequences, tokens]."""
    start = time.perf_counter()
    torch.manual_seed(recipe.seed)
    in_blocks = any(stage.scope == "block" and stage.text != "calibration" for stage in recipe.stages)
    own = recipe.generated if in_blocks else 0
    memory = keeper.memory if keeper else Memory(recipe.micro_batch, recipe.cache)
    memory.notice = report.notice
    run = BlockRun(model, sequences[: len(sequences) - recipe.generated + own], recipe, device, own, memory, head)
    student = copy.deepcopy(model).float().cpu()
    prepared = prepare_student(student, recipe, run)
    # Not before: a run that is refused leaves no log.
    resumed = keeper is not None and keeper.resumed
    told = dict(facts, resumed=resumed, sequences=[len(sequences) - recipe.generated, sequences.shape[1]])
    _tell(report, told, device, prepared)
    if keeper:
        keeper.restore(student, report.notice)
    if not resumed:
        set_training_bits(student, recipe.default_bits, recipe.stages[-1].act_bits)
        report.event("layers", when="before", errors=layer_errors(run, student))
    report.event("prepared", **_cost(start, device))
    result = Result(student, prepared)
    for number in range(len(recipe.stages)):
        if keeper and number < keeper.stage:
            result.fits.append(keeper.fits(number))
            continue
        stage_start = time.perf_counter()
        result.fits.append(_train_stage(run, student, sequences, number, report, keeper))
        report.event("stage_done", stage=number, **_cost(stage_start, device))
        if keeper:
            keeper.stage_done(student)
    set_training_bits(student, recipe.default_bits, recipe.stages[-1].act_bits)
    report.event("layers", when="after", errors=layer_errors(run, student))
    result.seconds = time.perf_counter() - start
    return result


def _tell(report: Reporter, facts: Mapping[str, Any], device: torch.device, prepared: Prepared) -> None:
    """Begin the log: what the run depends on, and what preparation found."""
    report.event("run", **facts, device=describe_device(device), versions=versions())
    for plan in prepared.plans:
        report.event("plan", blocks=len(plan.blocks), plan=str(plan))
    for site in prepared.channels:
        report.event("channels", **asdict(site))


def _cost(start: float, device: torch.device) -> dict[str, Any]:
    """What the phase since `start` took, for the log."""
    return {"phase_seconds": round(time.perf_counter() - start, 3), **peak_memory(device)}


def _train_stage(
    run: BlockRun, student: nn.Module, sequences: Tensor, number: int, report: Reporter, keeper: Keeper | None
) -> list[Fit]:
    """One stage of `_train`, from the block at which it stopped; a Fit for each block."""
    recipe, stage = run.recipe, run.recipe.stages[number]
    if stage.epochs == 0:
        set_training_bits(student, stage.widths[-1], stage.act_bits)
        return []
    seed = recipe.seed + 10_000 * (number + 1)
    higher = recipe.stages[number - 1] if number else None
    in_blocks = stage.scope == "block"
    done, fits = (keeper.block, keeper.fits(number)) if keeper else (0, [])
    report.stage(number, stage.name, len(run.names) if in_blocks else 1, done)

    def block_done(block: int, name: str, fit: Fit) -> None:
        report.block(block, name, fit)
        if keeper:
            names = (name,) if in_blocks else run.names
            keeper.blocks_done(block, {each: student.get_submodule(each) for each in names}, fit)

    if in_blocks:
        if done < len(run.names):
            saving = keeper.loop if keeper else lambda block: None
            fits += train_block_stage(
                run, student, stage, higher, seed, block_done, report.step, first=done, saving=saving
            )
    elif not done:
        saving = keeper.loop(0) if keeper else None
        fits.append(
            train_model_stage(
                run.teacher,
                student,
                sequences,
                stage,
                recipe,
                run.device,
                seed,
                report.step,
                run.memory,
                saving,
                higher,
            )
        )
        block_done(0, stage.name, fits[-1])
    set_training_bits(student, stage.widths[-1], stage.act_bits)
    return fits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode in which each module was before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def pack(student: Any, model: nn.Module, recipe: Recipe) -> Any:
    """Convert a trained student in place, and its head if the recipe says so; every other tensor gets back its type.

    Not `student.to(dtype)`: that would also round what the architecture keeps in float32 (frequencies of rotary
    embeddings), and the packed model would change when it is reloaded.

    Raises:
        NumericsError: see `convert_model`.
    """
    convert_model(student, max(recipe.stages[-1].widths), next(model.parameters()).dtype)
    if recipe.head_bits is not None:
        pack_head(student, recipe.head_bits)
    types = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, tensor in (*student.named_parameters(), *student.named_buffers()):
        if name in types:
            tensor.data = tensor.data.to(types[name])
    return student


def compress(
    model_or_path: Any,
    recipe: Recipe | str | Path,
    data: str | Path | Sequence[str | Path] | Tensor,
    output_dir: str | Path,
    *,
    tokenizer: Any = None,
    device: torch.device | None = None,
    report: Reporter | None = None,
    run: RunFolder | None = None,
    command: str | None = None,
) -> Result:
    """Quantize a model by a recipe and save the packed result.

    Args:
        model_or_path: a Hugging Face causal language model, or a local directory (checked before it is opened).
        recipe: a Recipe, the name of a shipped one, or a YAML file.
        data: files or folders (see `data.load_documents`), or calibration ids, int64 [sequences, tokens].
        output_dir: written at the end, whole or not at all; must be empty or absent, and not the model's directory.
        tokenizer: needed with a model object and data that is text; saved beside the weights.
        run: the open folder of the run's state, with which a run that was stopped goes on: `with RunFolder(output_dir)
            as run: compress(..., run=run)`. None keeps no state.
        command: how the run was started, for its log.
    Returns:
        the packed model with its figures.
    Raises:
        RecipeError, ModelError, DataError, ResourceError, NumericsError: one line each, before anything is written.
        ResumeError: the run began with another recipe, model or data.
    """
    from bbb_ao.recipes.loader import dump_recipe, load_recipe

    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    directory = model_or_path if isinstance(model_or_path, str | Path) else None
    # Before training, so that what cannot be written is refused now.
    resolved = dump_recipe(recipe)
    done = run is not None and run.is_done(resolved)
    if not done:
        check_output_directory(output_dir, directory)
    if not isinstance(data, Tensor):
        resolve_sources(data)
    changed = check_recipe(run.record, recipe, run.amend) if run else set()
    room = None if done or directory is None else output_dir
    model, tokenizer, sequences, inputs = _open(model_or_path, tokenizer, data, recipe, run, room)
    keeper = Keeper(run, recipe, inputs, partial(_save_stage, model, tokenizer, recipe), changed) if run else None
    device, report = device or choose_device(), report or Silent()
    facts = {"command": command, "model": str(directory or type(model).__name__), "recipe": resolved}
    result = train(model, sequences, recipe, device, report, keeper=keeper, facts=facts)
    start = time.perf_counter()
    result.model = pack(result.model, model, recipe)
    result.bits_per_weight = footprint(result.model).bits_per_weight
    if not done:
        save_packed(result.model, tokenizer, output_dir, recipe.default_bits, resolved)
    report.event("saved", bits_per_weight=result.bits_per_weight, **_cost(start, device))
    if run:
        run.finish()
    return result


def _save_stage(
    model: nn.Module, tokenizer: Any, recipe: Recipe, student: nn.Module, number: int, folder: Path
) -> None:
    """Save the checkpoint of a stage, as if it had been the last one; the student is not changed."""
    from bbb_ao.recipes.loader import dump_recipe

    until = recipe.until(number)
    # A copy but for the masters, which would fill the memory a second time.
    shared = {id(tensor): tensor for linear in qat_linears(student).values() for tensor in linear.parameters()}
    packed = pack(copy.deepcopy(student, shared), model, until)
    save_packed(packed, tokenizer, folder, until.default_bits, dump_recipe(until))


def _open(
    model_or_path: Any, tokenizer: Any, data: Any, recipe: Recipe, run: RunFolder | None, room: str | Path | None
) -> tuple[Any, Any, Tensor, Inputs]:
    """What a run reads: (model, tokenizer, calibration ids, and what a run with a state is of).

    A directory's weights come last, since a large model's take minutes.

    Args:
        room: a path on the disk that must have room for what the run writes; None is not looked at.
    """
    directory = model_or_path if isinstance(model_or_path, str | Path) else None
    model: Any = model_or_path
    if directory is None:
        check_weights(model)
    else:
        check_model_directory(directory)
        model, tokenizer = build_skeleton(directory), tokenizer or load_tokenizer(directory)
    sequences = read_sequences(data, tokenizer, recipe, model)
    if room is not None:
        student, _ = prepare_skeleton(model, recipe)
        needed = disk_use(model, student, recipe, run.save_steps if run else None).run
        check_space(room, needed, run.bytes if run else 0)
    inputs = hash_inputs(model_or_path, data, run.record) if run else Inputs({}, {})
    if run:
        check_hashes(run.record, inputs.hashes)
    return model if directory is None else load_model(directory), tokenizer, sequences, inputs
