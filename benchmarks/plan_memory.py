"""Predicted against measured peak memory of training runs, phase by phase.

    python benchmarks/plan_memory.py [--models demo 8b] [--testbed DIR] [--device cpu] [--output FILE]

Each case is a model and a recipe, run by the training engine in a process of its own, behind a short run that loads the
libraries. `predicted_bytes` is what `bbb-ao plan` says. `measured_bytes` is, on a GPU, torch.cuda.max_memory_allocated,
and on a CPU, the peak of resident memory above that before the model was loaded, with all that is freed returned to the
system at once (Linux alone). `8b` is two decoder blocks of Llama-3-8B's shape with random weights and a small
vocabulary, `8b_head` the same with all of its vocabulary; both are left out on a CPU, `testbed` without its directory.
One flat row a phase.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from environment import environment
from transformers import AutoConfig, AutoModelForCausalLM

from bbb_ao.passes import find_blocks
from bbb_ao.planning.job import Job
from bbb_ao.planning.memory import Phase, phases
from bbb_ao.recipes.compress import Silent, pack, train
from bbb_ao.recipes.loader import load_recipe
from bbb_ao.recipes.loading import load_model
from bbb_ao.recipes.skeleton import build_skeleton
from bbb_ao.recipes.stages import Recipe

DEMO = Path(__file__).parent.parent / "bbb_ao" / "demo" / "model"
SHAPE_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARIES = {"8b": 1024, "8b_head": 128256}
SMALL = ("sequences=8", "stages.*.epochs=0.5")
LONG = ("sequences=32", "sequence_length=2048", "stages.*.epochs=1", "stages.*.batch_size=1")
DISTILL = ("stages.2.scope=model", "stages.0.epochs=0", "stages.1.epochs=0")
# What each model is trained with: a name for the row, a recipe, and changes of it.
CASES: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "demo": [
        ("smoke, 32 sequences", "smoke", ("sequences=32", "stages.*.epochs=0.1")),
        ("smoke, 8 sequences", "smoke", SMALL),
        ("w2a2, 8 sequences", "w2a2", (*SMALL, "sequence_length=256", "generated=8")),
        (
            "any_precision, micro-batches",
            "any_precision",
            (*SMALL, "sequence_length=256", "generated=8", "micro_batch=2"),
        ),
        ("end to end", "smoke", (*SMALL, *DISTILL)),
    ],
    "testbed": [
        ("smoke, 32 sequences", "smoke", ("sequences=32", "stages.*.epochs=0.1")),
        ("smoke, 8 sequences", "smoke", SMALL),
        ("w2a16_light, 8 sequences", "w2a16_light", SMALL),
    ],
    "8b": [
        ("smoke", "smoke", LONG),
        ("smoke, micro-batches", "smoke", (*LONG, "stages.*.batch_size=4", "stages.*.epochs=4", "micro_batch=2")),
        ("w2a2", "w2a2_light", (*LONG, "generated=2")),
        ("end to end", "smoke", (*LONG, *DISTILL)),
    ],
    # Logits of the last block's loss.
    "8b_head": [("w2a16_light", "w2a16_light", LONG)],
}


class Peaks(Silent):
    """A reporter that takes the peak of every phase of a run.

    Attributes:
        found: phase -> bytes; the phase before the first stage is "prepare".
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.found: dict[str, int] = {}
        self.phase = "prepare"
        self.start = 0 if device.type == "cuda" else resident("VmRSS")
        self._reset()

    def stage(self, number: int, name: str, blocks: int, done: int = 0) -> None:
        self.next(f"stage {number + 1} {name}")

    def next(self, phase: str) -> None:
        """The phase that ran is over, and another one begins."""
        used = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else resident("VmHWM")
        self.found[self.phase] = used - self.start
        self.phase = phase
        if self.device.type == "cpu":
            # What the phase freed in small pieces.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._reset()

    def _reset(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """VmRSS, the resident memory of this process, or VmHWM, its peak since the last reset; bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run(directory: Path, recipe: Recipe, device: torch.device) -> dict[str, int]:
    """Train with random ids of the recipe's size: phase -> peak bytes."""
    peaks = Peaks(recipe, device)
    config = AutoConfig.from_pretrained(directory)
    if any(directory.glob("*.safetensors")):
        model = load_model(directory)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
    ids = torch.randint(config.vocab_size, (recipe.sequences, recipe.sequence_length))
    result = train(model, ids, recipe, device, peaks)
    peaks.next("pack")
    pack(result.model, model, recipe)
    peaks.next("")
    return peaks.found


def measure(directory: Path, model: str, case: int, device: torch.device, seed: int) -> list[dict[str, Any]]:
    """The rows of one case."""
    name, recipe_name, changes = CASES[model][case]
    recipe = load_recipe(recipe_name, changes)
    torch.manual_seed(seed)
    skeleton = build_skeleton(directory)
    predicted: dict[str, Phase] = {phase.name: phase for phase in phases(Job.prepare(skeleton, recipe, device))}
    if device.type == "cpu":
        run(DEMO, replace(recipe, sequences=2, sequence_length=16), device)
    found = run(directory, recipe, device)
    rows = []
    for phase, measured in found.items():
        parts = ("generate", "verify", "norms", "errors") if phase == "prepare" else (phase,)
        both = [predicted[part] for part in parts if part in predicted]
        expected = max(each.device_bytes if device.type == "cuda" else each.host_bytes for each in both)
        if expected:
            row = {"model": model, "case": name, "phase": phase, "blocks": len(find_blocks(skeleton))}
            rows.append(row | {"predicted_bytes": expected, "measured_bytes": measured, "ratio": expected / measured})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--testbed", type=Path, help="directory of the testbed's model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan_memory.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.case:
        directory, model, case = arguments.case
        print(json.dumps(measure(Path(directory), model, int(case), device, arguments.seed)))
        return
    rows: list[dict[str, Any]] = []
    where = {**environment(arguments.seed), "kind": device.type}
    with tempfile.TemporaryDirectory() as shape:
        directories = {"demo": DEMO, "testbed": arguments.testbed}
        for model, vocabulary in VOCABULARIES.items() if device.type == "cuda" else ():
            directories[model] = Path(shape) / model
            config = AutoConfig.for_model(
                "llama", **SHAPE_8B, num_hidden_layers=2, vocab_size=vocabulary, dtype="bfloat16"
            )
            config.save_pretrained(directories[model])
        for model in arguments.models:
            for case in range(len(CASES[model])) if directories.get(model) else ():
                options = ["--device", device.type, "--seed", str(arguments.seed)]
                command = [sys.executable, __file__, *options, "--case", str(directories[model]), model, str(case)]
                # glibc raises the size from which memory is returned at once, unless it is set.
                process = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "HF_HUB_OFFLINE": "1"}
                done = subprocess.run(command, env=process, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                rows += [row | where for row in found]
                arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
                for row in found:
                    sizes = f"{row['predicted_bytes'] / 1e6:9.1f} {row['measured_bytes'] / 1e6:9.1f} MB"
                    print(f"{model} {row['case']}: {row['phase']:20} {sizes} {row['ratio']:.3f}", flush=True)


if __name__ == "__main__":
    main()
