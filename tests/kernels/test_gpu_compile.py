"""Kernels of packed layers compile for compute capability 9.0, without a GPU too, to the instructions they rely on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton's compiler")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# Places of each kernel's parameters in PTX: its weight, which a graph does not write, planes first.
DECODE = {"planes": (1, 2, 3), "others": (4, 5, 6)}
MATMUL = {"planes": (5, 10, 15), "others": (20, 21, 22)}
TILES = ("matmul", "smallest", "three", "largest")
CONSTANTS = {
    **dict.fromkeys(TILES, MATMUL),
    "decode": DECODE,
    "few": DECODE,
    "residual": DECODE,
    "normed": DECODE,
    "gated": DECODE,
    "dynamic": DECODE,
    "rows": {"planes": (), "others": ()},
}


def blocks_of(text: str) -> tuple[list[list[str]], dict[str, int]]:
    """(instructions of each basic block, in the order of the text; the block of each label)."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.split("//")[0].strip()
        label = re.match(r"(\$\w+):", line)
        if label:
            blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif line and not line.startswith("."):
            blocks[-1].append(line)
            if re.search(r"\bbrx?\b|\bbra\b|\bret\b", line):
                blocks.append([])
    return blocks, labels


def addresses(lines: list[str], pointers: set[str]) -> dict[str, set[int]]:
    """The kernel's pointers and descriptors that each register is computed from, loaded values aside."""
    roots: dict[str, set[int]] = {}
    for _ in range(3):  # what goes round a loop stands still after two
        for line in lines:
            target, *sources = re.findall(r"%[a-z]+\d+", re.sub(r"^@!?%p\d+", "", line)) or [""]
            if target and not re.search(r"\b(ld|st|atom|cp)\.(?!param)", line):
                found = {int(number) for number in re.findall(r"_param_(\d+)", line) if number in pointers}
                roots[target] = roots.get(target, set()).union(found, *(roots.get(each, set()) for each in sources))
    return roots


