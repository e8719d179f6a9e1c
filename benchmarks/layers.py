"""Linear layers to compare: random weights in each implementation's own form, and what it should compute."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bare_kernels import kernels
from torch import Tensor

GROUP_SIZE = 32
ZERO_POINT_BITS = 4
# Rows of the weight whose outputs are compared with float64.
CHECKED_ROWS = 128
# E4M3 patterns of 2**-2 to 2**2.
SCALE_CODES = (40, 72)
SCALE_EXPONENT = -6


@dataclass(frozen=True)
class Layer:
    """One implementation of a linear layer.

    Attributes:
        calls: [m, K] bfloat16 -> [m, N], one for each copy of the weight.
        weight_bytes: bytes of one copy, all of which a call must read from memory.
        expected: what calls[0] should give for the first CHECKED_ROWS outputs, float64, from the weight as it is
            stored.
        tolerance: on ||y - expected|| / ||expected||.
        details: for the result rows.
    """

    calls: Sequence[Callable[[Tensor], Tensor]]
    weight_bytes: int
    expected: Callable[[Tensor], Tensor]
    tolerance: float
    details: dict[str, object]

    def relative_error(self, x: Tensor) -> float:
        """||y - expected|| / ||expected||.

        Raises:
            ValueError: above `tolerance`, or not finite.
        """
        expected = self.expected(x)
        y = self.calls[0](x)[:, :CHECKED_ROWS].double()
        error = ((y - expected).norm() / expected.norm()).item()
        if not error <= self.tolerance:
            raise ValueError(f"relative error: expected at most {self.tolerance}, found {error:.3g}")
        return error


def nbytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def copies_for(weight_bytes: int, rotation: int) -> int:
    """Copies so that between two uses of one, `rotation` bytes of others are read."""
    return 1 + max(1, -(-rotation // weight_bytes))


def make_dense(n: int, k: int, rotation: int, generator: torch.Generator) -> Layer:
    """F.linear in bfloat16."""
    draw = {"dtype": torch.bfloat16, "device": generator.device, "generator": generator}
    weights = [torch.randn(n, k, **draw) * k**-0.5 for _ in range(copies_for(2 * n * k, rotation))]
    return Layer(
        [lambda x, w=w: F.linear(x, w) for w in weights],
        nbytes(weights[:1]),
        lambda x: x.double() @ weights[0][:CHECKED_ROWS].double().T,
        0.01,
        {},
    )


def random_packed(n: int, k: int, bits: int, generator: torch.Generator) -> tuple[Tensor | None, ...]:
    """Operands of `packed_linear` from high to zero_point, drawn in the packed layout, which any bytes are valid in."""

    def draw(width: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, (n, width), dtype=torch.uint8, device=generator.device, generator=generator)

    groups = k // GROUP_SIZE
    return (
        draw(k // 4),
        draw(k // 4) if bits > 2 else None,
        draw(k // 2) if bits > 4 else None,
        draw(groups, *SCALE_CODES),
        torch.tensor(SCALE_EXPONENT, dtype=torch.int32, device=generator.device),
        draw(groups * ZERO_POINT_BITS // 8),
    )


def make_packed(impl: str, n: int, k: int, rotation: int, generator: torch.Generator) -> Layer:
    """`packed_linear` (w2a16) or `packed_linear_dynamic` (w2a4), on the half-step grid without a bias or an index."""
    match = re.fullmatch(r"w([2-8])a(16|[2-8])", impl)
    if match is None:
        raise ValueError(f"impl: expected w[2-8]a16 or w[2-8]a[2-8], found {impl!r}")
    bits, act_bits = int(match[1]), int(match[2])
    weights = [random_packed(n, k, bits, generator)]
    weight_bytes = nbytes(weights[0])
    weights += [random_packed(n, k, bits, generator) for _ in range(copies_for(weight_bytes, rotation) - 1)]
    settings = (bits, ZERO_POINT_BITS, True, GROUP_SIZE)

    def call(x: Tensor, weight: tuple[Tensor | None, ...]) -> Tensor:
        if act_bits == 16:
            return kernels.packed_linear(x, *weight, None, None, *settings)
        return kernels.packed_linear_dynamic(x, *weight, None, None, *settings, act_bits, True)

    def expected(x: Tensor) -> Tensor:
        rows = [t if t is None or t.dim() == 0 else t[:CHECKED_ROWS] for t in weights[0]]
        dense = kernels.dequantize_packed(*rows, *settings, dtype=torch.float64)
        values = x.double()
        if act_bits < 16:
            grouped = x.float().unflatten(-1, (-1, GROUP_SIZE))
            values = kernels.fake_quantize_activation(grouped, act_bits, True).flatten(-2).double()
        return values @ dense.T

    calls = [lambda x, weight=weight: call(x, weight) for weight in weights]
    return Layer(calls, weight_bytes, expected, 0.02, {"group_size": GROUP_SIZE})
