"""Fused fake quantization against the reference: on a GPU where there is one, else in Triton's interpreter.

The reference runs on the CPU. Results must be equal. Gradients are sums over a group: with u the machine epsilon, each
of two float32 evaluations is within (G + 8) u of the sum of magnitudes of what it adds up.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bbb_ao.grid import Grid
from bbb_ao.kernels import (
    dequantize,
    derive_scale,
    fake_quantize_closed_form,
    fake_quantize_given,
    fake_quantize_tokens,
    quantize,
    quantize_activation,
    round_scale,
    scale_exponent,
    slice_codes,
)
from bbb_ao.kernels.fake_quantize import dispatch, launch
from bbb_ao.kernels.fake_quantize.op import closed_form_op, given_op
from bbb_ao.kernels.packed_row import expand_input, fake_quantize_input
from bbb_ao.qat_linear import QATLinear
from bbb_ao.splitting import channel_metric, choose_index

pytest.importorskip("triton", reason="the kernels need Triton, whose interpreter runs them on a CPU")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes in NumPy, which warns of what the kernels handle (0 * inf, conversion of infinity).
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EPS = torch.finfo(torch.float32).eps
# The patch of `uses_triton` lasts as long as the test, as it should for all of a test's examples.
FEW = settings(
    deadline=None,
    derandomize=True,
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
seeds = st.integers(0, 2**31 - 1)
widths = st.integers(2, 8)


@dataclass(frozen=True)
class Kind:
    """Settings of a grid, as the doors name them."""

    half_step: bool = True
    zero_point_bits: int = 4
    e4m3: bool = True
    group_size: int = 32
    parent_bits: int = 8


KINDS = [
    Kind(),
    Kind(zero_point_bits=0),
    Kind(zero_point_bits=1, group_size=128),
    Kind(zero_point_bits=8, group_size=64),
    Kind(e4m3=False),
    Kind(zero_point_bits=0, e4m3=False),
    Kind(False, 2),
    Kind(False, 2, e4m3=False),
    # No power of two: the tile has masked columns.
    Kind(False, 2, group_size=96),
    Kind(group_size=96),
    Kind(False, 2, parent_bits=4),
]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, tensors marked by `on_device` take the kernels, as all do on a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(dispatch, "uses_triton", lambda tensor: taken and tensor.element_size() <= 4)


taken = False


def with_kernels(function, *tensors: Tensor, backward: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
    """(function's value, gradients of leaf copies of the tensors), computed by the kernels; results on the CPU."""
    global taken
    taken = True
    try:
        value, gradients = run(function, [t.to(DEVICE) for t in tensors], backward)
    finally:
        taken = False
    return value.cpu(), [None if g is None else g.cpu() for g in gradients]


def run(function, tensors, backward: Tensor | None = None) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [t.detach().requires_grad_(backward is not None) for t in tensors]
    value = function(*leaves)
    if backward is not None:
        value.backward(backward.to(value.device, value.dtype))
    return value.detach(), [leaf.grad for leaf in leaves]


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hard_weight(seed: int, rows: int, groups: int, group_size: int, magnitude: float = 1.0) -> Tensor:
    """A matrix with each kind of group: zero, constant, one-sided, tied, with an outlier, tiny, subnormal, normal."""
    w = randn(seed, rows, groups, group_size)
    kinds = [
        lambda g: g * 0,
        lambda g: g * 0 - 0.0,
        lambda g: g * 0 + 0.3,
        lambda g: g * 0 - 0.7,
        lambda g: g.abs() + 0.1,
        lambda g: -g.abs(),
        lambda g: (g * 2).round() / 2,
        lambda g: g.clamp(-1, 1),
        lambda g: torch.where(torch.arange(group_size) == 5, g * 1e3, g),
        lambda g: g * 1e-12,
        lambda g: g * 1e-41,
        lambda g: g,
    ]
    for number in range(rows * groups):
        row, column = divmod(number, groups)
        w[row, column] = kinds[(number + seed) % len(kinds)](w[row, column])
    # Scales over the whole range of E4M3, its subnormal numbers and what lies below.
    spread = torch.rand(rows, groups, 1, generator=torch.Generator().manual_seed(seed))
    return (w * 2.0 ** (-40 * (spread - 0.5).clamp(min=0)) * magnitude).flatten(1)


def gradient_bound(upstream: Tensor, group_size: int) -> Tensor:
    """Twice (G + 8) u times what a group adds up; |level| and |w / step| are at most 2**bits + 1 in closed form.

    So each term of dL/dscale / span is at most 2 (2**bits + 1) 2**(2-bits) / 3.5 < 3 times |g|, and the way over the
    zero offset adds at most 2 |g| more.
    """
    total = upstream.double().abs().unflatten(-1, (-1, group_size)).sum(-1, keepdim=True)
    return (2 * (group_size + 8) * EPS * 5 * total).expand(*total.shape[:-1], group_size).flatten(-2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("detach", [False, True], ids=["", "detached"])
def test_weights_in_closed_form_equal_the_reference(kind: Kind, detach: bool) -> None:
    for bits in range(2, kind.parent_bits + 1):
        weight = hard_weight(bits, 7, 5, kind.group_size)
        upstream = randn(bits + 1, *weight.shape)
        door = partial(fake_quantize_closed_form, bits=bits, detach=detach, **vars(kind))
        expected, (reference,) = run(door, [weight], upstream)
        found, (gradient,) = with_kernels(door, weight, backward=upstream)
        assert torch.equal(found, expected), bits
        error = (gradient - reference).double().abs()
        assert (error <= gradient_bound(upstream, kind.group_size)).all(), (bits, error.max())
        assert torch.equal(gradient != 0, reference != 0) or not detach


@FEW
@given(seeds, widths, st.sampled_from(KINDS[:9]), st.sampled_from([1e-38, 1e-30, 1e-6, 1e4, 1e30, 1e35]))
def test_extreme_magnitudes_give_the_same_codes_and_finite_gradients(
    seed: int, bits: int, kind: Kind, magnitude: float
) -> None:
    weight = hard_weight(seed, 3, 4, kind.group_size, magnitude)
    upstream = randn(seed, *weight.shape)
    door = partial(fake_quantize_closed_form, bits=bits, **vars(kind))
    found, (gradient,) = with_kernels(door, weight, backward=upstream)
    assert torch.equal(found, door(weight))
    assert torch.isfinite(gradient).all()


@FEW
@given(seeds, st.integers(1, 9), st.integers(1, 70), widths, st.sampled_from(KINDS))
def test_any_number_of_groups_works(seed: int, rows: int, groups: int, bits: int, kind: Kind) -> None:
    bits = min(bits, kind.parent_bits)
    weight = randn(seed, rows, groups * kind.group_size)
    door = partial(fake_quantize_closed_form, bits=bits, **vars(kind))
    assert torch.equal(with_kernels(door, weight)[0], door(weight))


@pytest.mark.parametrize("kind", [Kind(), Kind(False, 2), Kind(group_size=96), Kind(False, 2, parent_bits=4)], ids=str)
def test_given_scales_equal_the_reference(kind: Kind) -> None:
    for bits in range(2, kind.parent_bits + 1):
        weight = hard_weight(bits, 7, 5, kind.group_size)
        groups = weight.unflatten(1, (-1, kind.group_size))
        scale, zero_point = derive_scale(groups, kind.half_step, kind.zero_point_bits)
        # Too small, so that some weights are clipped, and offsets between their levels; any float32 mantissa.
        scale, zero_point = scale * 0.6172, zero_point * 0.9 + 0.13
        upstream = randn(bits + 1, *weight.shape)
        door = partial(
            fake_quantize_given,
            bits=bits,
            half_step=kind.half_step,
            group_size=kind.group_size,
            parent_bits=kind.parent_bits,
        )
        expected, reference = run(door, [weight, scale, zero_point], upstream)
        found, gradients = with_kernels(door, weight, scale, zero_point, backward=upstream)
        assert torch.equal(found, expected), bits
        size = upstream.abs().unflatten(1, (-1, kind.group_size)).double()
        codes = slice_codes(quantize(groups, scale, zero_point, kind.half_step, kind.parent_bits), bits, kind.half_step)
        level = dequantize(codes, torch.ones_like(scale), zero_point, bits, kind.half_step).double().abs()
        position = (groups.double() / torch.where(scale == 0, torch.inf, scale).unsqueeze(-1)).abs()
        once = 2 * (kind.group_size + 8) * EPS
        bounds = [
            # g s / s may round twice.
            2 * EPS * upstream.double().abs(),
            once * (size * (level + position + 2)).sum(-1),
            once * 2 * size.sum(-1) * scale.double(),
        ]
        for name, mine, other, bound in zip(("weight", "scale", "zero"), gradients, reference, bounds, strict=True):
            assert ((mine - other).double().abs() <= bound).all(), (name, bits)


@pytest.mark.parametrize("half_step", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
def test_tokens_equal_the_reference(half_step: bool, dtype: torch.dtype) -> None:
    for bits in range(2, 9):
        x = hard_weight(bits, 6, 9, 32)
        # Every token has its own second level.
        x[1] *= 1e3
        x[2] *= 1e-3
        x[3] = 0
        x = x.clamp(-6e4, 6e4).to(dtype).view(2, 3, 288)
        upstream = randn(bits + 1, *x.shape).to(dtype)
        door = partial(fake_quantize_tokens, bits=bits, half_step=half_step)
        expected, (reference,) = run(door, [x], upstream)
        found, (gradient,) = with_kernels(door, x, backward=upstream)
        assert found.dtype == dtype
        assert torch.equal(found, expected), bits
        rounding = 2 * torch.finfo(dtype).eps * reference.double().abs()
        error = (gradient - reference).double().abs()
        assert (error <= gradient_bound(upstream, 32) + rounding).all(), (bits, error.max())


@pytest.mark.parametrize("half_step", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_scales_of_tokens_are_rounded_as_in_the_reference(bits: int, half_step: bool) -> None:
    """At every E4M3 number, just beside it, between it and the next one, and below the smallest."""
    exact = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = torch.cat([exact[:1] / 2, (exact[1:] + exact[:-1]) / 2])
    ratios = torch.cat([torch.nextafter(r, r + side) for r in (exact, between) for side in (-1, 0, 1)]).clamp(max=448)
    steps = 2**bits - (not half_step)
    for magnitude in (1.0, 2.0**-90, 2.0**100):
        high = ratios.double() * steps * magnitude
        share = torch.rand(len(ratios), 32, generator=torch.Generator().manual_seed(bits))
        share[:, 3], share[:, 7] = 1, 0
        x = (share.double() * high[:, None]).float().view(1, -1)
        door = partial(fake_quantize_tokens, bits=bits, half_step=half_step)
        upstream = randn(bits, *x.shape)
        expected, (reference,) = run(door, [x], upstream)
        found, (gradient,) = with_kernels(door, x, backward=upstream)
        assert torch.equal(found, expected), magnitude
        assert ((gradient - reference).double().abs() <= gradient_bound(upstream, 32)).all(), magnitude
        # The rule itself, by the scale that the reference gives.
        _, scale, _ = quantize_activation(x.view(-1, 32), bits, half_step)
        exponent = scale_exponent(scale.amax())
        nearest = round_scale(x.view(-1, 32)[:, 3] / steps, exponent)
        assert (scale >= nearest).all()
        assert (bits >= 4) == bool((scale > nearest).any())


@FEW
@given(seeds, st.integers(0, 5), st.integers(1, 140), widths, st.booleans(), st.sampled_from([1e-38, 1.0, 1e30]))
def test_any_number_of_tokens_and_features_works(
    seed: int, tokens: int, groups: int, bits: int, half_step: bool, magnitude: float
) -> None:
    x = randn(seed, tokens, groups * 32) * magnitude
    door = partial(fake_quantize_tokens, bits=bits, half_step=half_step)
    found, (gradient,) = with_kernels(door, x, backward=x)
    assert torch.equal(found, door(x))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("half_step", [True, False])
def test_padding_is_zero_and_gets_no_gradient_of_its_own(half_step: bool) -> None:
    x = randn(0, 5, 128)
    x[:, 117:] = 0
    upstream = randn(1, 5, 128)
    door = partial(fake_quantize_tokens, bits=2, half_step=half_step, padding=11)
    expected, (reference,) = run(door, [x], upstream)
    found, (gradient,) = with_kernels(door, x, backward=upstream)
    assert torch.equal(found, expected)
    assert (found[:, 117:] == 0).all()
    assert ((gradient - reference).double().abs() <= gradient_bound(upstream, 32)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_never_become_numbers(bad: float) -> None:
    weight = randn(0, 3, 128)
    weight[1, 40] = bad
    for kind in (Kind(), Kind(False, 2)):
        found = with_kernels(partial(fake_quantize_closed_form, bits=2, **vars(kind)), weight)[0]
        assert not torch.isfinite(found[1, 32:64]).all()
        tokens = with_kernels(partial(fake_quantize_tokens, bits=2, half_step=kind.half_step), weight)[0]
        assert not torch.isfinite(tokens[1]).all()
        assert torch.isfinite(tokens[0]).all()


def test_every_element_of_the_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    for kind in (Kind(), Kind(group_size=96)):
        weight = randn(0, 3, 96 * 11)
        door = partial(fake_quantize_closed_form, bits=3, **vars(kind))
        found, (gradient,) = with_kernels(door, weight, backward=weight)
        assert torch.isfinite(found).all()
        assert torch.isfinite(gradient).all()
        scales = derive_scale(weight.unflatten(1, (-1, kind.group_size)), True, 4)
        door = partial(fake_quantize_given, bits=3, half_step=True, group_size=kind.group_size)
        found, gradients = with_kernels(door, weight, *scales, backward=weight)
        assert all(torch.isfinite(t).all() for t in (found, *gradients))


def test_strided_inputs_and_gradients_are_read_right() -> None:
    weight, upstream = randn(0, 64, 96), randn(1, 64, 96)
    door = partial(fake_quantize_closed_form, bits=2, half_step=True, zero_point_bits=4)
    expected, (reference,) = with_kernels(door, weight.t().contiguous(), backward=upstream.t().contiguous())
    strided, (gradient,) = with_kernels(lambda w: door(w.t()), weight, backward=upstream.t())
    assert torch.equal(strided, expected)
    assert torch.equal(gradient.t(), reference)


def test_results_can_be_written_in_another_type() -> None:
    weight = randn(0, 4, 64)
    door = partial(fake_quantize_closed_form, bits=2, half_step=True, zero_point_bits=4)
    for dtype in [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"):
        found, (gradient,) = with_kernels(partial(door, dtype=dtype), weight, backward=weight)
        expected, (reference,) = run(partial(door, dtype=dtype), [weight], weight)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        assert ((gradient - reference).double().abs() <= gradient_bound(weight, 32)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("half_step", [True, False])
@pytest.mark.parametrize("group_size", [32, 96])
def test_gathered_rows_equal_the_reference(
    group_size: int, half_step: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ROW_TILE", 2048)
    # More groups than one tile holds, and fewer.
    for bits, groups, rows in ((2, 3, 5), (4, 140, 2), (8, 3, 1)):
        features = groups * group_size
        in_features = features - 20
        copies = torch.randint(0, in_features, (13,), generator=torch.Generator().manual_seed(bits))
        padding = torch.full((7,), in_features)
        for index in (None, torch.cat([torch.arange(in_features), copies, padding]).to(torch.int32)):
            x = hard_weight(bits, rows, groups, group_size)[:, : features if index is None else in_features]
            x = x.to(dtype).contiguous()
            columns = expand_input(x, index)
            expected = fake_quantize_input(columns, index, x.shape[1], bits, half_step, group_size).to(dtype)
            moved = None if index is None else index.to(DEVICE)
            for programs in (1, 4, 64):
                found = launch.gathered_rows(x.to(DEVICE), moved, bits, half_step, group_size, programs).cpu()
                assert found.dtype == dtype
                case = f"{bits} bits, {groups} groups, index {index is not None}, {programs} programs"
                assert torch.equal(found, expected), case


@pytest.mark.parametrize("operator", ["weight", "tokens", "given"])
def test_operators_are_registered_right(operator: str) -> None:
    x = randn(0, 3, 64).to(DEVICE).requires_grad_()
    if operator == "given":
        scales = (t.detach().to(DEVICE).requires_grad_() for t in derive_scale(x.cpu().unflatten(1, (-1, 32)), True, 4))
        torch.library.opcheck(given_op, (x, *scales, 3, 8, 32, True, torch.float32))
        return
    act = operator == "tokens"
    settings = (3, 3 if act else 8, 32, True, 4, True, act, False, 5 if act else 0, torch.float32)
    torch.library.opcheck(closed_form_op, (x, *settings))


def qat_linear(learned: bool, **changes) -> tuple[QATLinear, Tensor, Tensor]:
    torch.manual_seed(0)
    linear = torch.nn.Linear(72, 40)
    index = choose_index(channel_metric([linear.weight]), 0.2)
    qat = QATLinear.from_linear(linear, 2, 2, Grid(**changes), index, learned_scales=learned)
    assert qat.padding == 0
    return qat, randn(1, 2, 5, 72), randn(2, 2, 5, 40)


# On a GPU the thread of the backward pass says that it makes the context of its first product.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("grid", [{}, {"kind": "integer", "zero_point_bits": 2}], ids=str)
@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed"])
def test_a_qat_linear_is_the_same_with_kernels(learned: bool, grid: dict, how: str) -> None:
    qat, x, upstream = qat_linear(learned, **grid)
    names = [name for name, _ in qat.named_parameters()]

    def called(x: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(qat, values, (x,))

    parameters = [p.detach() for p in qat.parameters()]
    expected, reference = run(called, [x, *parameters], upstream)
    qat.to(DEVICE)
    torch._dynamo.reset()
    functions = {
        "eager": called,
        "compiled": torch.compile(called, fullgraph=True, backend="aot_eager"),
        "checkpointed": partial(checkpoint, called, use_reentrant=False),
    }
    found, gradients = with_kernels(functions[how], x, *parameters, backward=upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, mine, other in zip(["x", *names], gradients, reference, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_float64_keeps_the_reference() -> None:
    assert not dispatch.uses_triton(torch.zeros(1, dtype=torch.float64, device=DEVICE))
    weight = randn(0, 2, 64).double()
    door = partial(fake_quantize_closed_form, bits=2, **vars(replace(Kind(), e4m3=False)))
    assert with_kernels(door, weight)[0].dtype == torch.float64
