"""Where there is no GPU, Triton kernels run in Triton's interpreter; it has to be chosen before Triton is imported."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before transformers, which takes benchmarks/kernels.py for the package of that name: it would set up a package without
# its front. Machines for the kernels alone have neither torchao nor transformers.
with contextlib.suppress(ImportError):
    import bbb_ao  # noqa: F401
