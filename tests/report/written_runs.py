"""Runs as `bbb-ao train` and `bbb-ao eval` leave them, written without training."""

import json
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]
STAGES = ("w8a16", "w2a16", "w2a16 model")
LAYERS = (("self_attn.q_proj", "self_attn.k_proj"), ("mlp.down_proj",))
VERSIONS = {"python": "3.12.1", "bbb_ao": "0.1.0", "torch": "2.13.0"}


def log_lines(blocks: int = 3, splits: bool = True) -> Lines:
    """A finished run of three stages."""
    names = [f"model.layers.{block}" for block in range(blocks)]
    lines: Lines = [
        {
            "event": "run",
            "command": "bbb-ao train model --data text.jsonl --recipe smoke --output out",
            "model": "model",
            "recipe": "schema: 1\nname: smoke\n",
            "sequences": [16, 256],
            "device": "cpu, x86_64, 1 threads",
            "versions": VERSIONS,
        },
        {"event": "plan", "blocks": blocks, "plan": "..."},
    ]
    for block, name in enumerate(names):
        for number, group in enumerate(LAYERS):
            before = [8.0 + block + number, 4.0, 1.0, 0.5]
            lines.append(
                {
                    "event": "channels",
                    "block": block,
                    "layers": [f"{name}.{layer}" for layer in group],
                    "metric": "joint",
                    "channels": 64,
                    "split": 4 if splits else 0,
                    "outliers_before": 3,
                    "outliers_after": 1 if splits else 3,
                    "ranks": [1, 2, 32, 64],
                    "before": before,
                    "after": [before[0] / 2, 3.5, 1.0, 0.5] if splits else before,
                }
            )
    for when, factor in (("before", 1.0), ("after", 0.5)):
        errors = {
            f"{name}.{layer}": factor * 0.01 * (block + 1)
            for block, name in enumerate(names)
            for group in LAYERS
            for layer in group
        }
        lines.append({"event": "layers", "when": when, "errors": errors})
    memory = {"host_peak_bytes": 2**30, "device_peak_bytes": None}
    lines.append({"event": "prepared", "phase_seconds": 9.5, **memory})
    for number, stage in enumerate(STAGES):
        parts = [stage] if stage.endswith(" model") else names
        lines.append({"event": "stage", "stage": number, "name": stage, "blocks": len(parts)})
        for block, name in enumerate(parts):
            losses = {"first_loss": 0.002 * 10**number, "last_loss": 0.001 * 10**number * (block + 1)}
            lines.append({"event": "block", "block": block, "name": name, "steps": 4, "how": "eager", **losses})
        lines.append({"event": "stage_done", "stage": number, "phase_seconds": 61.0, **memory})
    lines.append({"event": "saved", "bits_per_weight": 2.66, "phase_seconds": 0.5, **memory})
    return [{"seconds": float(second), **line} for second, line in enumerate(lines)]


def evaluation_lines() -> Lines:
    """Two widths of a run that read the same bytes, and one narrower, with baselines and a task."""
    shared = {"tokens": 100, "windows": 4, "window": 26, "data": "held_out.jsonl"}
    made = {"backend": "bbb_ao", "batch": 4, "device": "cpu", "versions": VERSIONS}
    figures: list[tuple[str, int | None, float | None, float]] = [
        ("checkpoint", 2, 2.66, 10.25),
        ("checkpoint", 3, 4.78, 8.9),
        ("checkpoint", 4, 4.78, 8.75),
        ("full_precision", None, None, 8.5),
        ("round_to_nearest", 2, 2.375, 55.5),
        ("round_to_nearest", 4, 4.375, 8.8),
    ]
    lines: Lines = [
        {"of": of, "bits": b, "bits_per_weight": read, "ppl": p, **shared, **made} for of, b, read, p in figures
    ]
    task = {"task": "copy", "metric": "acc,none", "value": 0.75, "stderr": None, "samples": 40}
    return [*lines, {"bits": 2, **task, "backend": "lm-eval hf", "batch": 4, "versions": VERSIONS}]


def write_lines(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
