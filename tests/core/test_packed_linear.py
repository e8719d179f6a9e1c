"""The packed form against the training form it was made from."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bbb_ao.errors import NumericsError
from bbb_ao.grid import Grid
from bbb_ao.packed_linear import PackedLinear, packed_linears, set_bits, stored_widths
from bbb_ao.qat_linear import QATLinear
from bbb_ao.splitting import channel_metric, choose_index, expand_channels
from core.strategies import FEW, GRIDS, act_widths, generator, make_linear, product_bound, seeds, widths

INTEGER = Grid(kind="integer", zero_point_bits=2)


def make_pair(
    seed: int = 0,
    width: int = 64,
    ratio: float = 0.0,
    max_bits: int = 8,
    grid: Grid = GRIDS[0],
    act_bits: int | None = None,
    **settings,
) -> tuple[QATLinear, PackedLinear]:
    linear = make_linear(seed, width, 24, settings.pop("bias", True))
    index = choose_index(channel_metric([linear.weight]), ratio, grid.group_size)
    qat = QATLinear.from_linear(linear, 8, act_bits, grid, index, **settings)
    return qat.eval(), PackedLinear.from_qat(qat, max_bits).eval()


def make_input(seed: int, width: int, rows: int = 5) -> Tensor:
    return torch.randn(rows, width, generator=generator(seed))


@FEW
@given(
    seeds,
    st.sampled_from([32, 40, 64, 160]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from(GRIDS),
    act_widths,
    widths,
    st.booleans(),
    st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_packed_equals_fake_quantized(
    seed: int, width: int, ratio: float, grid: Grid, act_bits: int | None, bits: int, bias: bool, magnitude: float
) -> None:
    qat, packed = make_pair(seed, width, ratio, 8, grid, act_bits, bias=bias)
    qat.set_bits(bits, act_bits)
    packed.set_bits(bits)
    x = make_input(seed, width) * magnitude
    with torch.no_grad():
        scale, zero_point = qat.rounded_scales()
        weight = packed.weight.stored_weight()
        columns = x if qat.ocs_index is None else expand_channels(x, qat.ocs_index)
        expected, got = qat(x), packed(x)
    assert torch.isfinite(got).all()
    # Quantizing activations clips at most a sixteenth beyond, and zeros become half a step.
    size = columns.abs() if act_bits is None else columns.abs().amax(-1, keepdim=True) * 2 + 0 * columns
    bound = product_bound(size, weight) + 1e-6 * (0 if packed.bias is None else packed.bias.abs())
    assert ((got - expected).abs() <= bound).all()
    assert weight.shape == (24, packed.stored_features)
    assert scale.shape == zero_point.shape


@pytest.mark.parametrize("max_bits", range(2, 9))
@pytest.mark.parametrize("grid", [Grid(), Grid(zero_point_bits=0), INTEGER], ids=str)
def test_stored_widths_give_the_fake_quantized_weight_bit_for_bit(grid: Grid, max_bits: int) -> None:
    qat, packed = make_pair(1, 100, 0.2, max_bits, grid)
    x = make_input(0, 100)
    for bits in stored_widths(grid.kind, max_bits):
        qat.set_bits(bits)
        packed.set_bits(bits)
        # Unsplit columns stand for themselves, so the merged weights agree where the stored ones do.
        assert torch.equal(packed.weight.dequantize(), qat.merged_weight(bits)), bits
        torch.testing.assert_close(packed(x), qat(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act_bits", [None, 2, 8])
@pytest.mark.parametrize("kind", ["half_step", "integer"])
def test_columns_and_padding_from_a_producer_give_the_same_product(kind: str, act_bits: int | None) -> None:
    grid = Grid(kind=kind, zero_point_bits=2)
    linear = make_linear(0, 40, 24)
    index = choose_index(channel_metric([linear.weight]), 0.0)
    assert index is not None
    qat = QATLinear.from_linear(linear, 2, act_bits, grid, index, expands_input=False)
    packed = PackedLinear.from_qat(qat, 2)
    assert (packed.ocs_index, packed.padding) == (None, 24)
    x = expand_channels(make_input(0, 40), index)
    torch.testing.assert_close(packed(x), qat(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))
    assert packed.weight.dequantize().shape == (24, 64)


def test_duplicated_rows_follow_the_product() -> None:
    linear = make_linear(0, 64, 40)
    out_index = choose_index(torch.rand(40, generator=generator(0)), 0.5)
    assert out_index is not None
    qat = QATLinear.from_linear(linear, 4, out_index=out_index)
    packed = PackedLinear.from_qat(qat, 4)
    x = make_input(0, 64)
    torch.testing.assert_close(packed(x), qat(x), rtol=1e-5, atol=1e-5)
    assert packed(x).shape == (5, 64)


def test_switching_width_copies_nothing() -> None:
    model = nn.Sequential(make_pair(0)[1], make_pair(1, 24 + 8)[1])
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for bits in (2, 4, 3, 8):
        assert set_bits(model, bits) is model
        assert {layer.bits for layer in packed_linears(model).values()} == {bits}
        weight = packed_linears(model)["0"].weight
        assert weight.high.data_ptr() == before["0.plane_high"]
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == before
    assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())


def test_widths_that_are_not_stored_are_refused_by_name_and_nothing_changes() -> None:
    model = nn.ModuleDict({"wide": make_pair(0)[1], "narrow": make_pair(1, max_bits=4)[1]})
    set_bits(model, 3)
    with pytest.raises(ValueError, match=r"narrow: bits: this layer stores widths 2 to 4, got 8"):
        set_bits(model, 8)
    assert {layer.bits for layer in packed_linears(model).values()} == {3}
    for bad in (1, 9, 2.5, "4", None):
        with pytest.raises(ValueError, match="whole number"):
            set_bits(model, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no packed layers"):
        set_bits(nn.Linear(2, 2), 4)
    integer = make_pair(2, max_bits=4, grid=INTEGER)[1]
    with pytest.raises(ValueError, match="widths 4 to 4, got 2"):
        integer.set_bits(2)


@pytest.mark.parametrize("max_bits", range(2, 9))
def test_planes_above_the_widest_slice_are_not_stored(max_bits: int) -> None:
    _, packed = make_pair(max_bits=max_bits)
    assert (packed.plane_mid is not None) == (max_bits > 2)
    assert (packed.plane_low is not None) == (max_bits > 4)
    assert packed.bits == max_bits
    empty = PackedLinear(64, 24, 64, Grid(), max_bits, bias_dtype=torch.float32)
    assert {n: (b.shape, b.dtype) for n, b in empty.named_buffers()} == {
        n: (b.shape, b.dtype) for n, b in packed.named_buffers()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_module_leaves_packed_buffers_alone(dtype: torch.dtype) -> None:
    _, packed = make_pair(ratio=0.5, act_bits=8)
    before = {name: buffer.clone() for name, buffer in packed.named_buffers() if name != "bias"}
    exact = packed(make_input(0, 64))
    packed.to(dtype)
    for name, buffer in before.items():
        now = packed.get_buffer(name)
        assert now.dtype == buffer.dtype
        assert torch.equal(now, buffer)
    assert packed.bias is not None
    assert packed.bias.dtype == dtype
    y = packed(make_input(0, 64).to(dtype))
    assert y.dtype == dtype
    assert (y.double() - exact.double()).abs().max() <= 64 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("act_bits", [None, 4])
def test_autocast_gives_one_type_eager_and_compiled(act_bits: int | None) -> None:
    torch._dynamo.reset()
    _, packed = make_pair(ratio=0.3, act_bits=act_bits)
    x = make_input(0, 64)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eager, graph = packed(x), compiled(x)
    assert eager.dtype == graph.dtype == torch.bfloat16
    torch.testing.assert_close(eager, graph)
    exact = packed(x)
    assert (eager - exact).abs().max() <= 2.0**-5 * exact.abs().max()


@pytest.mark.parametrize("act_bits", [None, 4])
def test_weight_dispatches_the_same_product_eager_and_compiled(act_bits: int | None) -> None:
    _, packed = make_pair(0, 40, 0.3, act_bits=act_bits)
    x = make_input(0, 40)
    weight = packed.weight
    assert weight.shape == (24, 40)
    assert torch.equal(F.linear(x, weight, packed.bias), packed(x))
    assert torch.equal(F.linear(x, weight, bias=packed.bias), packed(x))
    torch.testing.assert_close(F.linear(x, weight), packed(x) - packed.bias, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(lambda x, w, b: F.linear(x, w, b), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, packed.bias), packed(x))


def test_compiles_without_graph_breaks_at_every_width() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(make_pair(0, 40, 0.3)[1], nn.ReLU(), make_pair(1, 24 + 8, act_bits=4)[1])
    model[0].out_index = torch.tensor([*range(24), *[24] * 8], dtype=torch.int32)
    x = make_input(0, 40)
    explanation = torch._dynamo.explain(model)(x)
    assert explanation.graph_break_count == 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for bits in (8, 4, 2, 3):
        set_bits(model, bits)
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("act_bits", [None, 4])
def test_exports(act_bits: int | None, rows: int) -> None:
    model = nn.Sequential(make_pair(0, 40, 0.3, act_bits=act_bits)[1])
    x = make_input(0, 40, rows)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_layer_exports_as_the_root_too() -> None:
    layer = PackedLinear.from_qat(make_pair(0, 40, 0.3)[0], 2).eval()
    x = make_input(0, 40)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_exports_with_a_dynamic_number_of_rows() -> None:
    model = nn.Sequential(make_pair(0, 40, 0.3)[1])
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(model, (make_input(0, 40),), dynamic_shapes=({0: rows},))
    x = make_input(1, 40, 9)
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64), (1, 1, 64)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    qat, packed = make_pair(act_bits=8)
    x = torch.randn(shape, generator=generator(0))
    assert packed(x).shape == (*shape[:-1], 24)
    torch.testing.assert_close(packed(x), qat(x), rtol=1e-5, atol=1e-5)


def test_copies_and_state_round_trip() -> None:
    _, packed = make_pair(ratio=0.5, max_bits=4)
    x = make_input(0, 64)
    duplicate = copy.deepcopy(packed)
    assert torch.equal(duplicate(x), packed(x))
    assert duplicate.plane_high.data_ptr() != packed.plane_high.data_ptr()
    other = PackedLinear(64, 24, packed.stored_features, Grid(), 4, expands_input=True, bias_dtype=torch.float32)
    other.load_state_dict(packed.state_dict(), strict=True)
    assert torch.equal(other(x), packed(x))


def test_the_trained_width_is_the_first_to_run() -> None:
    qat, _ = make_pair()
    for trained, max_bits, expected in ((2, 8, 2), (8, 4, 4), (None, 4, 4), (4, 4, 4)):
        qat.set_bits(trained)
        assert PackedLinear.from_qat(qat, max_bits).bits == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("learned", [False, True])
def test_nan_and_infinite_weights_are_not_packed(bad: float, learned: bool) -> None:
    qat, _ = make_pair(learned_scales=learned)
    with torch.no_grad():
        qat.weight[3, 5] = bad
    with pytest.raises(NumericsError, match="weight: expected finite values"):
        PackedLinear.from_qat(qat, 8)


def test_limits_of_the_grid_are_refused() -> None:
    qat, _ = make_pair(max_bits=4, grid=Grid(parent_bits=8))
    with pytest.raises(ValueError, match="max_bits"):
        PackedLinear.from_qat(qat, 9)
    narrow = QATLinear.from_linear(make_linear(0, 64, 24), 2, grid=Grid(parent_bits=4))
    with pytest.raises(ValueError, match="parent_bits = 4"):
        PackedLinear.from_qat(narrow, 8)
    float32 = QATLinear.from_linear(make_linear(0, 64, 24), 2, grid=Grid(scale_format="float32"))
    with pytest.raises(ValueError, match="e4m3"):
        PackedLinear.from_qat(float32, 2)


def test_all_zero_and_constant_layers_are_packed() -> None:
    linear = nn.Linear(64, 24, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[1] = -0.0
        linear.weight[2] = 0.25
    packed = PackedLinear.from_qat(QATLinear.from_linear(linear, 2), 8)
    for bits in (2, 4, 8):
        packed.set_bits(bits)
        dense = packed.weight.dequantize()
        assert (dense[:2] == 0).all()
        assert (dense[3:] == 0).all()
        assert ((dense[2] - 0.25).abs() <= 0.25 * (2.0**-bits + 1 / 16)).all()
    assert int(packed.scale.max()) <= 0x7E