def before_waiting(text: str) -> list[tuple[str, set[int]]]:
    """(instruction, parameters of its address) of global memory on a way from the start that passes no wait."""
    blocks, labels = blocks_of(text)
    pointers = set(re.findall(r"\.param .*(?:\.ptr|\.b8) .*_param_(\d+)", text))
    roots = addresses([line for block in blocks for line in block], pointers)
    found, seen, ways = [], set(), [0]
    while ways:
        place = ways.pop()
        if place in seen or place >= len(blocks):
            continue
        seen.add(place)
        ends = False
        for line in blocks[place]:
            if "griddepcontrol.wait" in line:
                ends = True
                break
            if re.search(r"\b(ld|st|atom|red)\.global|cp\.async\.bulk", line):
                inside = re.findall(r"\[([^\]]*)\]", line)
                address = re.findall(r"%rd\d+", inside[1 if "cp." in line else 0])
                found.append((line, roots[address[0]]))
            ways += [labels[label] for label in re.findall(r"\$L_\w+", line)]
            ends = ends or bool(re.match(r"(bra|brx|ret)\b", line))
        if not ends:
            ways.append(place + 1)
    return found


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PTX of each kernel and setting, compiled in a process of its own: here Triton may be its interpreter."""
    folder = tmp_path_factory.mktemp("ptx")
    root = str(SCRIPT.parent.parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, SCRIPT, folder], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: path.read_text() for path in folder.glob("*.ptx")}


def test_every_kernel_and_width_compiles(ptx: dict[str, str]) -> None:
    every = (("bf16", 2), ("bf16", 4), ("bf16", 8), ("fp16", 2))
    expected = {f"{kind}_{dtype}_{bits}" for kind in {*CONSTANTS} - {*TILES[1:]} for dtype, bits in every}
    assert set(ptx) == expected | {f"{kind}_bf16_{bits}" for kind in TILES[1:] for bits in (2, 4)}


def test_tiles_fit_into_the_shared_memory(ptx: dict[str, str]) -> None:
    from bbb_ao.kernels.packed_linear.launch import PROGRAMS, SHARED_BYTES

    for name, programs in (("smallest", PROGRAMS[16, 2][0]), ("three", 1), ("largest", 1)):
        for bits in (2, 4):
            held = int(ptx[f"{name}_bf16_{bits}"].split()[1])
            # A multiprocessor keeps 1 KiB for each program.
            assert 0 < held <= (SHARED_BYTES + 1024) // programs - 1024, (name, bits, held)


def test_nothing_lies_in_local_memory(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        assert not re.search(r"\b(ld|st)\.local\b", text), name


def test_decoding_reads_planes_in_16_bytes_and_multiplies_on_tensor_cores(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        if name.startswith(("decode", "residual", "normed", "gated")):
            # One block of each lane's columns: 16 products for a tile of 16 rows and a warp's 512 columns, twice over,
            # for two tiles.
            products = len(re.findall(r"mma\.sync\.aligned\.m16n8k16", text))
            assert products == 64, (name, products)
            planes = {"2": 1, "4": 2, "8": 4}[name[-1]]
            wide = len(re.findall(r"ld\.global\.v4\.b32", text))
            assert wide >= 8 * planes, (name, wide)


def test_decoding_asks_for_all_that_is_ahead_before_it_waits(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        if name.startswith(("decode", "residual", "normed", "gated")):
            planes = {"2": 1, "4": 2, "8": 4}[name[-1]]
            ahead = text[: text.rindex("griddepcontrol.wait")]
            assert len(re.findall(r"ld\.global\.v4\.b32", ahead)) == 8 * planes, name


def test_a_few_rows_share_a_block_of_the_weight(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        if name.startswith("few"):
            # Two blocks: in each eight products of 16 columns with the weight, and eight with ones.
            products = len(re.findall(r"mma\.sync\.aligned\.m16n8k16", text))
            assert products == 32, (name, products)
            assert "ld.global.v2.b32" in text, name


def test_what_follows_the_products_waits_for_no_memory(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        kind, _, setting = name.partition("_")
        if kind in ("decode", "dynamic", "residual", "normed", "gated"):
            assert "ld.global" not in text[text.rindex("mma.sync") :], name
        if kind in ("residual", "normed", "gated"):
            # The norm of a row is summed within each warp: warps exchange nothing but the products' sums.
            assert text.count("bar.sync") == ptx[f"decode_{setting}"].count("bar.sync"), name


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
            # Arriving at a shared tile and giving up waiting; looking while it waits.
            assert len(re.findall(r"atom\.global\.gpu\.acq_rel\.add\.u32", text)) == 4, name
            assert len(re.findall(r"ld\.global\.gpu\.acquire", text)) == 2, name


def test_only_constants_are_read_before_the_launches_before_are_complete(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        kind, _, bits = name.split("_")
        planes, others = CONSTANTS[kind]["planes"], CONSTANTS[kind]["others"]
        found = before_waiting(text)
        for instruction, parameters in found:
            assert re.search(r"\bld\.global|cp\.async\.bulk\.tensor", instruction), (name, instruction)
            assert parameters, (name, instruction)
            assert parameters <= {*planes, *others}, (name, instruction, parameters)
        # The first tile of each plane that is read, its scales, zero offsets and exponents are under way by then.
        read = set().union(*(parameters for _, parameters in found))
        stored = {"2": 1, "4": 2, "8": 3}[bits]
        assert read == {*planes[:stored], *others}, (name, read)


def test_the_next_launch_may_start_before_this_one_waits(ptx: dict[str, str]) -> None:
    for name, text in ptx.items():
        assert text.count("griddepcontrol.launch_dependents") == 1, name
        if name.split("_")[0] in TILES:
            # There the warp that copies does it, behind its last copy.
            continue
        start, _ = text.split("griddepcontrol.launch_dependents")
        # The wait for a weight that may just have been written is the only one before, and a branch skips it.
        assert start.count("griddepcontrol.wait") == 1, name
        assert not re.search(r"\.global\.|cp\.async", start.split(".entry")[1].split("{", 1)[1]), name
