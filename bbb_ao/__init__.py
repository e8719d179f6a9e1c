"""bbb_ao: progressive block-wise quantization-aware training and nested low-bit deployment (Xu et al., ACL 2026).

    from bbb_ao import quantize_, bitbybit_qat
    quantize_(model, bitbybit_qat(bits=2))

After `import bbb_ao`, `AutoModelForCausalLM.from_pretrained(directory, bits=4)` opens packed checkpoints.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives; modules are imported on first use, so that the command line answers quickly.
_HOMES = {
    "BitByBitConfig": "bbb_ao.huggingface",
    "BitByBitError": "bbb_ao.errors",
    "BitByBitQATConfig": "bbb_ao.quantize",
    "Grid": "bbb_ao.grid",
    "PackedLinear": "bbb_ao.packed_linear",
    "QATLinear": "bbb_ao.qat_linear",
    "at_bits": "bbb_ao.speculation",
    "bitbybit_qat": "bbb_ao.quantize",
    "compress": "bbb_ao.recipes.compress",
    "convert_model": "bbb_ao.convert",
    "export_dense": "bbb_ao.checkpoint",
    "footprint": "bbb_ao.storage",
    "fuse_projections": "bbb_ao.passes.fuse_projections",
    "merge_channels": "bbb_ao.splitting",
    "pack_head": "bbb_ao.packed_head",
    "quantize_": "bbb_ao.quantize",
    "save_packed": "bbb_ao.checkpoint",
    "set_bits": "bbb_ao.packed_linear",
    "speculate": "bbb_ao.speculation",
    "split_channels": "bbb_ao.splitting",
    "unfuse_projections": "bbb_ao.passes.fuse_projections",
}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from bbb_ao.checkpoint import export_dense as export_dense
    from bbb_ao.checkpoint import save_packed as save_packed
    from bbb_ao.convert import convert_model as convert_model
    from bbb_ao.errors import BitByBitError as BitByBitError
    from bbb_ao.grid import Grid as Grid
    from bbb_ao.huggingface import BitByBitConfig as BitByBitConfig
    from bbb_ao.packed_head import pack_head as pack_head
    from bbb_ao.packed_linear import PackedLinear as PackedLinear
    from bbb_ao.packed_linear import set_bits as set_bits
    from bbb_ao.passes.fuse_projections import fuse_projections as fuse_projections
    from bbb_ao.passes.fuse_projections import unfuse_projections as unfuse_projections
    from bbb_ao.qat_linear import QATLinear as QATLinear
    from bbb_ao.quantize import BitByBitQATConfig as BitByBitQATConfig
    from bbb_ao.quantize import bitbybit_qat as bitbybit_qat
    from bbb_ao.quantize import quantize_ as quantize_
    from bbb_ao.recipes.compress import compress as compress
    from bbb_ao.speculation import at_bits as at_bits
    from bbb_ao.speculation import speculate as speculate
    from bbb_ao.splitting import merge_channels as merge_channels
    from bbb_ao.splitting import split_channels as split_channels
    from bbb_ao.storage import footprint as footprint


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bbb_ao' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def _is_command_line() -> bool:
    """Whether `bbb-ao` or a module of this package is starting; argv[0] is "-m" while a package is imported for it."""
    program = Path(sys.argv[0] if sys.argv else "").name
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if program == "-m" and "-m" in sys.orig_argv else []
    return program == "bbb-ao" or any(name.partition(".")[0] == "bbb_ao" for name in module)


# Registering with transformers imports torch: the command line does that only when a command needs it.
if not _is_command_line():
    importlib.import_module("bbb_ao.huggingface")
