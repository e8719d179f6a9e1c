"""The recipe language: what is trained, in which order, on which grid. Plain dataclasses, checked when they are made.

A recipe goes down in precision stage by stage (8, 4, 2 bits; weights before activations); each stage starts from the
last one's weights with a fresh optimizer and learning-rate schedule (design.md, section 1). YAML is read by `loader`.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Literal

from bbb_ao.errors import ModelError, RecipeError
from bbb_ao.recipes.patterns import check_pattern

SCHEMA = 1
# What pydantic's adapter in `loader` reads from each class; a plain dict, so that this module needs no pydantic.
STRICT: Any = {"extra": "forbid", "strict": True}


def _expect(valid: bool, name: str, expected: str, got: object, fix: str) -> None:
    if not valid:
        raise RecipeError(f"{name}: expected {expected}, got {got!r}; fix: {fix}")


def _is_bits(value: object) -> bool:
    return type(value) is int and 2 <= value <= 8


def _expect_number(owner: object, name: str, low: float, high: float = math.inf, above: bool = False) -> None:
    """Refuse a field that is not a finite number in [low, high], or in (low, high] where `above`; None passes."""
    value = getattr(owner, name)
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    sign = ">" if above else ">="
    upper = "" if math.isinf(high) else f" and <= {high:g}"
    valid = number and (value > low if above else value >= low) and value <= high
    default = next(f.default for f in fields(owner) if f.name == name)  # type: ignore[arg-type]
    _expect(valid, name, f"a finite number {sign} {low:g}{upper}", value, f"for example {default or 1}")


def _expect_count(owner: object, name: str, low: int = 1, high: int = 2**31 - 1) -> None:
    """Refuse a field that is not a whole number from low to high; None passes."""
    value = getattr(owner, name)
    valid = value is None or (type(value) is int and low <= value <= high)
    fix = "choose one in this range" if type(value) is int else "write it without quotes or a point"
    _expect(valid, name, f"a whole number from {low} to {high}", value, fix)


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """The weight grid, as in `bbb_ao.grid.Grid`.

    Attributes:
        kind: "half_step" (slices are plain shifts) or "integer" (slices are rounded and clamped).
        group_size: weights along in_features that share one scale; a multiple of 32.
        zero_point_bits: bits of the stored zero offset, 0 (symmetric) to 8; always 2 on the integer grid.
        scale_format: "e4m3" (8 bits a group) or "float32" (32 bits a group, for studies).
        act_kind: the activations' grid, "half_step" or "integer"; None takes that of the weights.
    """

    __pydantic_config__ = STRICT
    kind: Literal["half_step", "integer"] = "half_step"
    group_size: int = 32
    zero_point_bits: int = 4
    scale_format: Literal["e4m3", "float32"] = "e4m3"
    act_kind: Literal["half_step", "integer"] | None = None

    def __post_init__(self) -> None:
        size, bits = self.group_size, self.zero_point_bits
        valid = type(size) is int and 32 <= size <= 4096 and size % 32 == 0
        _expect(valid, "group_size", "a multiple of 32 up to 4096", size, "use 32, 64 or 128")
        low, high = (2, 2) if self.kind == "integer" else (0, 8)
        expected = f"{low}" if low == high else f"a whole number from {low} to {high}"
        valid = type(bits) is int and low <= bits <= high
        _expect(valid, "zero_point_bits", f"{expected} on the {self.kind} grid", bits, f"use {min(max(4, low), high)}")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Outlier channel splitting: which share of the input channels gets a duplicate.

    Attributes:
        ratio_min: share of the channels split in the first decoder block, 0 to 1.
        ratio_max: the same in the last block; linear in depth between them.
        metric: ranks channels by "joint" (||X_m||_2 over calibration tokens * max_j |W_jm|) or "weight" (the latter).
        producer_rows: True duplicates rows of the producing Linear where the plan allows it (gate/up for down);
            False gathers with an index instead.
    """

    __pydantic_config__ = STRICT
    ratio_min: float = 0.0
    ratio_max: float = 0.17
    metric: Literal["joint", "weight"] = "joint"
    producer_rows: bool = True

    def __post_init__(self) -> None:
        _expect_number(self, "ratio_min", 0, 1)
        _expect_number(self, "ratio_max", 0, 1)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Narrowing of each group's range before training; see `bbb_ao.clipping`.

    Attributes:
        metric: the error that is made small, "weight" (of the weights) or "activation" (weighted by the second moment
            of the inputs over the calibration tokens).
        asymmetric: shrink minimum and maximum apart, in (steps + 1)**2 trials, instead of together, in steps + 1.
        lowest: smallest share of the range that is tried, > 0 to 1.
        steps: intervals between it and the whole range.
    """

    __pydantic_config__ = STRICT
    metric: Literal["weight", "activation"] = "weight"
    asymmetric: bool = False
    lowest: float = 0.5
    steps: int = 10

    def __post_init__(self) -> None:
        _expect_number(self, "lowest", 0, 1, above=True)
        _expect_count(self, "steps", 1, 100)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the schedule: a width to train at, and how.

    Attributes:
        scope: "block" (mean squared error of one decoder block at a time) or "model" (end to end, Kullback-Leibler
            divergence from the full-precision model); model stages come last.
        weight_bits: 2 to 8, or several, widest first: all are trained jointly on one parent code.
        act_bits: width of dynamically quantized activations, 2 to 8; None keeps them at 16 bits.
        epochs: passes over the stage's sequences; a fraction stops early, 0 sets the widths without training.
        lr: peak learning rate of the weights (AdamW), > 0.
        lr_scale: learning rate of learned scales and zero points; None uses `lr`.
        loss_weights: one factor for each of several `weight_bits`, in their order; None weighs all by 1.
        batch_size: sequences per optimizer step.
        kl_temperature: softens both distributions of a model stage; 1 leaves them alone.
        objective: loss of a model stage: "forward_kl", KL(model || student); "reverse_kl", KL(student || model);
            "mixed_kl", their mean, the reverse one weighted by the model's mean probability of the text's tokens
            (BitDistiller); or "next_token", the cross-entropy of the text.
        train: "all", or "scales" alone, with every code as it is (EfficientQAT); scales are learned from then on.
        keep_bits: top bits of every code, fewer than the `weight_bits`, that stay as an earlier stage trained them at
            that width, with scales, norms and biases; the bits below start anew from the full-precision weights.
        text: sequences to train on: the "calibration" text, the "generated" ones, or "both".
    """

    __pydantic_config__ = STRICT
    scope: Literal["block", "model"] = "block"
    weight_bits: int | tuple[int, ...] = 2
    act_bits: int | None = None
    epochs: float = 1.0
    lr: float = 3e-4
    lr_scale: float | None = None
    loss_weights: tuple[float, ...] | None = None
    batch_size: int = 4
    kl_temperature: float = 1.0
    objective: Literal["forward_kl", "reverse_kl", "mixed_kl", "next_token"] = "forward_kl"
    train: Literal["all", "scales"] = "all"
    keep_bits: int | None = None
    text: Literal["calibration", "generated", "both"] = "calibration"

    def __post_init__(self) -> None:
        widths = self.widths
        valid = bool(widths) and all(map(_is_bits, widths))
        _expect(valid, "weight_bits", "whole numbers from 2 to 8", self.weight_bits, "use 8, 4 or 2, or [8, 4, 2]")
        falling = all(a > b for a, b in pairwise(widths))
        _expect(falling, "weight_bits", "widths that fall", self.weight_bits, "list each once, widest first")
        valid = self.act_bits is None or _is_bits(self.act_bits)
        _expect(valid, "act_bits", "a whole number from 2 to 8, or null", self.act_bits, "use null, 8, 4 or 2")
        _expect_number(self, "epochs", 0, 1e6)
        _expect_number(self, "lr", 0, 10, above=True)
        _expect_number(self, "lr_scale", 0, 10)
        _expect_number(self, "kl_temperature", 0, 1e3, above=True)
        _expect_count(self, "batch_size")
        valid = self.scope == "model" or self.objective == "forward_kl"
        _expect(valid, "objective", "none in a block stage", self.objective, "leave it out, or write scope: model")
        weights = self.loss_weights
        if weights is not None:
            valid = len(weights) == len(widths) and all(math.isfinite(w) and w >= 0 for w in weights) and any(weights)
            expected = f"{len(widths)} finite numbers >= 0, not all 0"
            _expect(valid, "loss_weights", expected, weights, "give one for each width of weight_bits")
        if self.keep_bits is not None:
            kept, lowest = self.keep_bits, widths[-1]
            expected = f"a whole number from 2 to {lowest - 1}, below weight_bits, or null"
            _expect(_is_bits(kept) and kept < lowest, "keep_bits", expected, kept, "keep the width trained before")
            _expect(self.train == "all", "train", "all, with keep_bits", self.train, "leave it out")

    @property
    def widths(self) -> tuple[int, ...]:
        """All weight widths trained in this stage, widest first."""
        return self.weight_bits if isinstance(self.weight_bits, tuple) else (self.weight_bits,)

    @property
    def narrowest(self) -> int:
        """The narrowest width that the codes are for once the stage is done."""
        return self.keep_bits or self.widths[-1]

    @property
    def name(self) -> str:
        """Short form for logs and progress: "w2a16", "w8+4+2a16", "w2a16 model"."""
        widths = "+".join(map(str, self.widths))
        return f"w{widths}a{self.act_bits or 16}" + (" model" if self.scope == "model" else "")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what training does, apart from the model and the data.

    Attributes:
        schema: version of this format.
        name, description: for people.
        grid: the weight grid.
        split: outlier channel splitting, or None for none.
        clip: narrowing of the groups' ranges before training, or None for their minimum and maximum.
        learned_scales: train scale and zero point as parameters; False derives them from the weights at every step.
        scale_gradient: with derived scales, "minmax" sends the gradient through minimum and maximum, "detached" not.
        stages: in order; neither the weights' nor the activations' width may rise.
        sequences: calibration sequences to draw.
        sequence_length: tokens in each.
        generated: further sequences that the full-precision model writes itself, for stages whose `text` names them.
        seed: of the draw, the shuffling and the initialization.
        targets: patterns (`re.fullmatch` on the layer's full name); None takes every Linear in the decoder blocks.
        skip: patterns of layers to leave in full precision.
        default_bits: width at which the saved checkpoint opens.
        head_bits: pack the language-model head too, by round to nearest at this width, 2 to 8, whatever the others run
            at; a tied head becomes a copy. None leaves it as it is.
        input_stream: what feeds a block in training: the output of the "quantized" prefix at the stage's own width, or
            at the "next_higher" width of the schedule.
        target_stream: what the full-precision block of the loss is fed with: the "full_precision" prefix's output, or
            the "student"'s inputs.
        lookahead: full-precision blocks behind the one in training that its output runs through; what leaves each of
            them counts in the loss as well.
        logits: weight of the forward divergence of the logits in the loss of the blocks whose `lookahead` reaches
            behind the last one; 0 leaves it out.
        gradient_clip: largest L2 norm of a step's gradient; None does not clip.
        warmup: share of a stage's steps with a linearly rising learning rate, 0 to 1; cosine decay follows.
        micro_batch: sequences in one forward pass (gradients are accumulated up to batch_size); None takes batch_size.
        cache: where the streams between blocks live, "memory" (of the CPU) or "disk".
        train_norms: also train the norms' weights inside the blocks.
        copies_lr_factor: learning-rate factor of split channels' two copies, which receive the same gradient, > 0.
        average: share of a stage's last steps, 0 to 1, over which trained parameters are averaged; 0 takes the last.
    """

    __pydantic_config__ = STRICT
    schema: int = SCHEMA
    name: str
    description: str = ""
    grid: GridSettings = field(default_factory=GridSettings)
    split: Split | None = None
    clip: Clip | None = None
    learned_scales: bool = False
    scale_gradient: Literal["minmax", "detached"] = "minmax"
    stages: tuple[Stage, ...]
    sequences: int = 128
    sequence_length: int = 512
    generated: int = 0
    seed: int = 0
    targets: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    default_bits: int = 2
    head_bits: int | None = None
    input_stream: Literal["quantized", "next_higher"] = "quantized"
    target_stream: Literal["full_precision", "student"] = "full_precision"
    lookahead: int = 0
    logits: float = 0.0
    gradient_clip: float | None = 1.0
    warmup: float = 0.05
    micro_batch: int | None = None
    cache: Literal["memory", "disk"] = "memory"
    train_norms: bool = True
    copies_lr_factor: float = 1.0
    average: float = 0.0

    def __post_init__(self) -> None:
        _expect(self.schema == SCHEMA, "schema", f"{SCHEMA}", self.schema, f"write schema: {SCHEMA}")
        _expect(bool(self.stages), "stages", "at least one stage", list(self.stages), "add one with weight_bits and lr")
        _expect_count(self, "sequences")
        _expect_count(self, "sequence_length", 2)
        _expect_count(self, "seed", 0, 2**63 - 1)
        _expect_count(self, "micro_batch")
        _expect_number(self, "gradient_clip", 0, above=True)
        _expect_number(self, "warmup", 0, 1)
        _expect_number(self, "copies_lr_factor", 0, 10, above=True)
        _expect_number(self, "average", 0, 1)
        _expect_count(self, "generated", 0)
        _expect_count(self, "lookahead", 0)
        _expect_number(self, "logits", 0)
        valid = self.logits == 0 or self.lookahead > 0
        _expect(valid, "logits", "0 without lookahead", self.logits, "set lookahead to 1 or more")
        for position, stage in enumerate(self.stages):
            valid = stage.text == "calibration" or self.generated > 0
            fix = "set generated to a number of sequences"
            _expect(valid, f"stages.{position}.text", "calibration without generated sequences", stage.text, fix)
        _expect(self.targets != (), "targets", "at least one pattern, or null", [], "write null for every Linear")
        for name, patterns in (("targets", self.targets or ()), ("skip", self.skip)):
            for position, pattern in enumerate(patterns):
                check_pattern(pattern, f"{name}.{position}")
        _check_schedule(self.stages)
        widths = self.stages[-1].widths
        low, high = self.stages[-1].narrowest, widths[0]
        valid = type(self.default_bits) is int and low <= self.default_bits <= high
        expected = f"{high}" if low == high else f"a width from {low} to {high}"
        _expect(valid, "default_bits", f"{expected}, as the last stage trains", self.default_bits, f"use {low}")
        valid = self.head_bits is None or _is_bits(self.head_bits)
        _expect(valid, "head_bits", "a whole number from 2 to 8, or null", self.head_bits, "use null, 8 or 4")

    def until(self, number: int) -> "Recipe":
        """The recipe as if its stage `number`, from 0, were the last one."""
        stages = self.stages[: number + 1]
        return replace(self, stages=stages, default_bits=stages[-1].narrowest)

    def select(self, layers: Iterable[str]) -> tuple[str, ...]:
        """The layers to quantize, in the order given.

        Args:
            layers: full names of all Linears inside the decoder blocks.
        Raises:
            RecipeError: a pattern of `targets` or `skip` matches none of them, or none is left.
            ModelError: there are no layers.
        """
        names = tuple(layers)
        if not names:
            raise ModelError(
                "model: expected torch.nn.Linear layers in the decoder blocks, got none; "
                "fix: give a model with Linears (GPT-2, for one, has Conv1D)"
            )
        for name, patterns in (("targets", self.targets or ()), ("skip", self.skip)):
            for position, pattern in enumerate(patterns):
                found = any(re.fullmatch(pattern, layer) for layer in names)
                fix = f"patterns match the full name, for example {names[0]}"
                _expect(found, f"{name}.{position}", f"a pattern that matches one of {len(names)} layers", pattern, fix)
        chosen = tuple(n for n in names if self.targets is None or any(re.fullmatch(p, n) for p in self.targets))
        kept = tuple(n for n in chosen if not any(re.fullmatch(p, n) for p in self.skip))
        _expect(bool(kept), "skip", "at least one layer left to quantize", list(self.skip), "drop a skip pattern")
        return kept


def _check_schedule(stages: tuple[Stage, ...]) -> None:
    """Refuse a width that rises from one stage to the next, and a block stage after a model stage."""
    kept, fix = stages[0].keep_bits, "train that width in a stage before it"
    _expect(kept is None, "stages.0.keep_bits", "null, as nothing was trained before", kept, fix)
    for position, (stage, following) in enumerate(pairwise(stages), start=1):
        here = f"stages.{position}"
        # The narrowest width may stay and the joint set may grow ({8}, {8, 4}, {8, 4, 2}), so only the lowest counts.
        lowest, after = stage.narrowest, following.narrowest
        if following.keep_bits is not None:
            expected = f"{lowest}, the last stage's narrowest width"
            _expect(after == lowest, f"{here}.keep_bits", expected, following.keep_bits, f"keep {lowest}")
        fix = "order the stages from wide to narrow"
        _expect(
            after <= lowest, f"{here}.weight_bits", f"at most {lowest}, the last stage's", following.weight_bits, fix
        )
        act, act_after = stage.act_bits or 16, following.act_bits or 16
        _expect(act_after <= act, f"{here}.act_bits", f"at most {act}, the last stage's", following.act_bits, fix)
        valid = not (stage.scope == "model" and following.scope == "block")
        _expect(valid, f"{here}.scope", "model, as the last stage's", "block", "put block stages first")
