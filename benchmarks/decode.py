"""End to end decoding of a Llama-3-8B-shaped model with random weights on one GPU: tokens a second, and bytes.

    python benchmarks/decode.py [--output benchmarks/results/decode.json] [--impl bf16 w2a16] [--batch 1] [--layers 4]

Greedy, 256 prompt tokens and 256 new ones, static cache. The prompt's pass and the decoding step are compiled, and each
is a CUDA graph, so that no time of the host counts. One row for each implementation and batch:

    tokens_per_second    batch * new tokens / (prompt's pass and all steps); median of the runs; low, high: the extremes
    step_tokens_per_second   the same of the steps alone; prefill_milliseconds: the prompt's pass
    weight_bytes         GPU memory that building the model took; refused where it is 2 % off expected_bytes, which is
                         bits per weight x weights of the packed layers, and two bytes for every other weight
    bits_per_weight      of the packed layers, scales and zero points counted

`--inductor KEY=VALUE`, any number of times, is a setting of torch._inductor.config for every implementation:

    triton.enable_pdl=True       kernels that Inductor writes start before those before them end (programmatic dependent
                                 launch); ours do so anyway, but with BBB_AO_PDL=off
    combo_kernels=True           kernels that do not depend on each other become one (queries turned, keys and values
                                 stored: one launch instead of three)
    triton.native_matmul=True    Inductor writes products of two rows or more itself, attention's among them, and fuses
                                 what is around them; they start early too, which neither cuBLAS's nor those do that
                                 max_autotune_gemm=True takes from templates
    coordinate_descent_tuning=True   products of one row, of dense weights, are sums that Inductor writes and tunes

`--attention one_launch` computes the attention of one token, its rotary embedding and its cache in one kernel
(decode_attention.py), for every implementation, in place of two batched products, a softmax and what is around them.
`--fold` makes norms, residual sums and SwiGLU parts of the packed products (`bbb_ao.passes.fold_norms`); it compiles 8
blocks, or as many as it names, as one function, and the sum and norm behind the last of them stay as they are.
`--profile` also prints the kernels of one step by their time. Models are built on the GPU in seconds.
"""

import argparse
import ast
import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._inductor.config
from decode_model import ATTENTIONS, IMPLEMENTATIONS, Decoder, build, llama_3_8b
from environment import environment, lacks_gpu

from bbb_ao.passes.fold_norms import FoldNorms
from bbb_ao.storage import footprint

PROMPT, NEW_TOKENS = 256, 256
TOLERANCE = 0.02


@dataclass(frozen=True)
class Way:
    """How the decoding loop is compiled.

    Attributes:
        fold: blocks that are folded and compiled as one function; 0 folds none.
        inductor: settings of torch._inductor.config.
        attention: of one token, one of `ATTENTIONS`.
    """

    fold: int
    inductor: dict[str, Any]
    attention: str

    @staticmethod
    def add_options(parser: argparse.ArgumentParser, fold: int = 0, inductor: tuple[tuple[str, Any], ...] = ()) -> None:
        """Options with these defaults; `--inductor` adds to its own."""
        parser.add_argument("--fold", type=int, nargs="?", const=8, default=fold, metavar="BLOCKS")
        parser.add_argument(
            "--inductor", action="append", type=inductor_setting, default=list(inductor), metavar="KEY=VALUE"
        )
        parser.add_argument("--attention", choices=ATTENTIONS, default="products")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Way":
        """What the options of `add_options` say."""
        return cls(arguments.fold, dict(arguments.inductor), arguments.attention)


def inductor_setting(text: str) -> tuple[str, Any]:
    """("triton.enable_pdl", True) of "triton.enable_pdl=True"; for argparse.

    Raises:
        ArgumentTypeError: torch._inductor.config has no such setting, or the value is not of the type of its own.
    """
    key, given, value = text.partition("=")
    known = torch._inductor.config.get_config_copy()
    if not given or key not in known:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE with a key of torch._inductor.config, got {text!r}")
    if isinstance(known[key], str):
        return key, value
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f"{key}: expected a Python literal, got {value!r}") from None
    if known[key] is not None and type(parsed) is not type(known[key]):
        raise argparse.ArgumentTypeError(f"{key}: expected {type(known[key]).__name__}, got {value!r}")
    return key, parsed


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def build_measured(impl: str, layers: int, seed: int) -> tuple[Any, dict[str, object]]:
    """The model, and what its weights take.

    Raises:
        RuntimeError: GPU memory is not what bits per weight say.
    """
    # The library's workspace is allocated at its first product and is no weight.
    square = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
    square.mm(square)
    before = allocated()
    model = build(llama_3_8b(layers), impl, "cuda", seed)
    taken = allocated() - before
    expected = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    bits = 16.0
    if IMPLEMENTATIONS[impl][0] is not None:
        packed = footprint(model)
        bits, expected = packed.bits_per_weight, expected + packed.bytes
    if abs(taken - expected) > TOLERANCE * expected:
        raise RuntimeError(f"{impl}: weights: expected {expected} bytes within 2 %, got {taken} of GPU memory")
    return model, {"weight_bytes": taken, "expected_bytes": expected, "bits_per_weight": bits}


