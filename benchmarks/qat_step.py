"""A block-wise QAT step on one decoder block against the same step in bfloat16 without fake quantization.

    python benchmarks/qat_step.py [--models 8b 7b] [--output benchmarks/results/qat_step.json] [--profile]

The step is the training loop's own (`recipes.optimization.update`): forward, mean squared error, backward, fused AdamW
on float32 masters under bfloat16 autocast, without gradient clipping, for one sequence of 2,048 tokens; weights and
inputs are random. `mode` is "eager" or "recorded" (a replayed CUDA graph, as the training loop does it). One flat row
each: median, 10th and 90th percentile of the time between steps, the peak of allocated memory (parameters, optimizer
state and activations), and tokens per second. Rows `paper_stages` project the hours of 4,096 sequences through all 32
blocks and six stages of two epochs (w8a16, w4a16, w2a16, w2a8, w2a4, w2a2; widths cost the same), with the passes that
move the streams.
"""

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from environment import environment, lacks_gpu
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from bbb_ao.grid import Grid
from bbb_ao.kernels.fake_quantize import dispatch
from bbb_ao.passes import apply_plan, capture_model, choose_indices, find_blocks, verified_plan
from bbb_ao.qat_linear import QATLinear, set_training_bits
from bbb_ao.recipes.optimization import Bounds, CopiesRate, autocast, make_optimizer, trainable_groups, update
from bbb_ao.recipes.replay import WARM_UP, Recorded
from bbb_ao.recipes.stages import Stage
from bbb_ao.recipes.streams import BlockCall, record_calls

TOKENS = 2048
SEQUENCES, EPOCHS, BLOCKS = 4096, 2, 32
# Mean over depth of the shipped recipes' ratios, 0 to 0.17.
SPLIT_RATIO = 0.085
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    # The testbed's 16 M parameter model: nearly all launches.
    "small": {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6},
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2},
}


@dataclass(frozen=True)
class Variant:
    """One implementation of the step: widths (bits None: no fake quantization), splitting, kernels or the reference."""

    impl: str
    bits: int | None
    act_bits: int | None = None
    split: bool = False
    reference: bool = False
    modes: tuple[str, ...] = ("eager", "recorded")


VARIANTS = (
    Variant("bf16", None),
    Variant("w2a16", 2),
    Variant("w2a2", 2, 2),
    Variant("w2a16_split", 2, split=True),
    Variant("w2a2_split", 2, 2, split=True),
    Variant("w2a16_reference", 2, reference=True, modes=("eager",)),
    Variant("w2a2_reference", 2, 2, reference=True, modes=("eager",)),
)


def make_model(shape: str, device: torch.device) -> Any:
    """A Llama of one decoder block with random float32 weights and a small vocabulary."""
    config = AutoConfig.for_model("llama", **SHAPES[shape], num_hidden_layers=1, vocab_size=256)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_student(block: nn.Module, variant: Variant) -> nn.Module:
    """A copy of the block with QATLinears, split by the plan of a tiny block of the same kind; bf16: a plain copy."""
    student = copy.deepcopy(block)
    if variant.bits is None:
        return student
    (captured,) = capture_model(make_model("tiny", torch.device("cpu")))
    plan = verified_plan(captured)
    indices = choose_indices(student, plan, SPLIT_RATIO if variant.split else 0.0, None, 32)

    def build(linear: nn.Linear, *, index: Tensor | None, expands_input: bool, out_index: Tensor | None) -> nn.Module:
        own = None if index is None else index.clone()
        return QATLinear.from_linear(
            linear, variant.bits, grid=Grid(), index=own, expands_input=expands_input, out_index=out_index
        )

    apply_plan(student, plan, indices, build)
    set_training_bits(student, variant.bits, variant.act_bits)
    return student


@contextmanager
def reference_only(active: bool) -> Iterator[None]:
    """Fake quantization in plain torch, whatever the device."""
    rule = dispatch.uses_triton
    if active:
        dispatch.uses_triton = lambda tensor: False
    try:
        yield
    finally:
        dispatch.uses_triton = rule


def make_step(student: nn.Module, call: BlockCall, x: Tensor, target: Tensor, mode: str) -> Callable[[], Tensor]:
    """The training loop's step on the block, with fixed inputs."""
    stage = Stage(weight_bits=2, lr=1e-5)
    groups = trainable_groups(student, stage, True)
    if not any(isinstance(module, QATLinear) for module in student.modules()):
        groups = [{"params": list(student.requires_grad_().parameters()), "peak": stage.lr}]

    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        with autocast(x.device):
            y = call(student, x)
        return (y.float() - target).square().mean()

    step = partial(update, make_optimizer(groups), CopiesRate(student, 1.0), Bounds(student), None, len(x), loss_of)
    if mode == "eager":
        return lambda: step(x, target)
    recorded = Recorded(step, 10**6)

    def run() -> Tensor:
        loss = recorded(x, target)
        if recorded.how != "recorded":
            raise RuntimeError(f"the step was not recorded: {recorded.how}")
        return loss

    return run


