"""Hypothesis strategies of the core's tests: shapes, seeds and magnitudes are drawn, elements come from a generator."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bbb_ao.grid import Grid

torch.set_num_threads(1)

FEW = settings(
    deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow], database=None
)
SOME = settings(FEW, max_examples=60)

seeds = st.integers(0, 2**31 - 1)
widths = st.integers(2, 8)
act_widths = st.sampled_from([None, 2, 4, 8])
kinds = st.sampled_from(["half_step", "integer"])
# From subnormal to near the largest number whose levels are finite at every width.
magnitudes = st.sampled_from([0.0, 1e-45, 1e-38, 1e-30, 3e-8, 1e-4, 1.0, 6e4, 1e30, 1e38])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.sampled_from(["normal", "constant", "positive", "negative", "outlier", "zero_group", "mixed_magnitude"])

GRIDS = [
    Grid(),
    Grid(zero_point_bits=0),
    Grid(zero_point_bits=2),
    Grid(zero_point_bits=8),
    Grid(group_size=64),
    Grid(kind="integer", zero_point_bits=2),
    Grid(act_kind="integer"),
]


def grids(**fixed: object) -> st.SearchStrategy[Grid]:
    """Grids of both kinds; keyword arguments keep those with these values."""
    return st.sampled_from([g for g in GRIDS if all(getattr(g, key) == value for key, value in fixed.items())])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_weight(seed: int, rows: int, columns: int, shape: str = "normal", magnitude: float = 1.0) -> Tensor:
    """A [rows, columns] float32 matrix of finite values of at most `magnitude`, which is 4.5 standard deviations."""
    source = generator(seed)
    values = torch.randn(rows, columns, generator=source, dtype=torch.float64).clamp(-4.5, 4.5) / 4.5
    if shape == "constant":
        values = values[:, :1].expand(rows, columns).clone()
    elif shape == "positive":
        values = values.abs()
    elif shape == "negative":
        values = -values.abs()
    elif shape == "outlier":
        values[:, ::17] *= 1e4
        values = values / 1e4
    elif shape == "zero_group":
        values[:, :32] = 0
    elif shape == "mixed_magnitude":
        values = values * 10.0 ** (torch.rand(rows, columns, generator=source, dtype=torch.float64) * -30)
    return (values * magnitude).float()


@st.composite
def weights(draw: st.DrawFn, group_size: int = 64, dtype: st.SearchStrategy[torch.dtype] | None = None) -> Tensor:
    """Finite weights of any shape, magnitude and type; values beyond the type's range are set to its largest."""
    kind = draw(dtype if dtype is not None else st.just(torch.float32), label="dtype")
    rows, groups = draw(st.integers(1, 4), label="rows"), draw(st.integers(1, 3), label="groups")
    shape, magnitude = draw(shapes, label="shape"), draw(magnitudes, label="magnitude")
    weight = make_weight(draw(seeds, label="seed"), rows, groups * group_size, shape, magnitude)
    largest = torch.finfo(kind).max
    return weight.clamp(-largest, largest).to(kind)


def make_linear(seed: int, in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A Linear with a few outlier columns, its parameters drawn from a generator of its own."""
    source = generator(seed)
    linear = nn.Linear(in_features, out_features, bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(out_features, in_features, generator=source) / in_features**0.5)
        linear.weight[:, :: max(in_features // 3, 1)] *= 5
        if bias:
            linear.bias.copy_(torch.randn(out_features, generator=source))
    return linear


def product_bound(x: Tensor, weight: Tensor) -> Tensor:
    """Largest rounding error of float32 products: 2 (K + 2) eps sum_k |x_k| |w_k|, in float64."""
    count = weight.shape[-1] + 2
    eps = torch.finfo(torch.float32).eps
    return 2 * count * eps * (x.double().abs() @ weight.double().abs().T) + 1e-40


def has_no_padding(index: Tensor | None, in_features: int) -> bool:
    return index is None or not bool((index == in_features).any())
