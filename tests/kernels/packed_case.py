"""Random packed weights with their codes, and float64 oracles that read the codes and never the packed bytes."""

from dataclasses import dataclass, replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from bbb_ao.kernels import pack_codes, pack_planes

torch.set_num_threads(1)

FEW = settings(
    deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow], database=None
)
seeds = st.integers(0, 2**31 - 1)
columns = st.integers(1, 13).map(lambda n: 32 * n)
widths = st.integers(2, 8)
zero_point_widths = st.sampled_from([0, 1, 2, 3, 4, 8])
row_zero_point_widths = st.sampled_from([0, 2, 4, 8])
magnitudes = st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 1e4, 1e25])
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@dataclass(frozen=True)
class Case:
    """A packed weight [rows, features] and what it was made of."""

    parent: Tensor
    scale_codes: Tensor
    exponent: Tensor
    zero_codes: Tensor | None
    zero_point_bits: int
    half_step: bool
    index: Tensor | None
    in_features: int

    def operands(self, bits: int | None = None) -> tuple[Tensor | None, ...]:
        """high to index of `packed_linear`; with `bits`, without the planes that it does not need."""
        high, mid, low = pack_planes(self.parent)
        zero = None if self.zero_codes is None else pack_codes(self.zero_codes, self.zero_point_bits)
        needed = 8 if bits is None else bits
        mid, low = (mid if needed > 2 else None), (low if needed > 4 else None)
        return high, mid, low, self.scale_codes, self.exponent, zero, self.index

    def settings(self, bits: int) -> tuple[int, int, bool, int]:
        return bits, self.zero_point_bits, self.half_step, 32

    def levels(self, bits: int) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, offset, scale) in float64, all [rows, features]: w = scale * (codes + offset)."""
        codes = self.parent.double()
        if self.half_step:
            codes = torch.floor(codes / 2 ** (8 - bits))
        elif bits < 8:
            codes = torch.floor((codes + 2 ** (7 - bits)) / 2 ** (8 - bits)).clamp(max=2**bits - 1)
        zeta = torch.full(self.scale_codes.shape, 2.0, dtype=torch.float64)
        if self.zero_codes is not None:
            zeta = self.zero_codes.double() * 4 / 2**self.zero_point_bits
        offset = (0.5 if self.half_step else 0.0) - zeta * 2.0 ** (bits - 2)
        power = 2.0 ** (self.exponent.double().reshape(-1, 1) + 2 - bits)
        step = self.scale_codes.view(torch.float8_e4m3fn).double() * power
        return codes, offset.repeat_interleave(32, 1), step.repeat_interleave(32, 1)

    def weight(self, bits: int) -> Tensor:
        codes, offset, scale = self.levels(bits)
        return (codes + offset) * scale

    def columns_of(self, x: Tensor) -> Tensor:
        """x [..., in_features] as float64 [..., features], padding 0."""
        if self.index is None:
            return x.double()
        real = self.index < self.in_features
        return torch.where(real, x.double()[..., self.index.clamp(max=self.in_features - 1).long()], 0.0)

    def linear(self, x: Tensor, bits: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(y, mass of the dense product, mass of the factored product), float64 [..., rows].

        The masses are the sums of magnitudes that rounding errors are relative to: |x| |w|, and
        |x| scale (codes + |offset|) where codes and offset are summed apart.
        """
        codes, offset, scale = self.levels(bits)
        xs, added = self.columns_of(x), 0.0 if bias is None else bias.double()
        y = xs @ ((codes + offset) * scale).T + added
        dense = xs.abs() @ ((codes + offset) * scale).abs().T + abs(added)
        factored = xs.abs() @ ((codes + offset.abs()) * scale).abs().T + abs(added)
        return y, dense, factored


def make_case(
    seed: int, features: int, zero_point_bits: int = 4, half_step: bool = True, rows: int = 5, indexed: bool = False
) -> Case:
    """A random case; one group in eight has scale 0. With an index: duplicates at the end, then padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    scale = draw(1, 127, rows, features // 32) * (draw(0, 8, rows, features // 32) > 0)
    zero = draw(0, 2**zero_point_bits, rows, features // 32) if zero_point_bits else None
    index, in_features = None, features
    if indexed:
        in_features = max(1, features - 40)
        padding = min(features - in_features, 7)
        copies = torch.randint(0, in_features, (features - in_features - padding,), generator=generator)
        index = torch.cat([torch.arange(in_features), copies, torch.full((padding,), in_features)]).to(torch.int32)
    exponent = torch.tensor(int(draw(0, 40, 1)) - 20, dtype=torch.int32)
    return Case(draw(0, 256, rows, features), scale, exponent, zero, zero_point_bits, half_step, index, in_features)


def row_exponents(case: Case, lowest: int = -14, spread: int = 5) -> Case:
    """The case with an exponent for each row, as in fused layers: all of `spread` numbers from `lowest` on, in turn."""
    rows = torch.arange(case.parent.shape[0], dtype=torch.int32)
    return replace(case, exponent=lowest + rows * 3 % spread)


def random_x(seed: int, shape: tuple[int, ...], magnitude: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * magnitude).to(dtype)