def milliseconds(step: Callable[[], Any], steps: int, device: torch.device) -> list[float]:
    """Times from the start of one call to the start of the next."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def spread(values: list[float]) -> tuple[float, float, float]:
    """(median, 10th percentile, 90th percentile)."""
    shares = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    median, low, high = torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()
    return median, low, high


def measure(
    variant: Variant, mode: str, block: nn.Module, call: BlockCall, x: Tensor, steps: int, profile: bool
) -> dict[str, Any]:
    """One row: warm-up, times, peak memory, and the time of a forward pass alone."""
    device = x.device
    student = make_student(block, variant)
    with torch.no_grad(), autocast(device):
        target = call(block, x).float()
    on_gpu = device.type == "cuda"
    # The untrained block stays behind; it is not part of the step.
    resident = torch.cuda.memory_allocated(device) if on_gpu else 0
    own = sum(p.numel() * p.element_size() for p in student.parameters())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with reference_only(variant.reference):
        step = make_step(student, call, x, target, mode)
        losses = [step() for _ in range(WARM_UP + 3)]
        times = milliseconds(step, steps, device)

        def forward() -> Tensor:
            with torch.no_grad(), autocast(device):
                return call(student, x)

        forward()
        ahead = milliseconds(forward, steps, device)
        if profile:
            show_kernels(step, f"{variant.impl} {mode}")
    if not bool(torch.isfinite(torch.stack(losses)).all()):
        raise RuntimeError(f"{variant.impl}: the loss is not finite: {losses}")
    median, low, high = spread(times)
    return {
        "impl": variant.impl,
        "mode": mode,
        "milliseconds": median,
        "low": low,
        "high": high,
        "peak_bytes": torch.cuda.max_memory_allocated(device) - resident + own if on_gpu else None,
        "forward_milliseconds": spread(ahead)[0],
        "tokens_per_second": x.shape[1] / median * 1e3,
        "stored_weights": sum(p.numel() for p in student.parameters() if p.dim() == 2),
    }


def show_kernels(step: Callable[[], Any], title: str) -> None:
    """Where the time of two steps goes, by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        step()
        torch.cuda.synchronize()
    print(f"-- {title}: two steps")
    print(found.key_averages().table(sort_by="self_device_time_total", row_limit=14, max_name_column_width=60))


def project(rows: list[dict[str, Any]], model: str, split: str) -> dict[str, Any]:
    """Hours of the paper's six stages on one GPU, from the recorded rows of the two kinds of stages."""
    found = {row["impl"]: row for row in rows if row["model"] == model and row["mode"] == "recorded"}
    per_sequence = found["bf16"]["forward_milliseconds"]
    for impl in (f"w2a16{split}", f"w2a2{split}"):
        row = found[impl]
        per_sequence += 3 * (EPOCHS * row["milliseconds"] + row["forward_milliseconds"])
    hours = per_sequence * SEQUENCES * BLOCKS / 3.6e6
    return {"impl": f"paper_stages{split}", "model": model, "mode": "recorded", "hours": hours}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["8b", "7b"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "qat_step.json")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each row")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="print the kernels of the eager steps")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and lacks_gpu("qat_step", "; --device cpu times a CPU"):
        return 5
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        torch.manual_seed(arguments.seed)
        model = make_model(name, device)
        ((_, block),) = find_blocks(model)
        (call,) = record_calls(model, [block], torch.zeros(1, arguments.tokens, dtype=torch.int64))
        x = torch.randn(1, arguments.tokens, model.config.hidden_size, device=device)
        for variant in VARIANTS:
            for mode in variant.modes if device.type == "cuda" else ("eager",):
                show = arguments.profile and mode == "eager" and not variant.split
                steps = max(3, arguments.steps // 3) if variant.reference else arguments.steps
                rows.append({"model": name, **measure(variant, mode, block, call, x, steps, show)})
                gc.collect()
                torch.cuda.empty_cache()
                base = next(row for row in rows if (row["model"], row["impl"], row["mode"]) == (name, "bf16", mode))
                last = rows[-1]
                peak = "" if last["peak_bytes"] is None else f"{last['peak_bytes'] / 2**30:6.2f} GiB"
                more = "" if base["peak_bytes"] is None else f" ({last['peak_bytes'] / base['peak_bytes']:.2f})"
                print(
                    f"{name} {variant.impl:16} {mode:8} {last['milliseconds']:8.2f} ms"
                    f" [{last['low']:.2f}, {last['high']:.2f}] ({last['milliseconds'] / base['milliseconds']:.2f})"
                    f" {peak}{more} forward {last['forward_milliseconds']:.2f} ms",
                    flush=True,
                )
        if device.type == "cuda":
            rows += [project(rows, name, split) for split in ("", "_split")]
            print(f"{name}: {rows[-2]['hours']:.2f} h for the paper's stages, {rows[-1]['hours']:.2f} h with splitting")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    where = {"tokens": arguments.tokens, **environment(arguments.seed)}
    arguments.output.write_text(json.dumps([row | where for row in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
