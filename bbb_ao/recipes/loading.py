"""Opening a checked directory: every failure of transformers becomes one line, and nothing is filled in silently."""

import logging
from pathlib import Path
from typing import Any

import torch

from bbb_ao.errors import BitByBitError, ModelError, ResourceError
from bbb_ao.modeldir import check_weights

# Exceptions of a damaged or unknown checkpoint; anything else is a bug and stays one.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)


def choose_device(name: str | None = None) -> torch.device:
    """The device asked for, or CUDA where there is one, else the CPU.

    Raises:
        ResourceError: no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ResourceError(f"device: expected cpu or cuda, got {name!r}; fix: use cpu") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= count:
        raise ResourceError(f"device: expected one of this machine, got {name!r}; fix: use cpu")
    return device


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a local directory.

    Raises:
        ModelError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the Rust tokenizer raises bare Exception
        raise refused_by_transformers(directory, "tokenizer", error) from error


def load_model(directory: str | Path, dtype: torch.dtype | str = "auto", budget_gb: float | None = None) -> Any:
    """The causal language model of a directory that `check_model_directory` passed, in evaluation mode, on the CPU.

    Args:
        dtype: of everything that is not packed; "auto" as stored.
        budget_gb: of a packed checkpoint; see `bbb_ao.budget.fit_budget`.
    Raises:
        ModelError: it cannot be built or loaded, a tensor is missing, or a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    # Registers the quantizer, which `import bbb_ao` leaves out for the command line.
    import bbb_ao.huggingface  # noqa: F401

    if logging.root.manager.disable >= logging.WARNING:
        transformers_logging.disable_progress_bar()
    try:
        budget = {} if budget_gb is None else {"budget_gb": budget_gb}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True, **budget
        )
        model, report = loaded
    except LOADING_ERRORS as error:
        if isinstance(error, BitByBitError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise refused_by_transformers(directory, "model", error) from error
    # transformers fills what is missing with random values and only warns.
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{directory}: weights: expected every tensor, got {len(missing)} missing, first {missing[0]}; "
            "fix: download or save the model again"
        )
    if getattr(model, "is_quantized", False) and (surplus := sorted(report["unexpected_keys"])):
        raise ModelError(
            f"{directory}: weights: expected the model's tensors only, got {len(surplus)} more, first {surplus[0]}; "
            "fix: save the model again"
        )
    check_weights(model)
    return model.eval()


def refused_by_transformers(directory: str | Path, what: str, error: Exception) -> ModelError:
    """Its error for one of a directory's parts, as one line."""
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return ModelError(
        f"{directory}: {what}: expected one that transformers loads, got: {reason}; fix: restore the files"
    )
