"""Quality on a model: train recipes over seeds and write one flat row for each run and width.

    python benchmarks/quality.py tokens --model DIR --data train.jsonl --evaluate test=test.jsonl wikitext2=wiki.txt \\
        --output F
    python benchmarks/quality.py generate --model DIR --tokens F --sequences 2048 --length 1024
    python benchmarks/quality.py run --model DIR --tokens F --experiments rtn 128x512/8:1/4:1/2:2/split=0.17 --jobs 16
    python benchmarks/quality.py run --model DIR --tokens F --experiments @benchmarks/ablations/w2a16.txt --jobs 16
    python benchmarks/quality.py table

`tokens` needs the whole package; the others neither pydantic nor datasets, so that they work on a bare GPU machine.
Lines of experiments are those of `experiment_lines.py`. `run` writes as each run ends and passes over runs whose rows
are there already at this commit, so that the same command continues what was cut off. Where there is no checkout, the
environment variable COMMIT names the commit.
"""

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from environment import commit, environment
from experiment_lines import REFERENCES, method_of, parse_recipe
from safetensors.torch import load_file, save_file

from bbb_ao.convert import convert_model
from bbb_ao.grid import Grid, fake_quantize_weight, group
from bbb_ao.kernels import derive_zero_point, group_range
from bbb_ao.passes import block_linears, find_blocks
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.compress import train
from bbb_ao.recipes.evaluate import perplexity
from bbb_ao.recipes.generation import PROMPT, generate_sequences
from bbb_ao.recipes.stages import Recipe, Stage
from bbb_ao.storage import footprint

RESULTS = "benchmarks/results/quality.json"
# What a checkpoint of several widths is measured at.
NESTED = (8, 6, 4, 3, 2)


def write_tokens(arguments: argparse.Namespace) -> None:
    """Tokenize calibration and evaluation text into one safetensors file."""
    from bbb_ao.recipes.data import evaluation_windows
    from bbb_ao.recipes.loading import load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    tensors = {"calibration": evaluation_windows(tokenizer, arguments.data, 128).flatten().to(torch.int32)}
    for item in arguments.evaluate:
        name, equals, path = item.partition("=")
        windows = evaluation_windows(tokenizer, path or name, arguments.window)
        tensors[f"evaluate.{name if equals else Path(name).stem}"] = windows.to(torch.int32)
    save_file(tensors, arguments.output)


def write_generated(arguments: argparse.Namespace) -> None:
    """Let the full-precision model write sequences, seeded, and put them into the token file as "generated"."""
    device, model = default_device(), load_model(arguments.model)
    tokens = load_file(arguments.tokens)
    start = time.perf_counter()
    prompts, given = draw(tokens["calibration"], arguments.sequences, arguments.length, arguments.seed), PROMPT
    if arguments.from_start:
        prompts, given = torch.full_like(prompts, model.config.bos_token_id), 1
    written = generate_sequences(
        model, prompts, arguments.sequences, arguments.seed, device, arguments.batch, prompt=given
    )
    tokens["generated"] = written.to(torch.int32)
    save_file(tokens, arguments.tokens)
    print(f"{written.numel()} tokens generated in {time.perf_counter() - start:.0f} s, seed {arguments.seed}")


def draw(ids: torch.Tensor, count: int, length: int, seed: int) -> torch.Tensor:
    """`count` sequences of one text, drawn by a seed (all there are, if fewer): int64 [sequences, length]."""
    available = ids.numel() // length
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return ids[: available * length].view(available, -1)[order].long()


def reference(name: str, model: Any) -> Any:
    """An untrained model: full precision, or round to nearest on the plain integer grid.

    The latter is the literature's: s = (max - min) / 3, float32 scales, codes at 2 bits directly, no nesting.
    """
    student = copy.deepcopy(model)
    if name == "rtn-integer-float32":
        grid = Grid("integer", zero_point_bits=2, scale_format="float32", parent_bits=2)
        for _, block in find_blocks(student):
            for linear in block_linears(block):
                weight = block.get_parameter(f"{linear}.weight").data
                low, high = group_range(group(weight, grid.group_size))
                scale = (high - low) / 3
                zero_point = derive_zero_point(low, high, scale, half_step=False, zero_point_bits=2)
                weight.copy_(fake_quantize_weight(weight, scale, zero_point, 2, grid))
    return student


