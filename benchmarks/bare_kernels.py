"""`bbb_ao.kernels` alone: the front of the package needs torchao and transformers, which its kernels do not."""

import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if "bbb_ao" not in sys.modules:
    _package = types.ModuleType("bbb_ao")
    _package.__path__ = [str(ROOT / "bbb_ao")]
    sys.modules["bbb_ao"] = _package

kernels = importlib.import_module("bbb_ao.kernels")