def capture(call: Any) -> torch.cuda.CUDAGraph:
    """`call`, run three times to compile it and then captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def measure(model: Any, batch: int, runs: int, seed: int, way: Way, profile: bool) -> dict[str, object]:
    """Median and extremes of `runs` whole generations, after one that does not count."""
    torch._dynamo.reset()
    generator = torch.Generator("cuda").manual_seed(seed)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(0, vocabulary, (batch, PROMPT), device="cuda", generator=generator)
    options = way.inductor | ({"post_grad_custom_pre_pass": FoldNorms()} if way.fold else {})
    span = max(1, way.fold)
    decoder = Decoder(model, prompt, NEW_TOKENS, compiled=True, options=options, span=span, attention=way.attention)
    start = time.perf_counter()
    prefill, step = capture(decoder.prefill), capture(decoder.step)
    compiled = time.perf_counter() - start
    totals, steps = [], []
    for run in range(runs + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        prefill.replay()
        torch.cuda.synchronize()
        middle = time.perf_counter()
        for _ in range(NEW_TOKENS - 1):
            step.replay()
        torch.cuda.synchronize()
        end = time.perf_counter()
        if run:
            totals.append(end - start)
            steps.append(end - middle)
        check(decoder)
    if profile:
        print_kernels(prefill, step)
    rates = [batch * NEW_TOKENS / seconds for seconds in totals]
    return {
        "batch": batch,
        "tokens_per_second": median(rates),
        "low": min(rates),
        "high": max(rates),
        "step_tokens_per_second": batch * (NEW_TOKENS - 1) / median(steps),
        "prefill_milliseconds": 1e3 * median(a - b for a, b in zip(totals, steps, strict=True)),
        "compile_seconds": compiled,
    }


def check(decoder: Decoder) -> None:
    """Refuse a run that did not write all of its tokens, or whose last logits are not finite."""
    if int(decoder.position) != PROMPT + NEW_TOKENS - 1:
        raise RuntimeError(f"position: expected {PROMPT + NEW_TOKENS - 1} after the last step, got {decoder.position}")
    written = decoder.output[:, PROMPT:]
    if int(written.unique().numel()) < 2 or not all(bool(cache.keys.isfinite().all()) for cache in decoder.caches):
        raise RuntimeError("output: expected several tokens from finite keys, got one token or NaN")


def print_kernels(prefill: torch.cuda.CUDAGraph, step: torch.cuda.CUDAGraph) -> None:
    """Kernels of one decoding step by their total time, in microseconds."""
    prefill.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step.replay()
        torch.cuda.synchronize()
    events = sorted(trace.key_averages(), key=lambda event: -event.device_time_total)
    print(f"  {sum(event.count for event in events)} kernels, {sum(e.device_time_total for e in events):.0f} us in all")
    for event in events[:14]:
        print(f"  {event.device_time_total:9.1f} us  {event.count:4} x  {event.key[:90]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    parser.add_argument("--impl", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    Way.add_options(parser)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if lacks_gpu("decode"):
        return 5
    rows: list[dict[str, object]] = []
    way = Way.of(arguments)
    where = environment(arguments.seed)
    settings = {"prompt": PROMPT, "new_tokens": NEW_TOKENS, "layers": arguments.layers, "runs": arguments.runs}
    settings |= asdict(way) | {"own_pdl": os.environ.get("BBB_AO_PDL") != "off"}
    for impl in arguments.impl:
        start = time.perf_counter()
        model, size = build_measured(impl, arguments.layers, arguments.seed)
        built = time.perf_counter() - start
        print(f"{impl}: built in {built:.1f} s, {size['weight_bytes']:,} bytes, {size['bits_per_weight']:.3f} bits")
        for batch in arguments.batch:
            row = measure(model, batch, arguments.runs, arguments.seed, way, arguments.profile)
            print(
                f"{impl:12} batch {batch:3}: {row['tokens_per_second']:9.1f} tokens/s "
                f"({row['low']:.1f} to {row['high']:.1f}), steps alone {row['step_tokens_per_second']:9.1f}, "
                f"prompt {row['prefill_milliseconds']:.1f} ms, compiled in {row['compile_seconds']:.0f} s",
                flush=True,
            )
            rows.append({"impl": impl, **row, **size, **settings, **where})
            # After every row, so that a run that is cut short leaves what it measured.
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
        del model
    print_table(rows)
    return 0


def print_table(rows: list[dict[str, Any]]) -> None:
    """Each row beside bf16 at the same batch, where that was measured."""
    base = {row["batch"]: row["tokens_per_second"] for row in rows if row["impl"] == "bf16"}
    print(f"\n{'impl':12} {'batch':>5} {'tokens/s':>9} {'x bf16':>7} {'weights, GB':>12} {'of expected':>12}")
    for row in rows:
        ratio = f"{row['tokens_per_second'] / base[row['batch']]:.2f}" if row["batch"] in base else "-"
        share = row["weight_bytes"] / row["expected_bytes"]
        print(
            f"{row['impl']:12} {row['batch']:5} {row['tokens_per_second']:9.1f} {ratio:>7} "
            f"{row['weight_bytes'] / 1e9:12.3f} {share:12.4f}"
        )


if __name__ == "__main__":
    sys.exit(main())
