"""What a log says of layers and channels: errors of outputs, and how far channels stand out; see docs/report.md."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bbb_ao.passes import RewritePlan
from bbb_ao.qat_linear import qat_linears
from bbb_ao.recipes.streams import working_copy
from bbb_ao.splitting import channel_metric

if TYPE_CHECKING:
    from bbb_ao.recipes.blockwise import BlockRun

PROBE_SEQUENCES = 4
# Channels whose metric is more than so many times the median count as outliers.
OUTLIER_FACTOR = 3.0
# Ranks at which the sorted metric is kept grow by this factor.
RANK_STEP = 1.5


@dataclass(frozen=True)
class SiteChannels:
    """How far the input channels of the Linears that share an input stand out, before and after splitting.

    The metric is that which ranks channels for splitting (see `channel_metric`), divided by its median over the
    channels before splitting.

    Attributes:
        block: number of the decoder block, from 0.
        layers: full names of the Linears.
        metric: "joint" (activations and weights) or "weight".
        channels, split: input channels, and how many of them got a duplicate.
        outliers_before, outliers_after: channels above OUTLIER_FACTOR; afterwards, each copy counts.
        ranks: from 1, increasing.
        before, after: the metric at these ranks, the largest first; 4 significant digits.
    """

    block: int
    layers: tuple[str, ...]
    metric: str
    channels: int
    split: int
    outliers_before: int
    outliers_after: int
    ranks: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


def site_metrics(
    block: nn.Module,
    plan: RewritePlan,
    norms: Mapping[str, Tensor] | None,
    indices: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The channel metric of every site of a block: site name -> [stored_features], float32.

    Args:
        norms: Linear name -> ||X_m||_2, [in_features]; None ranks by the weights alone.
        indices: of the split block, as from `choose_indices`; None before splitting.
    """
    metrics = {}
    for site in plan.sites:
        weights = [block.get_parameter(f"{name}.weight".removeprefix(".")) for name in site.consumers]
        norm = None if norms is None else next(norms[name] for name in site.consumers if name in norms)
        index = None if indices is None else indices.get(site.name)
        if norm is not None and index is not None:
            # Padding reads zero.
            norm = torch.cat([norm, norm.new_zeros(1)])[index.long().cpu()]
        metrics[site.name] = channel_metric(weights, norm)
    return metrics


def site_channels(
    number: int,
    name: str,
    plan: RewritePlan,
    metric: str,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    indices: Mapping[str, Tensor],
) -> list[SiteChannels]:
    """One entry for each site of block `number`, called `name`, from `site_metrics` before and after splitting."""
    found = []
    for site in plan.sites:
        first, last = (metrics[site.name].float().cpu() for metrics in (before, after))
        index = indices.get(site.name)
        channels = first.numel()
        median = max(float(first.median()), torch.finfo(torch.float32).tiny)
        ranks = [1]
        while ranks[-1] < channels:
            ranks.append(min(channels, max(ranks[-1] + 1, int(ranks[-1] * RANK_STEP))))
        curves = [(values.sort(descending=True).values / median)[torch.tensor(ranks) - 1] for values in (first, last)]
        found.append(
            SiteChannels(
                number,
                tuple(f"{name}.{layer}".removesuffix(".") for layer in site.consumers),
                metric,
                channels,
                0 if index is None else int((index[channels:] < channels).sum()),
                int((first > OUTLIER_FACTOR * median).sum()),
                int((last > OUTLIER_FACTOR * median).sum()),
                tuple(ranks),
                *(tuple(float(f"{value:.4g}") for value in curve.tolist()) for curve in curves),
            )
        )
    return found


@torch.no_grad()
def layer_errors(run: "BlockRun", student: nn.Module) -> dict[str, float]:
    """Relative squared error of every quantized Linear's output: full name -> sum((y_q - y)**2) / sum(y**2).

    y_q is the output in the student, whose layers before it are quantized too, y that in the full-precision model; both
    over the first PROBE_SEQUENCES calibration sequences. Nothing that training reads is changed.

    Args:
        student: the prepared model, on the CPU, at the widths to measure.
    Returns:
        4 significant digits. A layer that no tokens reach, or another number of tokens than in the full-precision
        model (an expert), is left out.
    """
    totals: dict[str, Tensor] = {}
    rows = range(min(PROBE_SEQUENCES, len(run.sequences)))
    exact = [run.entry.read(slice(row, row + 1), run.device) for row in rows]
    quantized = list(exact)
    for number, name in enumerate(run.names):
        teacher = working_copy(run.teacher_blocks[number], run.device)
        block = student.get_submodule(name).to(run.device)
        with compared(teacher, block) as sums:
            for row in rows:
                exact[row] = run.run(run.calls[number], teacher, exact[row])
                quantized[row] = run.run(run.calls[number], block, quantized[row])
        totals |= {f"{name}.{layer}": pair for layer, pair in sums.items()}
        block.to("cpu")
        # Not beside the next one.
        del teacher
    values = {key: pair.tolist() for key, pair in totals.items()}
    return {key: float(f"{error / norm:.4g}") for key, (error, norm) in values.items() if norm > 0}


@contextmanager
def compared(teacher: nn.Module, block: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While it is open, each pass of `teacher` and then of `block` adds to the mapping that it yields.

    Yields:
        Name of a quantized Linear in the block -> [sum((y_q - y)**2), sum(y**2)], float64.
    """
    sums: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple, y: Tensor, layer: str) -> None:
        outputs[layer] = y.float()

    def compare(module: nn.Module, args: tuple, y: Tensor, layer: str) -> None:
        exact = outputs.pop(layer, None)
        # Rows that are duplicated for a consumer follow the original ones.
        if exact is not None and exact.shape[:-1] == y.shape[:-1]:
            difference = y[..., : exact.shape[-1]].float() - exact
            pair = torch.stack([difference.square().double().sum(), exact.square().double().sum()])
            sums[layer] = sums[layer] + pair if layer in sums else pair

    def begin(module: nn.Module, args: tuple) -> None:
        # Of an expert that the student's tokens did not reach.
        outputs.clear()

    with ExitStack() as handles:
        handles.enter_context(teacher.register_forward_pre_hook(begin))
        for layer, linear in qat_linears(block).items():
            exact_linear = teacher.get_submodule(layer)
            handles.enter_context(exact_linear.register_forward_hook(partial(keep, layer=layer)))
            handles.enter_context(linear.register_forward_hook(partial(compare, layer=layer)))
        yield sums
