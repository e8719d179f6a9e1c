"""The description of a packed checkpoint: names every tensor that the modules have, and nothing odd gets past it."""

import copy
import json
from collections.abc import Callable

import pytest

from bbb_ao.convert import convert_model
from bbb_ao.errors import ModelError
from bbb_ao.huggingface import quantization_config
from bbb_ao.packed_config import GRID, MODULE, check_packed_config, check_stored, expected_tensors
from bbb_ao.packed_head import pack_head
from bbb_ao.packed_linear import packed_linears
from bbb_ao.safetensors_header import TensorEntry
from core.conftest import packed_llama, prepared_llama

NAME = "model.layers.0.mlp.down_proj"
NAMES = {"torch.uint8": "U8", "torch.int32": "I32", "torch.float32": "F32"}


def described(model) -> dict:
    return json.loads(json.dumps(quantization_config(model).to_dict()))


@pytest.fixture
def good() -> dict:
    return described(packed_llama())


def stored(model) -> dict[str, TensorEntry]:
    buffers = {f"{name}.{key}": b for name, layer in packed_linears(model).items() for key, b in layer.named_buffers()}
    buffers |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("duplicate_index")}
    return {name: TensorEntry(NAMES[str(b.dtype)], tuple(b.shape), 0, b.nbytes) for name, b in buffers.items()}


@pytest.mark.parametrize("max_bits", [2, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"kind": "integer", "zero_point_bits": 2}, {"zero_point_bits": 0}])
def test_expected_tensors_are_those_of_the_modules(settings: dict, max_bits: int) -> None:
    model = pack_head(convert_model(prepared_llama(0.5, **settings), max_bits), max_bits)
    config = described(model)
    check_packed_config(config)
    tensors = stored(model)
    expected = expected_tensors(config)
    assert expected.keys() == tensors.keys()
    for name, (types, shape) in expected.items():
        assert tensors[name].dtype in types, name
        assert tensors[name].shape == shape, name
    check_stored(config, tensors)


ODD = (None, True, -1, 0, 1.5, 33.0, "8", "", [], {}, 2**31, 10**30, float("nan"), "../x")
# What may stand there, besides the value itself.
FINE = {
    "grid": {"act_kind": (None,)},
    "modules": {"act_bits": (None,), "stored_rows": (None,), "bias": (True,), "fixed_bits": (True,), "bits": (None,)},
}


@pytest.mark.parametrize("field", MODULE)
def test_odd_values_of_a_layer_are_refused(good: dict, field: str) -> None:
    check_packed_config(good)
    for value in ODD:
        if any(value is fine for fine in FINE["modules"].get(field, ())) or value == good["modules"][NAME].get(field):
            continue
        bad = copy.deepcopy(good)
        bad["modules"][NAME][field] = value
        with pytest.raises(ModelError, match=rf"^config\.json: quantization_config\.modules: {NAME}.*; fix: restore"):
            check_packed_config(bad)
    if not MODULE[field].optional:
        del good["modules"][NAME][field]
        with pytest.raises(ModelError, match=rf"{NAME}: {field}: expected .*, got 'none'"):
            check_packed_config(good)


@pytest.mark.parametrize("field", GRID)
def test_odd_values_of_the_grid_are_refused(good: dict, field: str) -> None:
    for value in ODD:
        bad = copy.deepcopy(good)
        bad["grid"][field] = value
        # No zero point at all is a grid of its own.
        if (field, value) == ("zero_point_bits", 0) and value is not False:
            continue
        if any(value is fine for fine in FINE["grid"].get(field, ())):
            continue
        with pytest.raises(ModelError, match=r"quantization_config\.(grid|modules)"):
            check_packed_config(bad)
    del good["grid"][field]
    if GRID[field].optional:
        return check_packed_config(good)
    with pytest.raises(ModelError, match=rf"grid: {field}: expected"):
        check_packed_config(good)


