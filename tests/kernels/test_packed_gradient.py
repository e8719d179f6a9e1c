"""Gradients through packed layers: frozen weights, trainable surroundings."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bbb_ao.grid import Grid
from bbb_ao.packed_linear import PackedLinear
from bbb_ao.qat_linear import QATLinear
from bbb_ao.splitting import channel_metric, choose_index


def packed_layer(act_bits: int | None, ratio: float) -> PackedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(70, 48)
    index = choose_index(channel_metric([linear.weight]), ratio)
    return PackedLinear.from_qat(QATLinear.from_linear(linear, 2, act_bits, Grid(), index), 4)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("act_bits", [None, 4])
def test_gradients_are_those_of_the_dense_layer(act_bits: int | None, ratio: float) -> None:
    layer = packed_layer(act_bits, ratio)
    x = torch.randn(2, 5, 70, requires_grad=True)
    upstream = torch.randn(2, 5, 48)
    layer(x).backward(upstream)
    dense = layer.weight.dequantize(torch.float64)
    expected = upstream.double() @ dense
    # Products of K = 48 terms in float32, once more for the sum of two copies.
    bound = 4 * 48 * torch.finfo(torch.float32).eps * (upstream.double().abs() @ dense.abs())
    assert x.grad is not None
    assert ((x.grad.double() - expected).abs() <= bound + 1e-12).all()


def test_model_with_trainable_parameters_elsewhere_compiles() -> None:
    model = nn.Sequential(nn.Embedding(10, 70), packed_layer(None, 0.5), nn.Linear(48, 3))
    ids = torch.randint(10, (2, 5))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(ids).flatten(0, 1), torch.zeros(10, dtype=torch.int64)).backward()
    first = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), torch.zeros(10, dtype=torch.int64)).backward()
    second = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(first) == 3
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right)


def test_one_compiled_row_carries_a_gradient() -> None:
    layer = packed_layer(None, 0.0)
    x = torch.randn(1, 70, requires_grad=True)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], layer.weight.dequantize().sum(0))
