"""`matmul_kernel` with the columns of a tile shared out over programs, at every tile and many counts of programs.

Against float64 with the bound of `test_packed_linear.check`; equal bits from run to run; counters whose lower
bits are left at zero, which the next launch relies on, also where two graphs replay side by side.
"""

from dataclasses import replace

import pytest
import torch
from packed_case import Case, make_case, random_x, row_exponents

from .test_packed_linear import call, check, moved

pytest.importorskip("triton", reason="the kernel is written in Gluon")
pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PROGRAMS = (0, 1, 2, 3, 5, 7, 16, 100)


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def use(choice: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from bbb_ao.kernels.packed_linear import launch

    monkeypatch.setattr(launch, "settings_for", lambda *_: choice)


def wide_case(seed: int, features: int = 1152) -> Case:
    case = make_case(seed, features, 4, True, 300)
    return replace(case, exponent=torch.tensor(-12, dtype=torch.int32))


@pytest.mark.parametrize(("size", "groups"), [(16, 2), (32, 2), (64, 2), (64, 3), (128, 2), (128, 3), (256, 2)])
def test_every_share_of_the_columns_gives_the_product(size: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for turn, programs in enumerate(PROGRAMS):
        step = 1 + turn // 2 % 2
        use((size, programs, step, groups), monkeypatch)
        bits, dtype = (2, 4, 8)[turn % 3], (torch.bfloat16, torch.float16)[turn % 2]
        case = wide_case(turn, 1152 if step == 1 else 1280)
        if turn % 2:
            case = row_exponents(case)
        bias = random_x(turn, (300,), dtype=dtype) if turn % 4 == 0 else None
        for m in (9, size, size + 1, 2 * size + 5):
            x = random_x(m, (m, case.in_features), dtype=dtype)
            y = check(case, x, bits, DEVICE, bias)
            for _ in range(3):
                assert torch.equal(call(case, x.cuda(), bits, None if bias is None else bias.cuda()), y.cuda())


def test_graphs_of_one_capturing_stream_replay_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from bbb_ao.kernels import packed_linear

    use((64, 60, 1, 2), monkeypatch)
    case = wide_case(1)
    operands, settings = moved(case.operands(2), DEVICE), case.settings(2)
    xs = [random_x(seed, (130, case.in_features), dtype=torch.bfloat16).cuda() for seed in (1, 2)]
    with torch.no_grad():
        wanted = [packed_linear(x, *operands, None, *settings) for x in xs]  # type: ignore[arg-type]
        graphs, results = [torch.cuda.CUDAGraph() for _ in xs], []
        for graph, x in zip(graphs, xs, strict=True):
            with torch.cuda.graph(graph):
                results.append([packed_linear(x, *operands, None, *settings) for _ in range(50)])  # type: ignore[arg-type]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for y, repeated in zip(wanted, results, strict=True):
        assert all(torch.equal(each, y) for each in repeated)


@pytest.mark.parametrize("size", [16, 64])
def test_counters_count_the_times_that_all_came(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from bbb_ao.kernels.packed_linear.counts import lasting_counts

    use((size, 50, 1, 2), monkeypatch)
    case = wide_case(2)
    x = random_x(2, (size, case.in_features), dtype=torch.bfloat16).cuda()
    call(case, x, 2)
    first = lasting_counts("warpgroup", 1, torch.cuda.current_device()).clone()
    call(case, x, 2)
    second = lasting_counts("warpgroup", 1, torch.cuda.current_device())
    assert not (second & 0xFFFF).any()
    # Three tiles of two groups each, all of them shared.
    assert ((second - first) == 1 << 16).sum() == 6
    assert (second != first).sum() == 6


# Programs with 6, 2, 3, 4, 4 and 1 of the 9 blocks of a tile: two to nine programs a tile, one to four owners.
@pytest.mark.parametrize(
    ("size", "programs", "groups"),
    [(16, 60, 2), (64, 54, 2), (64, 36, 2), (64, 27, 2), (128, 9, 3), (256, 27, 2)],
)
def test_a_program_that_gives_up_waiting_leaves_its_work_to_the_last(
    size: int, programs: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bbb_ao.kernels.packed_linear import launch
    from bbb_ao.kernels.packed_linear.counts import lasting_counts

    case = wide_case(3)
    use((size, programs, 1, groups), monkeypatch)
    # Two inputs in turn, so that a part of the launch before is a wrong one.
    xs = [random_x(seed, (200, case.in_features), dtype=torch.bfloat16).cuda() for seed in (3, 4)]
    wanted = [check(case, x.cpu(), 2, DEVICE).cuda() for x in xs]
    for polls in (0, 1, 2, 3, 5, 64):
        monkeypatch.setattr(launch, "POLLS", polls)
        for _ in range(5):
            for x, y in zip(xs, wanted, strict=True):
                assert torch.equal(call(case, x, 2), y), polls
        counters = lasting_counts("warpgroup", 1, torch.cuda.current_device())
        assert not (counters & 0xFFFF).any(), polls