def train_line(
    name: str, recipe: Recipe, model: Any, tokens: dict[str, torch.Tensor], device: torch.device
) -> tuple[Any, dict[str, Any]]:
    """The student of a line, and what its training says for the row."""
    if name in REFERENCES:
        return reference(name, model), {"calibration_tokens": 0, "generated_tokens": 0, "last_losses": []}
    sequences = draw(tokens["calibration"], recipe.sequences, recipe.sequence_length, recipe.seed)
    written = None
    if recipe.generated and "generated" in tokens:
        written = draw(tokens["generated"].flatten(), recipe.generated, recipe.sequence_length, recipe.seed)
    result = train(model, sequences, recipe, device, generated=written)
    trained = any(stage.epochs for stage in recipe.stages)
    return result.model, {
        "calibration_tokens": sequences.numel() if trained else 0,
        "generated_tokens": recipe.generated * recipe.sequence_length,
        "last_losses": [[fit.last_loss for fit in fits] for fits in result.fits],
    }


def run_one(
    name: str, seed: int, model: Any, tokens: dict[str, torch.Tensor], device: torch.device
) -> list[dict[str, Any]]:
    """Train one line with one seed and measure it: a row for each width of its last stage, and those between them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    recipe = Recipe(name=name, stages=(Stage(),)) if name in REFERENCES else parse_recipe(name, seed)
    student, facts = train_line(name, recipe, model, tokens, device)
    shared = facts | {
        "seconds": time.perf_counter() - start,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        **environment(seed),
    }
    last, rows = recipe.stages[-1], []
    between = [width for width in NESTED if last.narrowest <= width < last.widths[0]]
    student.to(device)
    for width in sorted({*last.widths, *between}, reverse=True):
        set_training_bits(student, width, last.act_bits)
        labels = {"method": method_of(name), "recipe": name, "weight_bits": width, "act_bits": last.act_bits}
        rows.append({**labels, **measure(student, tokens, device), "bits_per_weight": None, **shared})
    # float32 scales, of studies, have no packed form.
    if name not in REFERENCES and recipe.grid.scale_format == "e4m3":
        packed = convert_model(student.cpu(), last.widths[0])
        for row in rows:
            row["bits_per_weight"] = footprint(packed, row["weight_bits"]).bits_per_weight
    return rows


def measure(model: Any, tokens: dict[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    """`NAME_ppl` of every text of a token file; `model` is on `device`."""
    return {
        f"{key.removeprefix('evaluate.')}_ppl": perplexity(model, windows.long(), 8, device)
        for key, windows in tokens.items()
        if key.startswith("evaluate.")
    }


def run(arguments: argparse.Namespace) -> None:
    """Run line by line in this process; results are appended to the output after each."""
    device, model = default_device(), load_model(arguments.model)
    tokens, label = load_file(arguments.tokens), Path(arguments.tokens).name
    output = Path(arguments.output)
    rows = read_rows(output)
    for name, seed in pending_runs(rows, arguments.experiments, arguments.seeds, label):
        found = [row | {"tokens": label} for row in run_one(name, seed, model, tokens, device)]
        for row in found:
            figures = " ".join(f"{key} {value:.3f}" for key, value in row.items() if key.endswith("_ppl"))
            print(f"{name:40} W{row['weight_bits']} seed {seed} {figures} {row['seconds']:.0f} s", flush=True)
        rows = write_rows(output, rows, found)


def run_in_parallel(arguments: argparse.Namespace) -> None:
    """`run` with one process for each line and seed, `jobs` at a time: small models leave a GPU idle.

    A run that takes longer than `timeout` seconds, or is not done `deadline` seconds after the start, is ended and
    leaves no rows; the others' rows are written as they come.
    """
    output, start = Path(arguments.output), time.monotonic()
    rows = read_rows(output)
    pending = pending_runs(rows, arguments.experiments, arguments.seeds, Path(arguments.tokens).name)
    variables = os.environ | {"COMMIT": commit()}
    variables.setdefault("OMP_NUM_THREADS", "1")
    gpus = itertools.cycle(visible_gpus())
    running: list[tuple[subprocess.Popen, Path, str, float]] = []
    try:
        while running or (pending and time.monotonic() - start < arguments.deadline):
            while pending and len(running) < arguments.jobs:
                name, seed = pending.pop(0)
                part = output.with_suffix(f".{os.getpid()}-{len(pending)}.part")
                command = [sys.executable, __file__, "run", "--model", arguments.model, "--tokens", arguments.tokens]
                command += ["--experiments", name, "--seeds", str(seed), "--output", str(part)]
                process = subprocess.Popen(command, env=variables | next(gpus))
                running.append((process, part, f"{name} seed {seed}", time.monotonic()))
            time.sleep(0.2)
            for item in running[:]:
                process, part, label, begun = item
                now = time.monotonic()
                late = now - begun > arguments.timeout or now - start > arguments.deadline
                if late and process.poll() is None:
                    process.kill()
                    process.wait()
                    print(f"{label}: ended after {now - begun:.0f} s, not done", flush=True)
                if process.poll() is not None:
                    running.remove(item)
                    if process.returncode > 0:
                        print(f"{label}: failed with code {process.returncode}", flush=True)
                    rows = write_rows(output, rows, read_rows(part))
                    part.unlink(missing_ok=True)
    finally:
        for process, part, *_ in running:
            process.kill()
            process.wait()
            part.unlink(missing_ok=True)
    if pending:
        print(f"{len(pending)} runs were not started; run the same command again", flush=True)


def visible_gpus() -> list[dict[str, str]]:
    """For each GPU that this process may use the environment of one that uses it alone; without a GPU nothing."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in named.split(",") if name] or [{}]


