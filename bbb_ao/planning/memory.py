"""Peak memory of a run, as an explicit sum; docs/plan.md has the formula.

A run has phases: preparation in up to four steps, every stage, packing. In each, the device holds the sum of its
device terms and the host that of its host terms; on a CPU the host holds both. Everything is in bytes and depends on
shapes alone. Activations are traced (see `trace`); all other terms count tensors.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

from bbb_ao.passes import block_linears, find_blocks
from bbb_ao.planning.job import Job, float32_bytes, tensor_bytes
from bbb_ao.planning.trace import errors_bytes, model_step_bytes, norms_bytes, shortened, step_bytes
from bbb_ao.qat_linear import qat_linears
from bbb_ao.recipes.blockwise import STREAM_BUDGET, stream_widths
from bbb_ao.recipes.head import Head
from bbb_ao.recipes.optimization import stream_dtype
from bbb_ao.recipes.prepare import reads_activations
from bbb_ao.recipes.skeleton import trained_bytes
from bbb_ao.recipes.stages import Stage
from bbb_ao.recipes.statistics import PROBE_SEQUENCES

# Sequences written at a time, as `generate_sequences` does.
GENERATION_BATCH = 64
# Of each weight of a layer that is packed: its master, scaled, rounded and clamped in float32, and codes.
PACKING_BYTES = 20
# What cuBLAS takes for each thread and stream that it is called from, on compute capability 9.0; older ones take less.
WORKSPACE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Phase:
    """Memory at the worst moment of one phase of a run, term by term, in bytes.

    Attributes:
        name: "generate", "verify", "norms", "errors", a stage's number and name, or "pack".
        device: terms on the device that trains; none on a CPU, where they are the host's.
        host: terms in the CPU's memory.
        disk: in the folder for temporary files.
    """

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int]
    disk: int = 0

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def phases(job: Job) -> list[Phase]:
    """All phases of a run, in order; a stage that only sets the widths has none."""
    found = [generation(job)] if job.recipe.generated else []
    found.append(verification(job))
    if reads_activations(job.recipe):
        found.append(activations(job))
    found.append(errors(job))
    for number, stage in enumerate(job.recipe.stages):
        if stage.epochs:
            found.append((block_stage if stage.scope == "block" else model_stage)(job, number))
    return [*found, _phase(job, "pack", {}, models(job) | {"packing": packing(job)}, 0)]


def generation(job: Job) -> Phase:
    """The model with the keys and values of the text that it writes, and the next token's logits."""
    config = job.model.config.get_text_config()
    rows = min(GENERATION_BATCH, job.recipe.generated)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or job.hidden // config.num_attention_heads
    states = rows * job.recipe.sequence_length * heads * width * stream_dtype(job.device).itemsize
    # The cache of a layer is copied when it grows; logits, probabilities and their quotient are float32.
    device = {"cache": 2 * states * (len(job.blocks) + 1), "logits": 3 * 4 * rows * config.vocab_size}
    model = {"model": tensor_bytes(job.model)}
    device |= workspaces(job, 1)
    return _phase(job, "generate", device | ({} if job.on_cpu else model), model if job.on_cpu else {}, 0)


def verification(job: Job) -> Phase:
    """The graph of a block with half of its channels split, beside the original, in float64 on the CPU.

    Of every weight there is a copy; of those of Linears another one, with half as many columns more; of those whose
    rows are duplicated, half as many rows more; and of the last of these, while it is made, what it is made of, twice.
    """
    blocks, most = dict(find_blocks(job.model)), 0
    for plan in job.prepared.plans:
        block = blocks[plan.blocks[0]]
        sizes = {n: block.get_parameter(f"{n}.weight".removeprefix(".")).numel() for n in block_linears(block)}
        producers = [sizes[name] for site in plan.sites if site.rule == "rows" for name in site.producers]
        copies = 8 * sum(p.numel() for p in block.parameters()) + 12 * sum(sizes.values())
        most = max(most, copies + 6 * sum(producers) + 24 * max(producers or sizes.values(), default=0))
    return _phase(job, "verify", {}, models(job) | {"copies": most}, 1)


