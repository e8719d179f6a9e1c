"""Kill `bbb-ao train` with SIGKILL, let the same command go on, and compare what it makes, byte by byte.

    python -m benchmarks.kill --kills 100 --boundaries --output benchmarks/results/kill.json

A tiny random model is trained block by block and end to end, at joint widths and on text of its own. `--kills` ends it
at random moments, `--boundaries` before every call that renames, removes, makes a folder or fsyncs. Each killed run may
be killed up to twice more while it goes on. The plan is made once, for all. One row is written: how often it was
killed, how many runs ended with the files of an uninterrupted one, and how many left anything else behind.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import bbb_ao
from bbb_ao import planning
from bbb_ao.cli import main
from benchmarks.environment import environment

RECIPE = """
schema: 1
name: kill
generated: 4
average: 0.5
sequences: 8
sequence_length: 16
micro_batch: 2
split: {ratio_max: 0.3}
lookahead: 1
logits: 1.0
stages:
- {weight_bits: 8, epochs: 1, batch_size: 2}
- {weight_bits: [8, 4, 2], epochs: 1, batch_size: 2, text: both}
- {scope: model, weight_bits: [8, 4, 2], epochs: 1, batch_size: 2, objective: mixed_kl, text: generated}
"""
CALLS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "ftruncate")


def prepare(folder: Path) -> list[str]:
    """A model, text and a recipe in `folder`; the command without its output."""
    tokenizer = AutoTokenizer.from_pretrained(Path(bbb_ao.__file__).parent / "demo" / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(50)))
    (folder / "kill.yaml").write_text(RECIPE)
    files = ["--data", str(folder / "text.jsonl"), "--recipe", str(folder / "kill.yaml")]
    return ["train", str(folder / "model"), *files, "--device", "cpu", "--save-steps", "1"]


def child(work: Callable[[], object], seconds: float | None = None) -> int:
    """Run `work` in a fork of this warm process, killed after so many seconds; its status as from waitpid."""
    number = os.fork()
    if number == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        work()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(number, signal.SIGKILL)
    return os.waitpid(number, 0)[1]


def killed_at(boundary: int, command: list[str]) -> None:
    """Run the command and end this process before the call of that number, from 0."""
    calls = itertools.count()

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if next(calls) == boundary:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    main(command)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def killed_child(boundary: int, command: list[str]) -> int:
    return child(partial(killed_at, boundary, command))


class Trial:
    """Counts how runs in a fresh folder end."""

    def __init__(self, command: list[str], seconds: float, expected: dict[str, str], draw: random.Random) -> None:
        self.command, self.seconds, self.expected, self.draw = command, seconds, expected, draw
        self.runs = self.kills = self.identical = self.leaking = 0

    def run(self, first: Callable[[list[str]], int]) -> bool:
        """Kill a run by `first`, perhaps again, and let it end; whether the first kill hit it."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = [*self.command, "--output", str(folder / "out")]
            hit = first(command) == signal.SIGKILL
            self.kills += hit
            for _ in range(self.draw.randrange(3)):
                self.kills += child(lambda: main(command), self.draw.uniform(0, self.seconds)) == signal.SIGKILL
            child(lambda: main(command))
            self.runs += 1
            found = digests(folder / "out")
            differ = sorted({name for name, _ in found.items() ^ self.expected.items()})
            left = sorted({path.name for path in folder.iterdir()} ^ {"out", "out.log.jsonl"})
            if differ or left:
                print(f"run {self.runs}: expected the files of a run without kills, got others: {differ} {left}")
            self.identical += not differ
            self.leaking += bool(left)
        return hit


def measure(kills: int, boundaries: bool, seed: int) -> dict[str, object]:
    torch.set_num_threads(1)
    # Most of a run's time, and it writes nothing: kills are to hit what comes after it.
    planning.make_plan = cache(planning.make_plan)
    with tempfile.TemporaryDirectory() as name:
        command = prepare(Path(name))
        whole, seconds = [], 0.0
        for number in range(3):
            start = time.perf_counter()
            code = main([*command, "--output", f"{name}/out{number}"])
            assert code == 0, f"run {number} without kills: expected exit code 0, got {code}"
            seconds = time.perf_counter() - start
            whole.append(digests(Path(name) / f"out{number}"))
            shutil.rmtree(Path(name) / f"out{number}")
        draw = random.Random(seed)
        trial = Trial(command, seconds, whole[0], draw)
        for _ in range(kills):
            trial.run(lambda command: child(lambda: main(command), draw.uniform(0, trial.seconds)))
        boundary = 0
        while boundaries and trial.run(partial(killed_child, boundary)):
            boundary += 1
        return {
            "same_without_kills": whole[0] == whole[1] == whole[2],
            "runs": trial.runs,
            "kills": trial.kills,
            "boundaries": boundary,
            "identical": trial.identical,
            "leaking": trial.leaking,
            "run_seconds": round(seconds, 2),
            **environment(seed),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--boundaries", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    row = measure(arguments.kills, arguments.boundaries, arguments.seed)
    text = json.dumps([row], indent=1) + "\n"
    if arguments.output:
        arguments.output.write_text(text)
    print(text)
    sys.exit(row["identical"] != row["runs"] or bool(row["leaking"]) or not row["same_without_kills"])
