"""The Gluon kernels compile for compute capability 9.0, without a GPU too, to the instructions that they rely on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton's compiler")

SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PTX of each kernel and setting, compiled in a process of its own: here Triton may be its interpreter."""
    folder = tmp_path_factory.mktemp("ptx")
    root = str(SCRIPT.parent.parent.parent)
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, SCRIPT, folder], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: path.read_text() for path in folder.glob("*.ptx")}


def test_every_kernel_and_width_compiles(ptx: dict[str, str]) -> None:
    assert set(ptx) == {
        f"{kind}_{dtype}_{bits}"
        for kind in ("decode", "dynamic", "matmul")
        for dtype, bits in (("bf16", 2), ("bf16", 4), ("bf16", 8), ("fp16", 2))
    }


def test_nothing_lies_in_local_memory(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        assert not re.search(r"\b(ld|st)\.local\b", text), name


def test_decoding_reads_planes_in_16_bytes_and_multiplies_on_tensor_cores(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        if name.startswith("decode"):
            # One block of each lane's columns: 16 products for a tile of 16 rows and a warp's 512 columns, twice over.
            products = len(re.findall(r"mma\.sync\.aligned\.m16n8k16", text))
            assert products == 32, (name, products)
            planes = {"2": 1, "4": 2, "8": 4}[name[-1]]
            wide = len(re.findall(r"ld\.global\.v4\.b32", text))
            assert wide >= 4 * planes, (name, wide)


def test_quantized_activations_multiply_as_integers(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        if name.startswith("dynamic"):
            # Half as many products as of 16-bit floats.
            products = len(re.findall(r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32", text))
            assert products == 16, (name, products)
            assert "mma.sync.aligned.m16n8k16" not in text, name


def test_the_hopper_kernel_multiplies_with_wgmma_and_copies_ahead(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        if name.startswith("matmul"):
            # Eight products of 16 columns a block, two blocks at a time, for each of two groups of warps.
            assert len(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n64k16", text)) == 32, name
            assert "cp.async.bulk.tensor.2d" in text, name
            # The last of a tile's programs sees what the others wrote.
            assert len(re.findall(r"atom\.global\.gpu\.acq_rel\.add\.u32", text)) == 2, name
