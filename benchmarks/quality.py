"""Quality on a model: train recipes over seeds and write one flat row a run.

    python benchmarks/quality.py tokens --model DIR --data train.jsonl --evaluate test.jsonl wiki.txt --output F
    python benchmarks/quality.py run --model DIR --tokens F --experiments rtn 128x512/8:1/4:1/2:2/split=0.17 --jobs 4

`tokens` needs the whole package; `run` neither pydantic nor datasets, so that it works on a bare GPU machine.
"""

import argparse
import copy
import json
import platform
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bbb_ao.convert import convert_model
from bbb_ao.grid import Grid, fake_quantize_weight, group
from bbb_ao.kernels import derive_zero_point, group_range
from bbb_ao.passes import block_linears, find_blocks
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.compress import train
from bbb_ao.recipes.evaluate import perplexity
from bbb_ao.recipes.prepare import round_to_nearest
from bbb_ao.recipes.stages import GridSettings, Recipe, Split, Stage
from bbb_ao.storage import footprint

REFERENCES = ("full-precision", "rtn", "rtn-integer-float32")


def parse_stage(text: str, settings: dict[str, str]) -> Stage:
    """A stage from `[m]bits[a act_bits][*loss weights]:epochs[@lr]`.

    `2:4` is block-wise W2A16, `m2a2:1@2e-4` end-to-end W2A2, `8+4+2*64,8,1:3` joint with loss weights.
    """
    match = re.fullmatch(r"(m?)([\d+]+)(?:a(\d))?(?:\*([\d.,]+))?:([\d.]+)(?:@([\d.e-]+))?", text)
    if match is None:
        raise ValueError(f"stage: expected [m]bits[aBITS][*weights]:epochs[@lr], got {text!r}")
    model, bits, act_bits, weights, epochs, lr = match.groups()
    widths = tuple(int(width) for width in bits.split("+"))
    return Stage(
        scope="model" if model else "block",
        weight_bits=widths if len(widths) > 1 else int(bits),
        act_bits=int(act_bits) if act_bits else None,
        loss_weights=tuple(map(float, weights.split(","))) if weights else None,
        epochs=float(epochs),
        lr=float(lr or settings.get("lr", "3e-4")),
        batch_size=int(settings.get("batch", "4")),
    )


def parse_recipe(text: str, seed: int) -> Recipe:
    """A recipe from a line such as `128x512/8:1/4:1/2:2/lr=3e-4/batch=4/split=0.17/learned_scales=true`.

    First sequences x tokens, then stages; `lr`, `batch` and `split` (the largest ratio) are short forms, any other
    key is a field of the recipe or of its grid.
    """
    size, *parts = text.split("/")
    settings = dict(part.split("=", 1) for part in parts if "=" in part)
    sequences, length = map(int, size.split("x"))
    split = Split(ratio_max=float(settings["split"])) if "split" in settings else None
    recipe = Recipe(
        name=text,
        stages=tuple(parse_stage(part, settings) for part in parts if "=" not in part),
        split=split,
        sequences=sequences,
        sequence_length=length,
        seed=seed,
    )
    for key, value in settings.items():
        if key not in ("lr", "batch", "split"):
            loaded = json.loads(value) if re.fullmatch(r"[\d.e-]+|true|false|null", value) else value
            if key in GridSettings.__dataclass_fields__:
                recipe = replace(recipe, grid=replace(recipe.grid, **{key: loaded}))
            else:
                recipe = replace(recipe, **{key: loaded})
    return recipe


def commit() -> str:
    """The checked-out commit, or "unknown" outside of a checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def write_tokens(arguments: argparse.Namespace) -> None:
    """Tokenize calibration and evaluation text into one safetensors file."""
    from bbb_ao.recipes.data import evaluation_windows
    from bbb_ao.recipes.loading import load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    tensors = {"calibration": evaluation_windows(tokenizer, arguments.data, 128).flatten().to(torch.int32)}
    for path in arguments.evaluate:
        tensors[f"evaluate.{Path(path).stem}"] = evaluation_windows(tokenizer, path, arguments.window).to(torch.int32)
    save_file(tensors, arguments.output)


def draw(ids: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Calibration sequences of a recipe, drawn by its seed: int64 [sequences, sequence_length]."""
    available = ids.numel() // recipe.sequence_length
    order = torch.randperm(available, generator=torch.Generator().manual_seed(recipe.seed))[: recipe.sequences]
    return ids[: available * recipe.sequence_length].view(available, -1)[order].long()