def activations(job: Job) -> Phase:
    """The full-precision blocks, one at a time, for the norms of what enters each Linear."""
    shape = (job.stream_batch, job.recipe.sequence_length, job.hidden)
    block = copy.deepcopy(find_blocks(job.model)[job.largest][1]).float()
    forward = norms_bytes(block, job.calls[job.largest], shape, job.device)
    device = {"teacher": teacher_blocks(job, 1), "forward": forward}
    return _phase(job, "norms", device | workspaces(job, 1), models(job), 1 + (kept_streams(job) or 2))


def errors(job: Job) -> Phase:
    """A full-precision block and the student's, one sequence at a time, for the errors of a layer's outputs."""
    rows, last = min(PROBE_SEQUENCES, job.block_sequences), job.recipe.stages[-1]
    shape = (1, job.recipe.sequence_length, job.hidden)
    teacher = copy.deepcopy(find_blocks(job.model)[job.largest][1]).float()
    widths, call = (job.recipe.default_bits, last.act_bits), job.calls[job.largest]
    device = {
        "teacher": teacher_blocks(job, 1),
        "batch": 2 * rows * job.recipe.sequence_length * job.hidden * 4,
        "forward": errors_bytes(teacher, job.blocks[job.largest], call, widths, shape, job.device),
    }
    if not job.on_cpu:
        device |= {"masters": tensor_bytes(job.blocks[job.largest]), "calls": calls(job)} | workspaces(job, 1)
    return _phase(job, "errors", device, models(job), 1 + kept_streams(job))


def block_stage(job: Job, number: int) -> Phase:
    """The largest block in training."""
    stage = job.recipe.stages[number]
    higher = job.recipe.stages[number - 1] if number else None
    sources = len(set(stream_widths(stage, higher, job.recipe)))
    paths = [path(job, stage, sources, head) for head in dict.fromkeys((None, job.head))]
    device = {"optimizer": optimizer(job, stage), **max(paths, key=lambda terms: sum(terms.values()))}
    if not job.on_cpu:
        # On a CPU the block is the model's own.
        device |= {"masters": tensor_bytes(job.blocks[job.largest]), "calls": calls(job)}
        device |= workspaces(job, 4 if job.recorded(stage) else 2)
    return _phase(job, job.name(number), device, models(job), live_streams(job, sources))


def model_stage(job: Job, number: int) -> Phase:
    """The whole student and the full-precision model, which leave the host for another device."""
    stage = job.recipe.stages[number]
    device = {
        "optimizer": _states(job, stage) * sum(trained_bytes(block, stage, job.recipe) for block in job.blocks),
        "step": model_step(job, stage),
    }
    host = models(job)
    if not job.on_cpu:
        device, host = device | host | workspaces(job, 4 if job.recorded(stage) else 2), {}
    return _phase(job, job.name(number), device, host, kept_streams(job) + 1)


def workspaces(job: Job, count: int) -> dict[str, int]:
    """cuBLAS's own memory. Forward and backward passes call it from a thread each, recorded steps on another stream."""
    return {} if job.on_cpu else {"workspaces": count * WORKSPACE_BYTES}


def models(job: Job) -> dict[str, int]:
    """The full-precision model as it is loaded, and the student's float32 masters."""
    return {"model": tensor_bytes(job.model), "student": tensor_bytes(job.student)}


def path(job: Job, stage: Stage, sources: int, head: Head | None) -> dict[str, int]:
    """Terms of what the loss of a block looks at: the block, and as many behind it as `lookahead` says.

    Args:
        sources: streams that feed the block.
        head: stands for the last of those behind; None where it is a block.
    """
    blocks = 1 + job.recipe.lookahead - (head is not None)
    return {
        "teacher": teacher_blocks(job, blocks),
        **({} if head is None else {"head": float32_bytes(head)}),
        "batch": batch(job, stage, sources, blocks),
        "step": step(job, stage, head),
    }


def teacher_blocks(job: Job, count: int) -> int:
    """Working copies of full-precision blocks, float32."""
    return count * float32_bytes(find_blocks(job.model)[job.largest][1])


def optimizer(job: Job, stage: Stage) -> int:
    """AdamW's two moments of every trained parameter, their mean where the recipe averages, and bounds of kept bits."""
    return _states(job, stage) * trained_bytes(job.blocks[job.largest], stage, job.recipe)


def _states(job: Job, stage: Stage) -> int:
    return 2 + (job.recipe.average > 0) + 2 * (stage.keep_bits is not None)


