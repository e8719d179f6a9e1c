"""Dynamic activation quantization: per token and group, with a second level per token (design.md, section 2.8)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bbb_ao.activations import fake_quantize_activation
from bbb_ao.kernels import quantize_activation
from bbb_ao.kernels.fake_quantize.reference import SCALE_UP_BITS
from core.strategies import FEW, SOME, kinds, magnitudes, make_weight, seeds, shapes

act_bits = st.integers(2, 8)


@SOME
@given(seeds, act_bits, kinds, magnitudes, shapes)
def test_error_is_bounded_by_the_tokens_scale(seed: int, bits: int, kind: str, magnitude: float, shape: str) -> None:
    x = make_weight(seed, 5, 96, shape, magnitude)
    y = fake_quantize_activation(x, bits, 32, kind)
    assert torch.isfinite(y).all()
    groups = x.double().unflatten(-1, (-1, 32))
    extent = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    steps = 2**bits if kind == "half_step" else 2**bits - 1
    # One step, rounded up by an eighth at most; rounded to nearest, the sixteenth by which E4M3 may clip the ends; and
    # E4M3's smallest number for tiny groups.
    floor = extent.amax(-1, keepdim=True) * 2.0**-17 + steps * 2.0**-109
    bound = 1.126 * extent / steps + floor if bits >= SCALE_UP_BITS else 1.0625 * extent / steps + extent / 16 + floor
    error = (y.double() - x.double()).abs().unflatten(-1, (-1, 32)).amax(-1)
    assert (error <= bound).all()


@FEW
@given(seeds, act_bits, kinds)
def test_codes_are_whole_and_within_their_width(seed: int, bits: int, kind: str) -> None:
    x = make_weight(seed, 4, 64, "outlier", 1e3).unflatten(-1, (-1, 32))
    codes, scale, _ = quantize_activation(x, bits, kind == "half_step")
    assert torch.equal(codes, codes.floor())
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert scale.shape == x.shape[:-1]


@pytest.mark.parametrize("kind", ["half_step", "integer"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tokens_do_not_disturb_each_other(bits: int, kind: str) -> None:
    x = make_weight(0, 6, 64)
    scales = torch.tensor([1e30, 1e-30, 1.0, 0.0, 1e-44, 3e38]).unsqueeze(1)
    together = fake_quantize_activation(x * scales, bits, 32, kind)
    assert torch.isfinite(together).all()
    assert (together[3] == 0).all()
    for token in range(6):
        alone = fake_quantize_activation((x * scales)[token : token + 1], bits, 32, kind)
        assert torch.equal(alone[0], together[token]), token
    # A power of two changes nothing but the second level.
    assert torch.equal(
        fake_quantize_activation(x * 2.0**40, bits, 32, kind), fake_quantize_activation(x, bits, 32, kind) * 2.0**40
    )


@pytest.mark.parametrize("kind", ["half_step", "integer"])
def test_subnormal_tokens_stay_subnormal(kind: str) -> None:
    x = make_weight(1, 3, 64, magnitude=1e-43)
    assert fake_quantize_activation(x, 4, 32, kind).abs().max() < 2.0**-100


@pytest.mark.parametrize("kind", ["half_step", "integer"])
def test_padding_stays_exactly_zero(kind: str) -> None:
    x = make_weight(2, 3, 64)
    x[:, 53:] = 0
    y = fake_quantize_activation(x, 2, 32, kind, padding=11)
    assert (y[:, 53:] == 0).all()
    assert torch.equal(y[:, :53], fake_quantize_activation(x, 2, 32, kind)[:, :53])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_activations_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = make_weight(3, 3, 64, magnitude=6e4).to(dtype)
    y = fake_quantize_activation(x, 4)
    assert y.dtype == dtype
    assert torch.equal(y, fake_quantize_activation(x.float(), 4).to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_pass_through(bad: float) -> None:
    x = make_weight(4, 2, 64)
    x[0, 5] = bad
    y = fake_quantize_activation(x, 8)
    assert not torch.isfinite(y[0]).all()
    assert torch.isfinite(y[1]).all()


def test_gradient_is_near_the_identity_at_eight_bits() -> None:
    x = make_weight(5, 4, 64).requires_grad_()
    upstream = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    fake_quantize_activation(x, 8, 32, "half_step").backward(upstream)
    assert x.grad is not None
    # The largest and the smallest of each group also take the gradient of the scale.
    groups = x.detach().unflatten(-1, (-1, 32))
    inner = ((groups < groups.amax(-1, keepdim=True) * 0.9) & (groups > groups.amin(-1, keepdim=True) * 0.9)).flatten(
        -2
    )
    torch.testing.assert_close(x.grad[inner], upstream[inner])


def test_width_and_shape_are_checked() -> None:
    with pytest.raises(ValueError, match="act_bits"):
        fake_quantize_activation(torch.zeros(1, 32), 16)
    with pytest.raises(ValueError, match="32 does not divide 40"):
        fake_quantize_activation(torch.zeros(1, 40), 4)


@pytest.mark.parametrize("kind", ["half_step", "integer"])
def test_wide_activations_are_not_clipped(kind: str) -> None:
    x = make_weight(6, 200, 96).unflatten(-1, (-1, 32))
    for bits in (4, 8):
        _, scale, _ = quantize_activation(x, bits, kind == "half_step")
        steps = 2**bits if kind == "half_step" else 2**bits - 1
        extent = x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)
        assert (scale * steps >= extent * (1 - 2.0**-20)).all()
        # The nearest E4M3 number would be smaller for some.
        assert (scale * steps > extent * 1.0626).any()
    _, scale, _ = quantize_activation(x, 2, kind == "half_step")
    assert (scale * (4 if kind == "half_step" else 3) < extent).any()