@pytest.mark.parametrize("field", ["grid", "modules", "duplicated_outputs", "format_version"])
def test_odd_values_at_the_top_are_refused(good: dict, field: str) -> None:
    for value in ODD:
        if field == "duplicated_outputs" and value == {}:
            continue
        with pytest.raises(ModelError, match=f"{field}"):
            check_packed_config({**good, field: value})
    for value in ODD:
        with pytest.raises(ModelError):
            check_packed_config(value)


BAD: dict[str, tuple[Callable[[dict], object], str]] = {
    "another field": (lambda c: c["modules"][NAME].update(code="x"), "known fields"),
    "columns that are no groups": (
        lambda c: c["modules"][NAME].update(stored_features=161),
        "stored_features: expected whole groups of 32, at least 96, got 161",
    ),
    "fewer columns than channels": (
        lambda c: c["modules"][NAME].update(stored_features=64),
        "stored_features: expected whole groups of 32, at least 96, got 64",
    ),
    "columns of another index": (
        lambda c: c["modules"][NAME].update(stored_features=192),
        "index_source: expected an index from 96 to 192 columns",
    ),
    "an index of other channels": (
        lambda c: c["modules"][NAME].update(in_features=95),
        "index_source: expected an index from 95 to 160 columns",
    ),
    "an index of no one": (
        lambda c: c["modules"][NAME].update(index_source="model.layers.0.input_layernorm.weight"),
        "index_source: expected an index of a norm or of a layer's rows",
    ),
    "no index": (
        lambda c: c["modules"][NAME].update(index_source=None),
        "stored_features: expected 96, as there is no index",
    ),
    "another's own index": (
        lambda c: c["modules"]["model.layers.0.self_attn.o_proj"].update(index_source="x.ocs_index"),
        "index_source: expected model.layers.0.self_attn.o_proj.ocs_index",
    ),
    "more padding than columns": (lambda c: c["modules"][NAME].update(padding=65), "padding: expected at most 64"),
    "rows that are no groups": (
        lambda c: c["modules"]["model.layers.0.mlp.gate_proj"].update(stored_rows=161),
        "stored_rows: expected whole groups of 32, at least 96, got 161",
    ),
    "fewer rows": (
        lambda c: c["modules"]["model.layers.0.mlp.gate_proj"].update(stored_rows=64),
        "stored_rows: expected whole groups of 32, at least 96, got 64",
    ),
    "a width that is not stored": (
        lambda c: c["modules"][NAME].update(max_bits=4, bits=8),
        "bits: expected a stored width, up to 4",
    ),
    "wider than the parent": (lambda c: c["grid"].update(parent_bits=4), "max_bits: expected at most parent_bits, 4"),
    "an integer grid's zero points": (
        lambda c: c["grid"].update(kind="integer"),
        "zero_point_bits: expected 2 on the integer grid",
    ),
    "a norm's columns": (
        lambda c: c["duplicated_outputs"].update({"model.layers.0.input_layernorm": 97}),
        "expected whole groups of columns",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_sizes_that_do_not_fit_each_other_are_refused(good: dict, name: str) -> None:
    change, words = BAD[name]
    change(good)
    with pytest.raises(ModelError, match=rf"^config\.json: quantization_config\..*{words}.*; fix: "):
        check_packed_config(good)


@pytest.mark.parametrize(("plane", "width"), [("plane_mid", 2), ("plane_low", 4)])
def test_a_missing_plane_names_the_width_that_loads(good: dict, plane: str, width: int) -> None:
    tensors = stored(packed_llama())
    del tensors[f"{NAME}.{plane}"]
    with pytest.raises(ModelError, match=rf"^{NAME}\.{plane}: expected U8 .*, got none .* load up to {width} bits"):
        check_stored(good, tensors)


def test_surplus_packed_tensors_are_refused(good: dict) -> None:
    for name in (f"{NAME}.weight", f"{NAME}.plane_extra", "model.layers.7.mlp.up_proj.plane_high"):
        with pytest.raises(ModelError, match=rf"^{name}: expected no such tensor"):
            check_stored(good, stored(packed_llama()) | {name: TensorEntry("U8", (1,), 0, 1)})
