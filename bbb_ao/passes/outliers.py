"""Give a model outliers without changing its function: scales move between what makes a channel and what reads it.

With z = P(x) read by y = W z alone, and any f > 0 for each channel,

    W' = W diag(f)**s,   P'(x) = diag(f)**-s P(x)   gives   W' P'(x) = W P(x),

s = 1 for outliers among the weights, s = -1 among the activations. P is a norm, or a Linear whose output reaches W by
something that keeps positive factors of a channel: up to down, value to output projection. Which pairs do is tried out,
not assumed: a pair counts if the block gives the same in float64. Factors are powers of two, so that no bit is lost.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bbb_ao.errors import ModelError, NumericsError
from bbb_ao.passes.blocks import block_linears
from bbb_ao.passes.capture import CapturedBlock, capture_model
from bbb_ao.passes.plan import RewritePlan, SplitSite, plan_block
from bbb_ao.passes.verify import block_error

Form = Literal["weight", "1 + weight"]


@dataclass(frozen=True)
class ScalePair:
    """A producer and its readers, by names relative to the block.

    Attributes:
        producer: a norm or a Linear; consumers: the Linears that read it.
        form: what the producer multiplies by: "weight" (and adds as "bias"), or "1 + weight" (Gemma's norms).
        repeats: consumer channels for each of the producer's (heads that share a value head); head: channels in a head.
    """

    producer: str
    consumers: tuple[str, ...]
    form: Form = "weight"
    repeats: int = 1
    head: int = 1

    def spread(self, factors: Tensor) -> Tensor:
        """The producer's factors, [channels], as the consumers' columns read them: [channels * repeats]."""
        return factors.view(-1, 1, self.head).expand(-1, self.repeats, -1).reshape(-1)


def make_outliers(
    model: nn.Module,
    share: float = 0.01,
    strength: float = 16.0,
    where: Literal["weights", "activations"] = "weights",
    seed: int = 0,
    tolerance: float = 1e-10,
) -> dict[str, tuple[ScalePair, ...]]:
    """Scale random channels of every pair in every decoder block, in place.

    Args:
        share: of a pair's channels, at least one, > 0 to 1; strength: the largest factor, >= 2. Factors are drawn
            log-uniformly from 2, 4, ... strength.
        where: what gets the large values, the readers' "weights" or the "activations".
        tolerance: largest relative error of a block in float64.
    Returns:
        the pairs of each block.
    Raises:
        ModelError: no block has a pair.
        NumericsError: a block that is not the same afterwards (a norm that multiplies by 1 + weight needs float64).
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[ScalePair, ...]] = {}
    # All captures first: a kind's blocks are live.
    kinds = [(captured, find_pairs(captured, plan_block(captured))) for captured in capture_model(model)]
    for captured, pairs in kinds:
        for name in captured.names:
            block = model.get_submodule(name)
            before = copy.deepcopy(block)
            for pair in pairs:
                factors = _draw(block, pair, share, strength, generator)
                scale_pair(block, pair, factors if where == "activations" else 1 / factors)
            error = block_error(captured, before, block)
            if not error <= tolerance:
                raise NumericsError(
                    f"{name}: expected a relative error of at most {tolerance:g} after moving scales, got {error:.3g}; "
                    "fix: load the model in float64"
                )
            found[name] = pairs
    if not any(found.values()):
        raise ModelError(f"{type(model).__name__}: expected a norm or Linear read by Linears alone, got none")
    return found


def find_pairs(captured: CapturedBlock, plan: RewritePlan) -> tuple[ScalePair, ...]:
    """The pairs of a kind of block that keep its output, one for each producer."""
    pairs: dict[str, ScalePair] = {}
    for site in plan.sites:
        for pair in _candidates(captured.block, site):
            if pair.producer not in pairs and _keeps_function(captured, pair):
                pairs[pair.producer] = pair
                break
    return tuple(pairs.values())


def scale_pair(block: nn.Module, pair: ScalePair, factors: Tensor) -> None:
    """Multiply the producer's channels by `factors`, and divide the consumers' columns by them, in place.

    Args:
        factors: [channels of the producer], > 0.
    """
    producer = block.get_submodule(pair.producer)
    with torch.no_grad():
        for name, parameter in producer.named_parameters(recurse=False):
            scale = factors.to(parameter).view(-1, *[1] * (parameter.dim() - 1))
            if name == "weight" and pair.form == "1 + weight":
                parameter.copy_((1 + parameter.double()) * scale.double() - 1)
            else:
                parameter.mul_(scale)
        for name in pair.consumers:
            weight = block.get_parameter(f"{name}.weight")
            weight.div_(pair.spread(factors).to(weight))


def _candidates(block: nn.Module, site: SplitSite) -> Iterator[ScalePair]:
    if site.rule == "norm":
        yield ScalePair(site.producers[0], site.consumers)
        yield ScalePair(site.producers[0], site.consumers, "1 + weight")
        return
    # The input of an "index" site may come from any Linear, by way of attention for one.
    names: Sequence[str] = site.producers or [name for name in block_linears(block) if name not in site.consumers]
    columns = block.get_parameter(f"{site.name}.weight").shape[1]
    head = getattr(block.get_submodule(site.name.rpartition(".")[0]), "head_dim", None)
    for name in names:
        rows = block.get_parameter(f"{name}.weight").shape[0]
        if rows == columns:
            yield ScalePair(name, site.consumers)
        elif isinstance(head, int) and rows % head == 0 and columns % rows == 0:
            yield ScalePair(name, site.consumers, repeats=columns // rows, head=head)


def _channels(block: nn.Module, pair: ScalePair) -> int:
    return block.get_parameter(f"{pair.producer}.weight").shape[0]


def _keeps_function(captured: CapturedBlock, pair: ScalePair, tolerance: float = 1e-10) -> bool:
    changed = copy.deepcopy(captured.block).double()
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-2, 3, (_channels(changed, pair),), generator=generator)
    scale_pair(changed, pair, 2.0 ** powers.double())
    return block_error(captured, captured.block, changed) <= tolerance


def _draw(block: nn.Module, pair: ScalePair, share: float, strength: float, generator: torch.Generator) -> Tensor:
    """Factors of a pair's channels: 1, but for a random `share` of them."""
    channels = _channels(block, pair)
    count = max(1, round(share * channels))
    highest = int(torch.tensor(strength).log2().floor())
    factors = torch.ones(channels)
    chosen = torch.randperm(channels, generator=generator)[:count]
    factors[chosen] = 2.0 ** torch.randint(1, highest + 1, (count,), generator=generator)
    return factors
