"""Verification of packed layers: what is right passes at every width, and a wrong product is named."""

import copy

import pytest
import torch
from torch import nn

from bbb_ao import packed_tensor
from bbb_ao.convert import convert_model
from bbb_ao.errors import NumericsError
from bbb_ao.packed_head import pack_head
from bbb_ao.packed_linear import PackedLinear, packed_linears, set_bits
from bbb_ao.verify_packed import reference_product, reference_weight, verify_packed
from core.conftest import packed_llama, prepared_llama

UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("act_bits", [None, 4])
def test_every_layer_passes_at_every_width_and_keeps_its_own(act_bits: int | None) -> None:
    model = set_bits(copy.deepcopy(packed_llama(0.5, act_bits)), 3)
    seen = []
    checks = verify_packed(model, seen.append)
    assert checks == seen
    assert [(check.bits, check.layers) for check in checks] == [(bits, 14) for bits in range(2, 9)]
    assert all(0 < check.share <= 1 for check in checks), checks
    assert {check.layer for check in checks} <= set(packed_linears(model))
    assert {layer.bits for layer in packed_linears(model).values()} == {3}
    assert not any(layer._forward_hooks for layer in packed_linears(model).values())


def test_activations_may_have_a_grid_of_their_own() -> None:
    model = convert_model(prepared_llama(0.5, 4, act_kind="integer"), 8).eval()
    assert len(verify_packed(model)) == 7


def test_narrow_layers_and_heads_are_checked_at_the_widths_that_they_store() -> None:
    model = pack_head(copy.deepcopy(packed_llama(0.5, None, 4)), 8)
    assert [(check.bits, check.layers) for check in verify_packed(model)] == [(2, 14), (3, 14), (4, 14), (8, 1)]


@pytest.mark.parametrize(
    ("settings", "max_bits"),
    [
        ({"kind": "integer", "zero_point_bits": 2}, 8),
        ({"kind": "integer", "zero_point_bits": 2}, 4),
        ({"zero_point_bits": 0}, 8),
        ({"zero_point_bits": 3}, 8),
    ],
)
def test_reference_weight_is_the_packed_one(settings: dict, max_bits: int) -> None:
    model = convert_model(prepared_llama(0.5, **settings), max_bits)
    for layer in packed_linears(model).values():
        for bits in range(2 if max_bits == 8 or settings.get("kind") != "integer" else max_bits, max_bits + 1):
            layer.set_bits(bits)
            weight, _ = reference_weight(layer, slice(3, 20))
            assert torch.equal(weight, layer.weight.stored_weight(torch.float64)[3:20])
    assert verify_packed(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_products_stay_within_their_bound(dtype: torch.dtype) -> None:
    assert len(verify_packed(copy.deepcopy(packed_llama()).to(dtype))) == 7


def test_slabs_give_the_same_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed_linears(packed_llama())[UP]
    x = torch.randn(3, layer.stored_features, generator=torch.Generator().manual_seed(0))
    whole = reference_product(layer, x)
    monkeypatch.setattr("bbb_ao.verify_packed.SLAB", 5 * layer.stored_features)
    for one, other in zip(whole, reference_product(layer, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def spoil(monkeypatch: pytest.MonkeyPatch, change) -> None:
    right = packed_tensor.packed_linear
    monkeypatch.setattr(packed_tensor, "packed_linear", lambda x, *rest: change(right(x, *rest), x))


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x: y + 1e-2 * y.abs().max(),
        lambda y, x: y.index_fill(-1, torch.tensor([7]), torch.nan),
        lambda y, x: y.roll(1, -1),
        # Only where one row is computed alone, as when decoding.
        lambda y, x: y.roll(1, -1) if x.numel() == x.shape[-1] else y,
    ],
    ids=["shifted", "NaN", "rolled", "one row"],
)
def test_a_wrong_product_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, change) -> None:
    spoil(monkeypatch, change)
    with pytest.raises(
        NumericsError, match=r"^model\.layers\.0\.self_attn\.q_proj: output at 2 bits: expected .*; fix"
    ):
        verify_packed(copy.deepcopy(packed_llama()))


def test_a_wrong_plane_layout_is_seen() -> None:
    # The product at 2 bits reads another plane than the reference: as a kernel that takes the wrong bits would.
    model = copy.deepcopy(packed_llama())
    layer = packed_linears(model)[UP]
    product = layer.product
    other = copy.deepcopy(layer)
    other.plane_high = other.plane_high.flip(-1)
    layer.product = lambda x: other.product(x) if layer.bits == 5 else product(x)  # type: ignore[method-assign]
    other.bits = 5
    with pytest.raises(NumericsError, match=rf"^{UP}: output at 5 bits"):
        verify_packed(model)


def test_the_bound_is_narrower_than_the_smallest_step_of_a_weight() -> None:
    layer = copy.deepcopy(packed_linears(set_bits(copy.deepcopy(packed_llama()), 8))[UP])
    assert layer.plane_low is not None
    x = torch.ones(1, layer.in_features if layer.expands_input else layer.stored_features)
    exact, bound = reference_product(layer, x)
    layer.plane_low[:, 0] ^= 1
    changed, _ = reference_product(layer, x)
    assert bool(((changed - exact).abs() > bound).all())


def test_layers_that_no_token_reaches_are_checked_too() -> None:
    model = copy.deepcopy(packed_llama())
    expert = copy.deepcopy(packed_linears(model)[UP])
    assert isinstance(expert, PackedLinear)
    model.model.layers[0].experts = nn.ModuleList([expert])
    assert {check.layers for check in verify_packed(model)} == {15}
    expert.scale.fill_(0x7F)
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.experts\.0: output at 2 bits"):
        verify_packed(model)