def reference(name: str, model: Any, recipe: Recipe) -> Any:
    """An untrained model: full precision, round to nearest on our grid, or on the plain integer grid.

    The last is the literature's: s = (max - min) / 3, float32 scales, codes at 2 bits directly, no nesting.
    """
    if name == "rtn":
        return round_to_nearest(model, recipe)
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


def run_one(
    name: str, seed: int, model: Any, tokens: dict[str, torch.Tensor], device: torch.device
) -> list[dict[str, Any]]:
    """Train one experiment with one seed and measure it: a row for each width of its last stage."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    recipe = parse_recipe("128x512/2:1" if name in REFERENCES else name, seed)
    if name in REFERENCES:
        student, losses = reference(name, model, recipe), []
    else:
        result = train(model, draw(tokens["calibration"], recipe), recipe, device)
        student, losses = result.model, [[fit.last_loss for fit in fits] for fits in result.fits]
    shared = {
        "seed": seed,
        "calibration_tokens": recipe.sequences * recipe.sequence_length if losses else 0,
        "seconds": time.perf_counter() - start,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "last_losses": losses,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "commit": commit(),
        **versions(),
    }
    last, rows = recipe.stages[-1], []
    student.to(device)
    for width in last.widths:
        set_training_bits(student, width, last.act_bits)
        figures = {
            f"{key.removeprefix('evaluate.')}_ppl": perplexity(student, windows.long(), 8, device)
            for key, windows in tokens.items()
            if key.startswith("evaluate.")
        }
        rows.append({"method": name, "weight_bits": width, "act_bits": last.act_bits, **figures, **shared})
    if losses or name == "rtn":
        packed = convert_model(student.cpu(), last.widths[0])
        for row in rows:
            row["bits_per_weight"] = footprint(packed, row["weight_bits"]).bits_per_weight
    return rows


def run(arguments: argparse.Namespace) -> None:
    """Run experiment by experiment in this process; results are appended to the output after each."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokens = load_file(arguments.tokens)
    output = Path(arguments.output)
    rows = json.loads(output.read_text()) if output.exists() else []
    for seed in arguments.seeds:
        for name in arguments.experiments:
            for row in run_one(name, seed, model, tokens, device):
                rows.append(row)
                figures = " ".join(f"{key} {value:.3f}" for key, value in row.items() if key.endswith("_ppl"))
                print(f"{name:40} W{row['weight_bits']} seed {seed} {figures} {row['seconds']:.0f} s", flush=True)
            output.write_text(json.dumps(rows, indent=1) + "\n")


def run_in_parallel(arguments: argparse.Namespace) -> None:
    """`run` with one process for each experiment and seed, `jobs` at a time: small models leave a GPU idle."""
    output = Path(arguments.output)
    pending = [(name, seed) for seed in arguments.seeds for name in arguments.experiments]
    running: list[tuple[subprocess.Popen, Path]] = []
    finished: list[Path] = []
    while pending or running:
        while pending and len(running) < arguments.jobs:
            name, seed = pending.pop(0)
            part = output.with_suffix(f".{len(pending)}.part")
            command = [sys.executable, __file__, "run", "--model", arguments.model, "--tokens", arguments.tokens]
            command += ["--experiments", name, "--seeds", str(seed), "--output", str(part)]
            running.append((subprocess.Popen(command), part))
        time.sleep(0.2)
        for process, part in [item for item in running if item[0].poll() is not None]:
            running.remove((process, part))
            finished.append(part)
            rows = [row for done in finished if done.exists() for row in json.loads(done.read_text())]
            output.write_text(json.dumps(rows, indent=1) + "\n")
    for part in finished:
        part.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(required=True)
    tokens = commands.add_parser("tokens", help="tokenize text for `run`")
    tokens.add_argument("--model", required=True)
    tokens.add_argument("--data", required=True, nargs="+")
    tokens.add_argument("--evaluate", required=True, nargs="+")
    tokens.add_argument("--window", type=int, default=1024)
    tokens.add_argument("--output", required=True)
    tokens.set_defaults(function=write_tokens)
    runs = commands.add_parser("run", help="train and measure")
    runs.add_argument("--model", required=True)
    runs.add_argument("--tokens", required=True)
    runs.add_argument("--experiments", nargs="+", required=True, help="references, or lines as in parse_recipe")
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runs.add_argument("--output", default="benchmarks/results/quality.json")
    runs.add_argument("--jobs", type=int, default=1, help="processes at a time")
    runs.set_defaults(function=lambda given: run_in_parallel(given) if given.jobs > 1 else run(given))
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