def run_of(row: dict[str, Any]) -> tuple[str, int, str | None]:
    """What tells runs apart: line, seed and name of the token file."""
    return row["recipe"], row["seed"], row.get("tokens")


def pending_runs(
    rows: list[dict[str, Any]], lines: Sequence[str], seeds: Sequence[int], tokens: str
) -> list[tuple[str, int]]:
    """The (line, seed) pairs that have no row of this commit yet, seed by seed; a reference has no seeds."""
    present = commit()
    done = {run_of(row) for row in rows if row["commit"] == present}
    wanted = [(line, seed) for seed in seeds for line in lines if line not in REFERENCES or seed == seeds[0]]
    return [pair for pair in dict.fromkeys(wanted) if (*pair, tokens) not in done]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def write_rows(path: Path, rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write `found` in the place of older rows of the same runs, in one step, and return all rows."""
    again = set(map(run_of, found))
    rows = [row for row in rows if run_of(row) not in again] + found
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(path)
    return rows


def print_table(arguments: argparse.Namespace) -> None:
    """Means over the seeds as Markdown, with the spread (largest minus smallest) behind the first figure."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(Path(arguments.output)):
        groups[row["recipe"], row.get("tokens"), row["weight_bits"], row["act_bits"]].append(row)
    print("| recipe | text | W, A | test | spread | WikiText-2 | bits per weight | seeds | seconds | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (recipe, tokens, bits, act_bits), rows in groups.items():
        test = [row["test_ppl"] for row in rows]
        cells = [
            recipe,
            tokens or "-",
            f"{bits}, {act_bits or 16}",
            f"{sum(test) / len(test):.2f}",
            f"{max(test) - min(test):.2f}",
            _mean(rows, "wikitext2_ppl", ".2f"),
            _mean(rows, "bits_per_weight", ".3f"),
            str(len(rows)),
            _mean(rows, "seconds", ".0f"),
            _mean(rows, "peak_bytes", ".2f", 2**30),
        ]
        print(f"| {' | '.join(cells)} |")


def _mean(rows: list[dict[str, Any]], key: str, form: str, unit: float = 1) -> str:
    values = [row[key] / unit for row in rows if row.get(key) is not None]
    return format(sum(values) / len(values), form) if values else "-"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(directory: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


class Parser(argparse.ArgumentParser):
    """Takes arguments from a file named @FILE: one a line, without what follows a #."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(fromfile_prefix_chars="@", **settings)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return arg_line.partition("#")[0].split()


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(required=True)
    tokens = commands.add_parser("tokens", help="tokenize text for `run`")
    tokens.add_argument("--model", required=True)
    tokens.add_argument("--data", required=True, nargs="+")
    tokens.add_argument("--evaluate", required=True, nargs="+", help="FILE or NAME=FILE")
    tokens.add_argument("--window", type=int, default=1024)
    tokens.add_argument("--output", required=True)
    tokens.set_defaults(function=write_tokens)
    generate = commands.add_parser("generate", help="let the full-precision model write text into the token file")
    generate.add_argument("--model", required=True)
    generate.add_argument("--tokens", required=True)
    generate.add_argument("--sequences", type=int, required=True)
    generate.add_argument("--length", type=int, default=1024)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--from-start", action="store_true", help="without a prompt of calibration text")
    generate.add_argument("--batch", type=int, default=256, help="sequences at a time")
    generate.set_defaults(function=write_generated)
    runs = commands.add_parser("run", help="train and measure")
    runs.add_argument("--model", required=True)
    runs.add_argument("--tokens", required=True)
    runs.add_argument("--experiments", nargs="+", required=True, help="references, or lines of experiment_lines.py")
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runs.add_argument("--output", default=RESULTS)
    runs.add_argument("--jobs", type=int, default=1, help="processes at a time")
    runs.add_argument("--timeout", type=float, default=float("inf"), help="seconds for one run, with --jobs")
    runs.add_argument("--deadline", type=float, default=float("inf"), help="seconds for all of them, with --jobs")
    runs.set_defaults(function=lambda given: run_in_parallel(given) if given.jobs > 1 else run(given))
    table = commands.add_parser("table", help="means over seeds, as Markdown")
    table.add_argument("--output", default=RESULTS)
    table.set_defaults(function=print_table)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
