"""The training host: its forward, its gradients and its switches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bbb_ao.activations import fake_quantize_activation
from bbb_ao.grid import Grid, fake_quantize_weight, quantize_weight, scale_and_zero_point
from bbb_ao.qat_linear import QATLinear, become, qat_linears, set_training_bits
from bbb_ao.splitting import channel_metric, choose_index, expand_channels, split_channels
from core.strategies import FEW, act_widths, generator, grids, make_linear, product_bound, seeds, widths

features = st.sampled_from([32, 40, 64, 100])


def make_qat(seed: int = 0, width: int = 64, ratio: float = 0.0, bits: int | None = 2, **settings) -> QATLinear:
    linear = make_linear(seed, width, 24)
    grid = settings.pop("grid", Grid())
    index = choose_index(channel_metric([linear.weight]), ratio, grid.group_size)
    return QATLinear.from_linear(linear, bits, grid=grid, index=index, **settings)


def make_input(seed: int, width: int) -> Tensor:
    return torch.randn(5, width, generator=generator(seed))


@FEW
@given(seeds, features, st.sampled_from([0.0, 0.3]), widths, act_widths, grids(), st.booleans())
def test_forward_equals_the_formula(
    seed: int, width: int, ratio: float, bits: int, act_bits: int | None, grid: Grid, learned: bool
) -> None:
    linear = make_linear(seed, width, 24)
    index = choose_index(channel_metric([linear.weight]), ratio, grid.group_size)
    qat = QATLinear.from_linear(linear, bits, act_bits, grid, index, learned_scales=learned)
    x = make_input(seed, width)
    stored, columns = qat.weight.detach(), x
    if index is not None:
        columns = expand_channels(x, index)
        if grid.half_step:
            assert torch.equal(stored, split_channels(linear.weight.detach(), index))
    scale, zero_point = scale_and_zero_point(stored, grid)
    if act_bits is not None:
        columns = fake_quantize_activation(columns, act_bits, grid.group_size, grid.activation_kind)
    if index is not None:
        columns = columns * (index != width)
    weight = fake_quantize_weight(stored, scale, zero_point, bits, grid)
    expected = columns.double() @ weight.double().T + linear.bias.double()
    assert ((qat(x) - expected).abs() <= product_bound(columns, weight) + 1e-6 * linear.bias.abs()).all()


@FEW
@given(seeds, features, st.sampled_from([0.0, 0.3, 1.0]), grids())
def test_without_bits_the_host_computes_the_linear_itself(seed: int, width: int, ratio: float, grid: Grid) -> None:
    linear = make_linear(seed, width, 24).double()
    index = choose_index(channel_metric([linear.weight]), ratio, grid.group_size)
    if index is None and width % grid.group_size:
        return
    qat = QATLinear.from_linear(linear, None, grid=grid, index=index)
    x = make_input(seed, width).double()
    assert qat.weight.dtype == torch.float64
    torch.testing.assert_close(qat(x), linear(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(qat.merged_weight(), linear.weight)


def test_activations_alone_can_be_quantized() -> None:
    qat = make_qat(bits=None, act_bits=4)
    x = make_input(0, 64)
    assert torch.equal(qat(x), F.linear(fake_quantize_activation(x, 4), qat.weight, qat.bias))


def backward(module: nn.Module, forward, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    forward(x).backward(upstream)
    found = {"x": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}
    assert all(gradient is not None for gradient in found.values()), [n for n, g in found.items() if g is None]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("learned", [False, True], ids=["closed_form", "learned"])
@pytest.mark.parametrize(
    ("bits", "act_bits", "ratio", "kind"),
    [(2, None, 0.0, "half_step"), (2, 2, 0.5, "half_step"), (4, 8, 0.3, "integer"), (3, 4, 0.0, "half_step")],
)
def test_compiled_gradients_equal_eager_ones(
    bits: int, act_bits: int | None, ratio: float, kind: str, learned: bool
) -> None:
    torch._dynamo.reset()
    grid = Grid(kind=kind, zero_point_bits=2)
    qat = make_qat(1, 40, ratio, bits, act_bits=act_bits, grid=grid, learned_scales=learned)
    x, upstream = make_input(2, 40), make_input(3, 24)
    eager = backward(qat, qat, x, upstream)
    compiled = backward(qat, torch.compile(qat, fullgraph=True, backend="aot_eager"), x, upstream)
    assert eager.keys() == compiled.keys()
    assert {"x", "weight", "bias"} <= eager.keys()
    assert ("scale" in eager) == learned
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert eager[name].abs().max() > 0, name


def test_gradient_reaches_scales_through_the_weight_only_where_wanted() -> None:
    x, upstream = make_input(0, 64), make_input(1, 24)
    through = backward(qat := make_qat(), qat, x, upstream)["weight"]
    detached = backward(qat := make_qat(detach_scales=True), qat, x, upstream)["weight"]
    assert not torch.equal(through, detached)
    # Detached, an element's gradient is that of the product or, outside of the range, none.
    plain = upstream.T @ x
    assert torch.isclose(detached, plain, atol=1e-5).logical_or(detached == 0).all()


def test_one_optimizer_step_moves_the_output() -> None:
    qat = make_qat(learned_scales=True)
    x, target = make_input(0, 64), make_input(9, 24)
    optimizer = torch.optim.AdamW(qat.parameters(), 1e-2, weight_decay=0.0, foreach=True)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(qat(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_autocast_computes_in_bfloat16_and_keeps_float32_masters() -> None:
    qat = make_qat(ratio=0.3, act_bits=4)
    x = make_input(0, 64)
    exact = qat(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = qat(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert qat.weight.grad is not None
    assert qat.weight.grad.dtype == torch.float32
    assert (y - exact).abs().max() <= 2.0**-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_linears_get_float32_masters_and_run_in_the_inputs_type(dtype: torch.dtype) -> None:
    linear = make_linear(0, 64, 24).to(dtype)
    qat = QATLinear.from_linear(linear, 2)
    assert qat.weight.dtype == torch.float32
    assert qat.bias is not None
    assert qat.bias.dtype == torch.float32
    assert torch.equal(qat.weight, linear.weight.float())
    assert linear.weight.dtype == dtype
    assert qat(make_input(0, 64).to(dtype)).dtype == dtype
    qat.set_bits(None)
    assert qat(make_input(0, 64).to(dtype)).dtype == dtype


def test_offset_on_the_integer_grid_comes_from_the_new_scale() -> None:
    linear = make_linear(0, 64, 24)
    grid = Grid(kind="integer", zero_point_bits=2)
    index = choose_index(channel_metric([linear.weight]), 0.5)
    assert index is not None
    qat = QATLinear.from_linear(linear, 2, grid=grid, index=index)
    halves = split_channels(linear.weight.detach(), index)
    scale, _ = scale_and_zero_point(halves, grid)
    original, duplicate = int(index[64]), 64
    quarter = scale[:, original // 32] / 4
    torch.testing.assert_close(qat.weight[:, original], halves[:, original] - quarter)
    torch.testing.assert_close(qat.weight[:, duplicate], halves[:, duplicate] + quarter)
    torch.testing.assert_close(qat.merged_weight(), linear.weight, rtol=0, atol=1e-6)


def test_widths_are_switched_and_checked() -> None:
    model = nn.Sequential(make_qat(0), nn.ReLU(), make_qat(1, 32))
    assert list(qat_linears(model)) == ["0", "2"]
    set_training_bits(model, 4, 8)
    assert [(m.bits, m.act_bits) for m in qat_linears(model).values()] == [(4, 8)] * 2
    set_training_bits(model, None)
    assert [(m.bits, m.act_bits) for m in qat_linears(model).values()] == [(None, None)] * 2
    for bad in (1, 9, 2.0, "4", True):
        with pytest.raises(ValueError, match="bits"):
            make_qat(bits=bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="act_bits"):
            make_qat(act_bits=bad)
    with pytest.raises(ValueError, match="parent_bits = 4"):
        make_qat(bits=6, grid=Grid(parent_bits=4))


def test_ragged_features_need_an_index() -> None:
    with pytest.raises(ValueError, match="32 does not divide 40"):
        QATLinear.from_linear(make_linear(0, 40, 8), 2)
    qat = make_qat(width=40)
    assert (qat.stored_features, qat.padding) == (64, 24)
    assert qat(make_input(0, 40)).shape == (5, 24)


@pytest.mark.parametrize("index", [[*range(63), 65], [*range(63), 0], [*range(32)]])
def test_malformed_indices_are_refused(index: list[int]) -> None:
    bad = torch.tensor(index, dtype=torch.int32)
    with pytest.raises(ValueError, match="index"):
        QATLinear.from_linear(make_linear(0, 64, 64), 2, index=bad)
    with pytest.raises(ValueError, match="out_index"):
        QATLinear.from_linear(make_linear(0, 64, 64), 2, out_index=bad)


def test_rows_are_duplicated_for_a_consumer() -> None:
    linear = make_linear(0, 64, 40)
    out_index = choose_index(torch.rand(40, generator=generator(0)), 0.5)
    assert out_index is not None
    plain = QATLinear.from_linear(linear, 2)
    rows = QATLinear.from_linear(linear, 2, out_index=out_index)
    x = make_input(0, 64)
    assert torch.equal(rows(x), expand_channels(plain(x), out_index))


def test_host_is_copied_and_restored_from_its_state() -> None:
    qat = make_qat(ratio=0.5, learned_scales=True)
    x = make_input(0, 64)
    other = make_qat(ratio=0.5, learned_scales=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(qat.state_dict())
    assert torch.equal(other(x), qat(x))
    assert torch.equal(copy.deepcopy(qat)(x), qat(x))


def test_become_keeps_identity_hooks_and_mode() -> None:
    linear = make_linear(0, 64, 24).eval()
    calls: list[str] = []
    linear.register_forward_pre_hook(lambda *_: calls.append("pre"))
    linear.register_forward_hook(lambda *_, **__: calls.append("post"), with_kwargs=True)
    linear.register_full_backward_hook(lambda *_: calls.append("backward"))
    linear.register_state_dict_post_hook(lambda *_: calls.append("state"))
    model = nn.Sequential(linear)
    assert become(linear, QATLinear.from_linear(linear, 2)) is linear
    assert isinstance(model[0], QATLinear)
    assert not model[0].training
    model(make_input(0, 64).requires_grad_()).sum().backward()
    model.state_dict()
    assert sorted(calls) == ["backward", "post", "pre", "state"]


def test_merged_weight_is_what_the_layer_computes() -> None:
    qat = make_qat(ratio=0.5, bits=3)
    x = make_input(0, 64).double()
    y = qat.double()(x) - qat.bias
    torch.testing.assert_close(x @ qat.merged_weight(3).T, y, rtol=1e-12, atol=1e-12)
    assert torch.equal(qat.merged_weight().float(), make_linear(0, 64, 24).weight)


@pytest.mark.parametrize("grid", [Grid(), Grid(zero_point_bits=0), Grid("integer", zero_point_bits=2)])
def test_frozen_codes_stay_while_the_scale_moves(grid: Grid) -> None:
    qat = make_qat(3, ratio=0.3, grid=grid)
    with torch.no_grad():
        qat.weight[2, :32] = 0.0
    before = quantize_weight(qat.weight.detach(), *qat.rounded_scales(), grid).codes
    qat.freeze_codes()
    with torch.no_grad():
        qat.scale *= 0.5 + torch.rand(qat.scale.shape, generator=generator(4))
    frozen = {}
    for bits in (2, 3, 4, 8):
        qat.set_bits(bits)
        frozen[bits] = qat(make_input(0, 64))
    qat.thaw_codes()
    assert qat.frozen_scale is None
    assert torch.equal(quantize_weight(qat.weight.detach(), *qat.rounded_scales(), grid).codes, before)
    for bits, output in frozen.items():
        qat.set_bits(bits)
        torch.testing.assert_close(qat(make_input(0, 64)), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("grid", [Grid(scale_format="float32"), Grid("integer", 32, 2, "float32")])
def test_gradient_of_the_scale_at_frozen_codes_is_the_levels(grid: Grid, bits: int) -> None:
    qat = make_qat(5, grid=grid, bits=bits)
    qat.freeze_codes()
    x = make_input(1, 64)
    qat(x).square().sum().backward()
    weight = fake_quantize_weight(qat.weight, *qat.rounded_scales(), bits, grid).detach()
    levels = weight.unflatten(1, (-1, 32)) / qat.scale.detach().unsqueeze(-1)
    upstream = (2 * qat(x).detach()).T @ x
    expected = (upstream.unflatten(1, (-1, 32)) * levels).sum(-1)
    torch.testing.assert_close(qat.scale.grad, expected, rtol=1e-3, atol=1e-3)
