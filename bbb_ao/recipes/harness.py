"""Tasks of lm-evaluation-harness on a loaded model: local task files and data, every figure with what made it."""

import platform
from collections.abc import Sequence
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bbb_ao import __version__
from bbb_ao.errors import DataError, ResourceError

BACKEND = "lm-eval hf"


def check_harness(folder: str | Path) -> None:
    """Refuse what can be refused before a model is opened.

    Raises:
        ResourceError: lm-eval is not installed. DataError: `folder` is no folder with task files.
    """
    try:
        import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ResourceError(
            f"lm-eval: expected it for --tasks, got: {error}; fix: pip install 'bbb-ao[eval]'"
        ) from None
    if not any(Path(folder).rglob("*.yaml")):
        raise DataError(f"{folder}: tasks: expected a folder with .yaml task files, got none; fix: check --task-dir")


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    folder: str | Path,
    batch_size: int,
    limit: int | None,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Run tasks by name and return a flat row for each metric.

    lm-eval runs Python code that a task file names (`!function`), so `folder` must be trusted like code.

    Args:
        folder: searched for task files, and the working directory while they run, so that their data may be named
            relative to it.
        limit: documents of each task; None for all.
    Returns:
        rows with task, metric, value, stderr (None where there is none), samples, task_version, backend, batch and
        versions.
    Raises:
        DataError: a task that the folder does not have, or whose data cannot be read.
    """
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=str(Path(folder).resolve()), include_defaults=False)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        have = ", ".join(sorted(manager.all_tasks)) or "none"
        raise DataError(f"{folder}: tasks: expected one of {have}, got {unknown[0]!r}; fix: change --tasks")
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(device))
    try:
        with chdir(folder):
            found: Any = simple_evaluate(
                harness, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(
            f"{folder}: tasks: expected ones that lm-eval runs, got: {reason}; fix: correct them"
        ) from error
    shared = {"backend": BACKEND, "batch": batch_size, "versions": versions()}
    return [
        {
            "task": task,
            "metric": metric,
            "value": value,
            "stderr": _number(results.get(_stderr(metric))),
            "samples": found["n-samples"][task]["effective"],
            "task_version": found["versions"][task],
            **shared,
        }
        for task, results in found["results"].items()
        for metric, value in results.items()
        if _number(value) is not None and "_stderr" not in metric and task in found["n-samples"] and "," in metric
    ]


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    packages = {name: version(name) for name in ("lm_eval", "torch", "transformers")}
    return {"python": platform.python_version(), "bbb_ao": __version__, **packages}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _stderr(metric: str) -> str:
    # "acc,none" has its standard error under "acc_stderr,none".
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"
