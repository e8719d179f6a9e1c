"""Outlier channel splitting: its arithmetic, its identities and its index (design.md, sections 1.7 and 2.3)."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from bbb_ao.grid import Grid, scale_and_zero_point
from bbb_ao.kernels import dequantize, quantize, round_scale, scale_exponent
from bbb_ao.splitting import (
    channel_metric,
    check_index,
    choose_index,
    expand_channels,
    merge_channels,
    split_channels,
    split_mask,
    split_ratio,
)
from core.strategies import FEW, SOME, generator, make_weight, seeds, shapes

ratios = st.sampled_from([0.0, 0.01, 0.085, 0.17, 0.5, 1.0])
channels = st.integers(1, 200)


def random_index(seed: int, in_features: int, ratio: float, group_size: int = 32) -> Tensor:
    metric = torch.rand(in_features, generator=generator(seed))
    index = choose_index(metric, ratio, group_size)
    return torch.arange(in_features, dtype=torch.int32) if index is None else index


@SOME
@given(seeds, channels, ratios, st.booleans(), st.sampled_from([1e-30, 1.0, 1e30]))
def test_split_product_equals_the_original(seed: int, width: int, ratio: float, offset: bool, magnitude: float) -> None:
    weight = make_weight(seed, 7, width, magnitude=magnitude).double()
    x = torch.randn(5, width, generator=generator(seed), dtype=torch.float64)
    index = random_index(seed, width, ratio)
    shift = weight.abs().amax() / 8 * torch.rand(7, width, generator=generator(seed), dtype=torch.float64)
    split = split_channels(weight, index, shift if offset else None)
    expected = x @ weight.T
    error = (expand_channels(x, index) @ split.T - expected).abs().max()
    assert error <= 1e-12 * (x.abs() @ weight.abs().T).max()


@SOME
@given(seeds, channels, ratios, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), shapes)
def test_merge_undoes_plain_halves_bit_for_bit(
    seed: int, width: int, ratio: float, dtype: torch.dtype, shape: str
) -> None:
    weight = make_weight(seed, 5, width, shape).to(dtype)
    # Half of an odd subnormal number is no number.
    weight = torch.where(weight.abs() < 2.0**-120, torch.zeros_like(weight), weight)
    index = random_index(seed, width, ratio)
    merged = merge_channels(split_channels(weight, index), index, width)
    assert merged.dtype == dtype
    assert torch.equal(merged, weight)


@FEW
@given(seeds, channels, ratios)
def test_merge_undoes_offset_halves_to_rounding(seed: int, width: int, ratio: float) -> None:
    weight, offset = make_weight(seed, 5, width), make_weight(seed + 1, 5, width, magnitude=0.25)
    index = random_index(seed, width, ratio)
    merged = merge_channels(split_channels(weight, index, offset), index, width)
    bound = 2 * torch.finfo(torch.float32).eps * (weight.abs() + offset.abs())
    assert ((merged - weight).abs() <= bound).all()


@FEW
@given(seeds, channels, ratios)
def test_copies_stand_in_the_originals_place_and_at_the_end(seed: int, width: int, ratio: float) -> None:
    weight, offset = make_weight(seed, 3, width), torch.full((3, width), 0.125)
    index = random_index(seed, width, ratio)
    split, mask = split_channels(weight, index, offset), split_mask(index, width)
    position = torch.arange(index.numel())
    twice = mask & (position < width)
    assert torch.equal(split[:, :width][:, ~twice[:width]], weight[:, ~twice[:width]])
    assert torch.equal(split[:, twice], weight[:, index[twice].long()] / 2 - 0.125)
    assert torch.equal(
        split[:, mask & (position >= width)], weight[:, index[mask & (position >= width)].long()] / 2 + 0.125
    )
    assert (split[:, index == width] == 0).all()
    assert int(mask.sum()) == 2 * int(((position >= width) & (index < width)).sum())


def codes_on(weight: Tensor, scale: Tensor, zero_point: float, half_step: bool) -> Tensor:
    """Parent codes of [rows, 32] weights with one scale a row."""
    offset = torch.full_like(scale, zero_point).unsqueeze(1)
    return quantize(weight.unsqueeze(1), scale.unsqueeze(1), offset, half_step).squeeze(1)


def bfloat16_weights(seed: int) -> tuple[Tensor, Tensor]:
    """bfloat16 weights (as float32) that fill +-1.9 of their E4M3 scales, which are [rows]."""
    rows = 64
    scale = torch.rand(rows, generator=generator(seed)) * 10.0 ** torch.randint(
        -4, 1, (rows,), generator=generator(seed)
    )
    scale = torch.stack([round_scale(s, scale_exponent(s)) for s in scale])
    weight = (torch.rand(rows, 512, generator=generator(seed)) * 3.8 - 1.9) * scale.unsqueeze(1)
    return weight.bfloat16().float(), scale


@FEW
@given(seeds, st.sampled_from([1.0, 2.0]))
def test_integer_codes_of_offset_halves_add_up_to_the_original_code(seed: int, zero_point: float) -> None:
    weight, scale = bfloat16_weights(seed)
    weight = weight / 2 if zero_point == 1.0 else weight
    quarter = scale.unsqueeze(1) * 2.0**-6 / 4
    zero = zero_point * 64
    whole = codes_on(weight, scale, zero_point, False) - zero
    assert (whole.abs() < 128).all()
    first = codes_on(weight / 2 - quarter, scale, zero_point, False) - zero
    second = codes_on(weight / 2 + quarter, scale, zero_point, False) - zero
    assert torch.equal(first + second, whole)


def test_half_to_even_breaks_the_code_identity_on_ties() -> None:
    weight, scale = bfloat16_weights(0)
    step = scale.unsqueeze(1) * 2.0**-6
    first, second = ((weight / 2 + sign * step / 4) / step for sign in (-1, 1))
    whole = weight / step
    broken = first.round() + second.round() != whole.round()
    # The ties that matter: the original's, and the copies' own.
    ties = ((whole - whole.floor()) == 0.5) | ((first - first.floor()) == 0.5) | ((second - second.floor()) == 0.5)
    assert ties.any()
    assert 0.2 < float(broken[ties].float().mean()) < 0.8
    assert not broken[~ties].any()
    half_up = torch.floor(first + 0.5) + torch.floor(second + 0.5) == torch.floor(whole + 0.5)
    assert half_up.all()


@FEW
@given(seeds, st.integers(0, 15))
def test_half_step_codes_of_plain_halves_add_up_to_the_original_code(seed: int, quarters: int) -> None:
    zeta = quarters / 4
    weight, scale = bfloat16_weights(seed)
    weight = weight + (2 - zeta) * scale.unsqueeze(1)
    step = scale * 2.0**-6
    whole = codes_on(weight, scale, zeta, True)
    assume(bool((whole > 0).all() and (whole < 255).all()))
    # The original's place: half-step grid; the tail: integer grid; each with half of the zero offset.
    first, second = codes_on(weight / 2, scale, zeta / 2, True), codes_on(weight / 2, scale, zeta / 2, False)
    assert torch.equal(first + second, whole)
    offset = torch.full_like(scale, zeta)
    parts = [dequantize(codes, scale, offset / 2, 8, half) for codes, half in ((first, True), (second, False))]
    expected = dequantize(whole, scale, offset, 8, True)
    torch.testing.assert_close(parts[0] + parts[1], expected, rtol=1e-6, atol=float(step.max()) * 1e-3)


def test_new_scales_after_the_split_reduce_the_other_channels_error() -> None:
    weight = torch.randn(128, 256, generator=generator(0))
    outliers = torch.arange(0, 256, 32)
    weight[:, outliers] *= 4
    index = torch.cat([torch.arange(256), outliers, torch.full((24,), 256)]).int()
    split = split_channels(weight, index)

    def error(stored: Tensor) -> Tensor:
        scale, zero_point = scale_and_zero_point(stored, Grid())
        groups = stored.unflatten(1, (-1, 32))
        codes = quantize(groups, scale, zero_point, True, 2)
        rounded = dequantize(codes, scale, zero_point, 2, True).flatten(1)
        others = torch.ones(256, dtype=torch.bool)
        others[outliers] = False
        return (rounded - stored)[:, :256][:, others].square().mean()

    # Halving the outlier of a group narrows its range (design.md, 2.3 c).
    assert error(split) < 0.7 * error(weight)


@SOME
@given(seeds, channels, st.floats(0, 1), st.sampled_from([32, 64]))
def test_chosen_index_fills_whole_groups_with_the_largest_channels(
    seed: int, width: int, ratio: float, size: int
) -> None:
    metric = torch.rand(width, generator=generator(seed))
    index = choose_index(metric, ratio, size)
    if index is None:
        assert width % size == 0
        assert ratio * width <= size / 2
        return
    check_index(index, width, size)
    assert index.dtype == torch.int32
    padded = -(-width // size) * size
    assert index.numel() >= padded
    assert index.numel() == padded or abs(index.numel() - (1 + ratio) * width) <= size / 2
    tail = index[width:]
    duplicates = tail[tail < width]
    if ratio > 0:
        assert duplicates.numel() == min(tail.numel(), width)
        rest = torch.ones(width, dtype=torch.bool)
        rest[duplicates.long()] = False
        assert not rest.any() or metric[duplicates.long()].min() >= metric[rest].max()
    else:
        assert duplicates.numel() == 0


def test_equal_metrics_are_split_in_channel_order() -> None:
    index = choose_index(torch.ones(64), 0.5)
    assert index is not None
    assert index[64:].tolist() == list(range(32))


@pytest.mark.parametrize(("width", "stored"), [(2048, 2176), (4096, 4352), (1920, 2016), (2080, 2176)])
def test_stored_columns_of_wide_layers_fill_blocks_of_128(width: int, stored: int) -> None:
    index = choose_index(torch.ones(width), 0.05)
    assert index is not None
    assert index.numel() == stored


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_choose_index_refuses_ratios_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        choose_index(torch.ones(32), ratio)


@pytest.mark.parametrize("metric", [torch.ones(2, 16), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
def test_choose_index_refuses_metrics_that_do_not_rank(metric: Tensor) -> None:
    with pytest.raises(ValueError, match="metric"):
        choose_index(metric, 0.5)


VALID = [*range(40), 3, 9, *[40] * 22]


@pytest.mark.parametrize(
    "values",
    [
        VALID[:-1],
        VALID[:32],
        [1, 0, *VALID[2:]],
        [0, 0, *VALID[2:]],
        [*VALID[:40], 3, 3, *VALID[42:]],
        [*VALID[:40], 40, 3, *VALID[42:]],
        [*VALID[:-1], 5],
        [*VALID[:-1], 41],
        [*VALID[:-1], -1],
        [40, *VALID[1:]],
        [],
    ],
    ids=[
        "length",
        "short",
        "swapped",
        "missing",
        "twice",
        "padding_first",
        "after_padding",
        "above",
        "negative",
        "padded_original",
        "empty",
    ],
)
def test_check_index_refuses_malformed_indices(values: list[int]) -> None:
    check_index(torch.tensor(VALID, dtype=torch.int32), 40, 32)
    with pytest.raises(ValueError, match="layer 7"):
        check_index(torch.tensor(values, dtype=torch.int32), 40, 32, "layer 7")


def test_check_index_refuses_other_types_and_shapes() -> None:
    for index in (torch.tensor(VALID), torch.tensor([VALID], dtype=torch.int32), torch.tensor(VALID).float()):
        with pytest.raises(ValueError, match="int32"):
            check_index(index, 40, 32)


def test_metric_is_the_largest_weight_times_the_activation() -> None:
    first, second = make_weight(0, 3, 40), make_weight(1, 5, 40)
    norm = torch.rand(40, generator=generator(0)).double()
    expected = torch.maximum(first.abs().amax(0), second.abs().amax(0))
    assert torch.equal(channel_metric([first, second]), expected)
    assert torch.equal(channel_metric([first, second], norm), expected * norm.float())
    with pytest.raises(ValueError, match="at least one"):
        channel_metric([])
    with pytest.raises(ValueError, match="activation_norm"):
        channel_metric([first], norm[:39])


def test_ratio_grows_linearly_with_depth() -> None:
    assert [split_ratio(block, 5, 0.0, 0.2) for block in range(5)] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert split_ratio(0, 1, 0.1, 0.2) == 0.1
    for block in (-1, 5):
        with pytest.raises(ValueError, match="block"):
            split_ratio(block, 5, 0, 1)


def test_padding_reads_zero_and_passes_no_gradient() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    index = torch.tensor([0, 1, 2, 1, 3], dtype=torch.int32)
    y = expand_channels(x, index)
    assert torch.equal(y, torch.cat([x, x[:, 1:2], torch.zeros(2, 1)], 1))
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 2.0, 1.0]] * 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_expanding_has_the_values_and_gradient_of_a_plain_gather(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 40, generator=generator(0)).to(dtype).requires_grad_()
    index = torch.cat([torch.arange(40), torch.tensor([39, 7, 0, 40, 40])]).to(torch.int32)
    with torch.no_grad():
        without_gradient = expand_channels(x, index)
    plain = torch.nn.functional.pad(x, (0, 1))[..., index.long()]
    y = expand_channels(x, index)
    assert torch.equal(y, plain)
    assert torch.equal(y, without_gradient)
    seed = torch.randn(y.shape, generator=generator(1)).to(dtype)
    (expected,), (found,) = torch.autograd.grad(plain, x, seed), torch.autograd.grad(y, x, seed)
    assert torch.equal(found, expected)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda x: expand_channels(x, index), x)
        assert torch.autograd.gradgradcheck(lambda x: expand_channels(x, index), x)


def test_padding_stays_zero_beside_a_value_that_is_not_finite() -> None:
    x = torch.tensor([[1.0, torch.inf]], requires_grad=True)
    y = expand_channels(x, torch.tensor([0, 1, 2], dtype=torch.int32))
    assert y.tolist() == [[1.0, torch.inf, 0.0]]
    y.backward(torch.full_like(y, torch.nan).index_fill(1, torch.tensor([0, 1]), 1.0))
    assert torch.equal(x.grad, torch.ones(1, 2))
