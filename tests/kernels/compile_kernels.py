"""Writes PTX of packed layers' kernels for compute capability 9.0 into a folder: python compile_kernels.py FOLDER."""

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from bbb_ao.kernels.fake_quantize.row_kernel import gathered_rows_kernel
from bbb_ao.kernels.packed_linear import launch
from bbb_ao.kernels.packed_linear.decode import decode_kernel
from bbb_ao.kernels.packed_linear.few_rows import few_rows_kernel
from bbb_ao.kernels.packed_linear.warpgroup import matmul_kernel
from bbb_ao.kernels.packed_linear_dynamic.decode import dynamic_decode_kernel
from bbb_ao.kernels.packed_norm.decode import normed_decode_kernel

CODES = {"ZB": 4, "H": 0.5, "EXPONENTS": False, "BIASED": True, "PDL": True}


def ptx(
    kernel, signature: dict[str, str], constants: dict[str, object], warps: int, source: type = GluonASTSource
) -> str:
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] in "*i"}
    values = {(names.index(name),): value for name, value in constants.items()}
    made = source(kernel, types, values, aligned)
    compiled = triton.compile(made, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return f"// {compiled.metadata.shared} bytes of shared memory\n{compiled.asm['ptx']}"


def decode_signature(dtype: str) -> dict[str, str]:
    signature = dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("high_ptr", "mid_ptr", "low_ptr", "scale_ptr", "zero_ptr"), "*u8")
    return signature | {"exponent_ptr": "*i32", "index_ptr": "*i32", "in_features": "i32", "N": "i32", "fresh": "i32"}


def decode_constants(bits: int) -> dict[str, object]:
    shape = {"NB": 16, "M": 1, "TILES": 2, "WARPS": 4, "AHEAD": 2}
    return {**CODES, **shape, "R": bits, "MASK": 2**bits - 1, "INDEXED": False}


def decode(dtype: str, bits: int) -> str:
    return ptx(decode_kernel, decode_signature(dtype), decode_constants(bits), 4)


def few(dtype: str, bits: int) -> str:
    constants = {name: value for name, value in decode_constants(bits).items() if name not in ("M", "AHEAD")}
    return ptx(few_rows_kernel, decode_signature(dtype) | {"M": "i32"}, {**constants, "TILES": 1, "SPAN": 2}, 4)


def residual(dtype: str, bits: int) -> str:
    return _normed(dtype, bits, SQUARES=0, RESIDUAL=True, GATED=False)


def normed(dtype: str, bits: int) -> str:
    return _normed(dtype, bits, SQUARES=128, RESIDUAL=False, GATED=False)


def gated(dtype: str, bits: int) -> str:
    return _normed(dtype, bits, SQUARES=128, RESIDUAL=False, GATED=True)


def _normed(dtype: str, bits: int, **flags: object) -> str:
    signature = decode_signature(dtype) | {"eps": "fp32", "in_squares_ptr": "*fp32", "squares_ptr": "*fp32"}
    signature |= dict.fromkeys(("residual_ptr", "norm_weight_ptr", "weighted_ptr"), f"*{dtype}")
    return ptx(normed_decode_kernel, signature, {**decode_constants(bits), **flags}, 4)


def dynamic(dtype: str, bits: int) -> str:
    constants = {**CODES, "NB": 16, "R": bits, "MASK": 2**bits - 1, "INDEXED": True, "TILES": 1, "WARPS": 4, "AHEAD": 1}
    constants |= {"ACT_BITS": bits, "ACT_HALF": bits != 4}
    return ptx(dynamic_decode_kernel, decode_signature(dtype), constants, 4)


def matmul(dtype: str, bits: int, size: int = 64, groups: int = 2, step: int = 2) -> str:
    kind = gl.bfloat16 if dtype == "bf16" else gl.float16
    x_layout = gl.NVMMASharedLayout.get_default_for([size, 128], kind)
    words = f"tensordesc<i16[64, 16],{gl.NVMMASharedLayout.get_default_for([64, 16], gl.int16)!r}>"
    signature = {
        "x_desc": f"tensordesc<{dtype}[{size}, 128],{x_layout!r}>",
        "bias_ptr": f"*{dtype}",
        "y_ptr": f"*{dtype}",
    }
    signature |= dict.fromkeys(("high_desc", "mid_desc", "low_desc"), words)
    signature |= {
        "scale_ptr": "*u8",
        "zero_ptr": "*u8",
        "exponent_ptr": "*i32",
        "parts_ptr": "*fp32",
        "count_ptr": "*i32",
    }
    signature |= dict.fromkeys(("M", "N", "NB", "SHARE", "polls", "fresh"), "i32")
    constants = {
        **CODES,
        "R": bits,
        "MASK": 2**bits - 1,
        "BM": size,
        "STAGES": launch.pipeline_stages(size, groups, bits, 8),
        "STEP": step,
        "SPLIT": True,
        "GROUPS": groups,
        "REGISTERS": launch.PROGRAMS[size, groups][2],
    }
    return ptx(matmul_kernel, signature, constants, 4)


def smallest(dtype: str, bits: int) -> str:
    return matmul(dtype, bits, 16, 2, 1)


def three(dtype: str, bits: int) -> str:
    return matmul(dtype, bits, 128, 3, 1)


def largest(dtype: str, bits: int) -> str:
    return matmul(dtype, bits, 256, 2, 1)


def rows(dtype: str, bits: int) -> str:
    signature = {"x_ptr": f"*{dtype}", "index_ptr": "*i32", "out_ptr": f"*{dtype}"}
    signature |= dict.fromkeys(("in_features", "groups", "fresh"), "i32")
    flags = {"UP": bits > 4, "HALF": True, "SHORT": True, "INDEXED": True, "PDL": True}
    whole = bits == 2
    sizes = {"GROUP": 32, "COLUMNS": 32, "BLOCK": 128, "PART": 128 if whole else 64, "WHOLE": whole}
    constants = {**flags, "BITS": bits, "SPAN": 2.0**bits, **sizes}
    return ptx(gathered_rows_kernel, signature, constants, 8, ASTSource)


KERNELS = (decode, few, residual, normed, gated, dynamic, matmul, rows)
BUILT = [
    (build, dtype, bits) for build in KERNELS for dtype, bits in (("bf16", 2), ("bf16", 4), ("bf16", 8), ("fp16", 2))
]
# Other tiles of the same kernel, at the widths that take the most shared memory.
BUILT += [(build, "bf16", bits) for build in (smallest, three, largest) for bits in (2, 4)]

if __name__ == "__main__":
    for build, dtype, bits in BUILT:
        (Path(sys.argv[1]) / f"{build.__name__}_{dtype}_{bits}.ptx").write_text(build(dtype, bits))