def batch(job: Job, stage: Stage, sources: int, blocks: int) -> int:
    """States of a batch, float32: of each of `sources` streams that enter the block, and of `blocks` targets."""
    targets = blocks if job.recipe.target_stream == "full_precision" else 0
    read = job.batch(stage) * job.recipe.sequence_length * job.hidden * 4 * (sources + targets)
    # A recorded step has inputs of its own.
    return read * (2 if job.recorded(stage) else 1)


def step(job: Job, stage: Stage, head: Head | None) -> int:
    """Activations, fake-quantized tensors and gradients of a step, at the worst moment; with a `head`, its logits."""
    shape = (job.micro_batch(stage), job.recipe.sequence_length, job.hidden)
    block, call = job.blocks[job.largest], job.calls[job.largest]
    teacher = copy.deepcopy(find_blocks(job.model)[job.largest][1]).float()
    behind = None if head is None else copy.deepcopy(head).float()

    def trace() -> int:
        return step_bytes(block, teacher, call, stage, job.recipe, shape, job.device, job.accumulates(stage), behind)

    return _traced_once(job, stage, trace, with_head=head is not None)


def model_step(job: Job, stage: Stage) -> int:
    """The same for the whole model, logits of both models included.

    Linear in the number of blocks, which are alike: peak(n) = peak(1) + (n - 1) * (peak(2) - peak(1)).
    """
    shape = (job.micro_batch(stage), job.recipe.sequence_length)
    blocks = len(job.blocks)

    def short(count: int) -> int:
        # From the middle, where the share of split channels is the mean.
        first = (blocks - count) // 2
        pair = (shortened(job.model, first, count), shortened(job.student, first, count))
        calls = job.calls[first : first + count]
        return model_step_bytes(*pair, calls, stage, job.recipe, shape, job.device, job.accumulates(stage))

    def trace() -> int:
        first = short(1)
        return first if blocks == 1 else first + (blocks - 1) * (short(2) - first)

    return _traced_once(job, stage, trace)


def _traced_once(job: Job, stage: Stage, trace: Callable[[], int], with_head: bool = False) -> int:
    """The trace of the first stage that holds the same tensors: those of a width differ in their values alone."""
    sliced = job.recipe.grid.kind == "integer" and min(stage.widths) < 8
    key = (
        len(stage.widths),
        sliced,
        stage.act_bits is None,
        stage.train,
        stage.keep_bits,
        stage.loss_weights,
        stage.scope,
        stage.objective,
    )
    key += (job.micro_batch(stage), job.accumulates(stage), with_head)
    if key not in job.traced:
        job.traced[key] = trace()
    return job.traced[key]


def calls(job: Job) -> int:
    """Masks and position embeddings of every block, each with tensors of its own on the device."""
    leaves = [tree_leaves((call.args, call.kwargs)) for call in job.calls]
    return sum(t.numel() * t.element_size() for each in leaves for t in each if isinstance(t, torch.Tensor))


def live_streams(job: Job, sources: int) -> int:
    """Streams at the worst moment of a block stage.

    The one that enters the model; behind the full-precision blocks the kept ones, or the last two; and one for each of
    `sources` prefixes, with another one while it advances.
    """
    blocks = len(job.blocks)
    if blocks == 1:
        return 2
    return 1 + (kept_streams(job) or min(blocks, 2 + job.recipe.lookahead)) + sources + (blocks > 2)


def kept_streams(job: Job) -> int:
    """Full-precision streams that are kept between stages: all where they fit into the budget, or none."""
    blocks = len(job.blocks)
    return blocks if job.stream_bytes * blocks <= STREAM_BUDGET else 0


def packing(job: Job) -> int:
    """Temporaries of the largest layer that is packed, the head included where it is."""
    sizes = [linear.weight.numel() for linear in qat_linears(job.student).values()]
    if job.recipe.head_bits is not None:
        sizes.append(job.model.get_output_embeddings().weight.numel())
    return PACKING_BYTES * max(sizes)


def _phase(job: Job, name: str, device: Mapping[str, int], host: Mapping[str, int], count: int) -> Phase:
    """A phase with `count` live streams; on a CPU all of it is in the host's memory."""
    streams = {"streams": count * job.stream_bytes} if count else {}
    disk = sum(streams.values()) if job.recipe.cache == "disk" else 0
    host = {**host, **({} if disk else streams)}
    return Phase(name, {}, {**device, **host}, disk) if job.on_cpu else Phase(name, device, host, disk)
