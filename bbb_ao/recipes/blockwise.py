"""Block-wise stages: one decoder block at a time against its full-precision twin.

loss = mean((B_q(x_q) - B(x))**2) / mean((B(x) - x)**2), with B_q the quantized block fed with the quantized prefix's
output x_q, and B the full-precision block fed with the full-precision prefix's output x. The denominator (the block's
own change of its input, over all calibration tokens) makes learning rates and clipping independent of the model's
scale. Source: design.md, section 1.4 (Xu et al., equation of the block loss).

With `lookahead`, the output goes on through as many full-precision blocks, each compared in the same way, and the loss
is the mean of all: what the blocks behind would make of an error counts, not its size alone. Behind the last block
stand the final norm and the head. With `logits: w`, a path that reaches behind it goes on to the logits z_q and z, and
w * KL(softmax(z) || softmax(z_q)) is added.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from bbb_ao.passes import find_blocks
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.distill import divergence
from bbb_ao.recipes.head import Head
from bbb_ao.recipes.loop_state import Saving
from bbb_ao.recipes.memory import Memory
from bbb_ao.recipes.optimization import Fit, autocast, codes_kept, fit, stage_rows, stream_dtype
from bbb_ao.recipes.stages import Recipe, Stage
from bbb_ao.recipes.streams import BlockCall, Stream, advance, embed, record_calls, working_copy

# Bytes of full-precision streams that are kept between stages, beside those at work.
STREAM_BUDGET = 2 * 2**30


@dataclass
class BlockRun:
    """The full-precision model's blocks, with what is needed to run them one at a time on a device.

    Attributes:
        teacher: the full-precision model, on the CPU; only the block at work is copied to the device.
        sequences: [sequences, tokens], int64; the last `generated` of them were written by the model itself.
        names, teacher_blocks, calls: of the decoder blocks, in order.
        entry: the stream that enters the first block.
        memory: how much of it runs at once, and where streams are kept.
        head: what stands behind its blocks, for a recipe with `logits` alone.
        kept: the full-precision stream behind each block, kept for the next stage where all of them fit into
            STREAM_BUDGET; it is the same in every stage.
    Raises:
        ValueError: a head without `logits`, or none with it.
    """

    teacher: nn.Module
    sequences: Tensor
    recipe: Recipe
    device: torch.device
    generated: int = 0
    memory: Memory = field(default_factory=Memory)
    head: Head | None = None

    def __post_init__(self) -> None:
        if (self.head is None) != (not self.recipe.logits):
            raise ValueError("head: expected what stands behind the blocks, where the recipe has logits, and else None")
        blocks = find_blocks(self.teacher)
        self.names = [name for name, _ in blocks]
        self.teacher_blocks = [block for _, block in blocks]
        calls = record_calls(self.teacher, self.teacher_blocks, self.sequences[:1])
        self.calls = [call.to(self.device) for call in calls]
        cache = "disk" if "disk" in (self.recipe.cache, self.memory.cache) else "memory"
        self.entry = embed(self.teacher, self.teacher_blocks[0], self.sequences, stream_dtype(self.device), cache)
        self.memory.streams.add(self.entry)
        self.kept: dict[int, Stream] = {}

    def behind(self, number: int, entering: Stream, block: nn.Module) -> Stream:
        """The full-precision stream behind block `number`; `block` is its working copy, `entering` what enters it."""
        if number in self.kept:
            return self.kept[number]
        leaving = self.advance(number, entering, block)
        if entering.bytes * len(self.names) <= STREAM_BUDGET:
            self.kept[number] = leaving
        return leaving

    def advance(self, number: int, entering: Stream, block: nn.Module) -> Stream:
        """The stream behind `block`, which stands on the device for block `number`."""
        name, run = self.names[number], partial(self.run, self.calls[number], block)
        leaving = self.memory.retry(
            lambda size: advance(entering, run, self.device, size, name), self.micro_batch, name
        )
        self.memory.streams.add(leaving)
        return leaving

    @property
    def micro_batch(self) -> int:
        return self.recipe.micro_batch or min(4, len(self.sequences))

    def run(self, call: BlockCall, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output, float32."""
        with autocast(self.device):
            return call(block, hidden).float()

    def logits(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """The head's output, in the type of the matrix products."""
        with autocast(self.device):
            return head(hidden)


def stream_widths(stage: Stage, higher: Stage | None, recipe: Recipe) -> list[tuple[int | None, int | None]]:
    """(weight bits, activation bits) of the prefix that feeds each width of `stage`.

    input_stream "quantized": the width itself; "next_higher": the width before it in the schedule (None: full
    precision).
    """
    own: list[tuple[int | None, int | None]] = [(width, stage.act_bits) for width in stage.widths]
    if recipe.input_stream == "quantized":
        return own
    first = (None, None) if higher is None else (higher.narrowest, higher.act_bits)
    return [first, *own[:-1]]


def train_block_stage(
    run: BlockRun,
    student_model: nn.Module,
    stage: Stage,
    higher: Stage | None,
    seed: int,
    on_block: Callable[[int, str, Fit], None] | None = None,
    on_step: Callable[[int, int, Callable[[], float]], None] | None = None,
    first: int = 0,
    saving: Callable[[int], Saving | None] = lambda number: None,
) -> list[Fit]:
    """Train blocks of the student for one stage, in order.

    Args:
        student_model: the prepared model, on the CPU; its blocks visit the device one at a time.
        higher: the stage before this one in the schedule, or None.
        seed: of the order of the sequences.
        on_block: called with (block number, name, result) after each block; on_step as in `fit`.
        first: number of the first block to train; those before it are only run, to feed it.
        saving: block number -> where its loop is saved; see `fit`.
    Returns:
        one Fit for each block that was trained.
    """
    recipe, memory = run.recipe, run.memory
    inputs = stream_widths(stage, higher, recipe)
    chosen = stage_rows(stage, run.generated, len(run.sequences))
    teachers = Teachers(run)
    streams = dict.fromkeys(inputs, run.entry)
    fits = []
    for number, name in enumerate(run.names):
        student = student_model.get_submodule(name).to(run.device).eval()
        path = teachers.path(number)
        if number >= first:
            load, loss_of = _block_loss(run, number, stage, student, path, teachers.head, streams, inputs, chosen)
            with codes_kept(student, stage, higher, run.teacher_blocks[number]):
                where, count = f"{name}: {stage.name}", len(chosen)
                result = fit(
                    student, stage, recipe, count, loss_of, seed + number, where, on_step, load, memory, saving(number)
                )
            fits.append(result)
            # They hold the streams that are replaced below.
            del load, loss_of
            # Before the block feeds the next one, so that what it learned is safe.
            if on_block is not None:
                on_block(number, name, fits[-1])
        if number + 1 < len(run.names):
            for width in streams:
                set_training_bits(student, *width)
                streams[width] = run.advance(number, streams[width], student)
        set_training_bits(student, stage.widths[-1], stage.act_bits)
        student.requires_grad_(False).to("cpu")
    return fits


@dataclass
class Target:
    """A full-precision block, and what the loss compares its output with.

    Attributes:
        block: [batch, tokens, hidden] -> the same shape.
        entering, leaving: the full-precision streams before and behind it.
    """

    block: Callable[[Tensor], Tensor]
    entering: Stream
    leaving: Stream


class Teachers:
    """Full-precision blocks on the device and the streams behind them, as many as the loss of one block needs.

    Attributes:
        head: gives the logits of what leaves the last block, once a path reaches behind it and the recipe has `logits`.
    """

    def __init__(self, run: BlockRun) -> None:
        self.run = run
        self.targets: dict[int, Target] = {}
        self.stream = run.entry
        self.head: Callable[[Tensor], Tensor] | None = None

    def path(self, number: int) -> list[Target]:
        """Block `number` and, of those behind it, `lookahead`; numbers have to rise from call to call."""
        run = self.run
        self.targets.pop(number - 1, None)
        last = min(number + run.recipe.lookahead, len(run.names) - 1)
        for ahead in range(number, last + 1):
            if ahead not in self.targets:
                block = working_copy(run.teacher_blocks[ahead], run.device)
                leaving = run.behind(ahead, self.stream, block)
                self.targets[ahead] = Target(partial(run.run, run.calls[ahead], block), self.stream, leaving)
                self.stream = leaving
        if run.head is not None and self.head is None and number + run.recipe.lookahead > last:
            self.head = partial(run.logits, working_copy(run.head, run.device))
        return [self.targets[ahead] for ahead in range(number, last + 1)]


def _block_loss(
    run: BlockRun,
    number: int,
    stage: Stage,
    student: nn.Module,
    path: list[Target],
    head: Callable[[Tensor], Tensor] | None,
    streams: dict[tuple[int | None, int | None], Stream],
    inputs: list[tuple[int | None, int | None]],
    chosen: Tensor,
) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Callable[..., Tensor]]:
    """What a batch of positions in `chosen` reads, and the loss of it, summed over the stage's widths with weights."""
    own_inputs = run.recipe.target_stream == "student"
    changes = [_mean_change(target.entering, target.leaving, run.micro_batch) for target in path]
    factors = stage.loss_weights or (1.0,) * len(stage.widths)
    active = [each for each in zip(stage.widths, inputs, factors, strict=True) if each[2] != 0]
    sources = list(dict.fromkeys(source for _, source, _ in active))
    read = [streams[source] for source in sources] + ([] if own_inputs else [target.leaving for target in path])

    def load(positions: Tensor) -> tuple[Tensor, ...]:
        rows = chosen[positions]
        return tuple(stream.read(rows, run.device) for stream in read)

    @torch.no_grad()
    def wanted_of(hidden: Tensor, leaving: tuple[Tensor, ...]) -> list[Tensor]:
        """What should leave each block of the path, read or made of what enters it; then the logits, with a head."""
        wanted = list(leaving)
        for target in path if own_inputs else ():
            hidden = target.block(hidden)
            wanted.append(hidden)
        return wanted if head is None else [*wanted, head(wanted[-1])]

    def loss_of(*states: Tensor) -> Tensor:
        total, wanted = torch.zeros((), device=run.device), None
        for width, source, factor in active:
            hidden = states[sources.index(source)]
            if wanted is None or own_inputs:
                wanted = wanted_of(hidden, states[len(sources) :])
            set_training_bits(student, width, stage.act_bits)
            output = run.run(run.calls[number], student, hidden)
            for step, (target, change) in enumerate(zip(path, changes, strict=True)):
                if step > 0:
                    output = target.block(output)
                total = total + factor / len(path) * (output - wanted[step]).square().mean() / change
            if head is not None:
                total = total + factor * run.recipe.logits * divergence(wanted[-1], head(output))
        return total

    return load, loss_of


def _mean_change(entering: Stream, leaving: Stream, size: int) -> float:
    """mean((B(x) - x)**2) over all tokens, at least the smallest normal float32 (a block that changes nothing)."""
    total, count = 0.0, 0
    for rows in entering.chunks(size):
        change = leaving.states[rows].float() - entering.states[rows].float()
        total += change.square().double().sum().item()
        count += change.numel()
    return max(total / count, torch.finfo(torch.float32).tiny)
