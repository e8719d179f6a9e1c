"""The `quantization_config` of a packed checkpoint, checked against itself and against the stored tensors.

From the configuration follow the name, type and shape of every packed tensor; a file's header holds the same. Both are
compared before a tensor is read, without torch, so that no size reaches a kernel that it was not made for.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bbb_ao.errors import ModelError
from bbb_ao.safetensors_header import TensorEntry

FORMAT_VERSION = 1
MOST_FEATURES = 2**31 - 1  # indices are int32
FIX = "fix: restore the config.json that was saved with the weights"
FLOATS = ("F16", "BF16", "F32", "F64")
PLANE_WIDTHS = {"plane_mid": 2, "plane_low": 4}  # the widest slice that needs neither this plane nor those after it


class Rule(NamedTuple):
    """What a field must be: in words, as a predicate, and whether it may be left out."""

    expected: str
    holds: Callable[[Any], bool]
    optional: bool = False


def _whole(low: int, high: int = MOST_FEATURES) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _or_none(rule: Rule, optional: bool = False) -> Rule:
    return Rule(f"null or {rule.expected}", lambda value: value is None or rule.holds(value), optional)


def _one_of(*values: str) -> Rule:
    return Rule(" or ".join(values), lambda value: isinstance(value, str) and value in values)


YES_OR_NO = Rule("true or false", lambda value: isinstance(value, bool))
WIDTH = _whole(2, 8)
TEXT = Rule("a name", lambda value: isinstance(value, str) and value.isprintable())
GRID = {
    "kind": _one_of("half_step", "integer"),
    "group_size": Rule("a multiple of 32", lambda value: _whole(32).holds(value) and value % 32 == 0),
    "zero_point_bits": _whole(0, 8),
    "scale_format": _one_of("e4m3"),
    "parent_bits": WIDTH,
    "act_kind": _or_none(_one_of("half_step", "integer"), optional=True),
}
MODULE = {
    "in_features": _whole(1),
    "out_features": _whole(1),
    "stored_features": _whole(1),
    "max_bits": WIDTH,
    "act_bits": _or_none(WIDTH),
    "expands_input": YES_OR_NO,
    "padding": _whole(0),
    "stored_rows": _or_none(_whole(1)),
    "bias": YES_OR_NO,
    "fixed_bits": Rule(YES_OR_NO.expected, YES_OR_NO.holds, optional=True),
    "index_source": _or_none(TEXT),
    "bits": _or_none(WIDTH, optional=True),
}


def check_packed_config(quantization: Any, where: str = "config.json") -> None:
    """Refuse a description that no packed model has.

    Args:
        quantization: the value of `quantization_config`.
        where: the file, for the message.
    Raises:
        ModelError: names the field, what was expected and what stands there.
    """
    where = f"{where}: quantization_config"
    if not isinstance(quantization, dict):
        raise _refused(where, "fields of a packed checkpoint", quantization)
    version = quantization.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ModelError(f"{where}.format_version: expected {FORMAT_VERSION}, got {version!r:.40}; fix: update bbb_ao")
    _check_fields(f"{where}.grid", quantization.get("grid"), GRID)
    grid: dict[str, Any] = quantization["grid"]
    modules, norms = quantization.get("modules"), quantization.get("duplicated_outputs")
    if grid["kind"] == "integer" and grid["zero_point_bits"] != 2:
        raise _refused(f"{where}.grid.zero_point_bits", "2 on the integer grid", grid["zero_point_bits"])
    if not isinstance(modules, dict) or not modules:
        raise _refused(f"{where}.modules", "at least one packed layer", modules)
    if not isinstance(norms, dict):
        raise _refused(f"{where}.duplicated_outputs", "names and numbers of columns", norms)
    for name, columns in norms.items():
        if not _whole(1).holds(columns) or columns % grid["group_size"]:
            raise _refused(f"{where}.duplicated_outputs: {name:.100}", "whole groups of columns", columns)
    for name, shape in modules.items():
        _check_fields(f"{where}.modules: {name:.100}", shape, MODULE)
    sources = {f"{name}.duplicate_index": (columns, None) for name, columns in norms.items()}
    for name, shape in modules.items():
        if shape["stored_rows"] is not None:
            sources[f"{name}.out_index"] = (shape["stored_rows"], shape["out_features"])
    for name, shape in modules.items():
        _check_sizes(f"{where}.modules: {name:.100}", name, shape, grid, sources)


def _check_fields(where: str, fields: Any, rules: Mapping[str, Rule]) -> None:
    if not isinstance(fields, dict):
        raise _refused(where, f"{', '.join(rules)}", fields)
    if unknown := fields.keys() - rules.keys():
        raise _refused(where, "known fields", min(map(str, unknown)))
    for field, rule in rules.items():
        if field not in fields:
            if not rule.optional:
                raise _refused(f"{where}: {field}", rule.expected, "none")
        elif not rule.holds(fields[field]):
            raise _refused(f"{where}: {field}", rule.expected, fields[field])


def _check_sizes(
    where: str, name: str, shape: dict[str, Any], grid: dict[str, Any], sources: Mapping[str, tuple[int, int | None]]
) -> None:
    """Sizes of one layer against each other and against the index that its columns follow."""
    size, stored, channels = grid["group_size"], shape["stored_features"], shape["in_features"]
    if stored % size or stored < channels:
        raise _refused(f"{where}: stored_features", f"whole groups of {size}, at least {channels}", stored)
    if shape["padding"] > stored - channels:
        raise _refused(f"{where}: padding", f"at most {stored - channels}", shape["padding"])
    if shape["max_bits"] > grid["parent_bits"]:
        raise _refused(f"{where}: max_bits", f"at most parent_bits, {grid['parent_bits']}", shape["max_bits"])
    lowest = 2 if not shape.get("fixed_bits") and (grid["kind"] == "half_step" or shape["max_bits"] == 8) else None
    own = shape.get("bits")
    if own is not None and not (lowest or shape["max_bits"]) <= own <= shape["max_bits"]:
        raise _refused(f"{where}: bits", f"a stored width, up to {shape['max_bits']}", own)
    rows = shape["stored_rows"]
    if rows is not None and (rows % size or rows < shape["out_features"]):
        raise _refused(f"{where}: stored_rows", f"whole groups of {size}, at least {shape['out_features']}", rows)
    source = shape["index_source"]
    if shape["expands_input"]:
        if source != f"{name}.ocs_index":
            raise _refused(f"{where}: index_source", f"{name}.ocs_index", source)
    elif source is None:
        if stored != channels:
            raise _refused(f"{where}: stored_features", f"{channels}, as there is no index", stored)
    elif source not in sources:
        raise _refused(f"{where}: index_source", "an index of a norm or of a layer's rows", source)
    elif sources[source][0] != stored or sources[source][1] not in (None, channels):
        raise _refused(f"{where}: index_source", f"an index from {channels} to {stored} columns", source)


def _refused(where: str, expected: str, got: Any) -> ModelError:
    return ModelError(f"{where}: expected {expected}, got {got!r:.60}; {FIX}")


def expected_tensors(quantization: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """safetensors types and shape of every packed tensor, by name, from a configuration that was checked."""
    size, zero_bits = quantization["grid"]["group_size"], quantization["grid"]["zero_point_bits"]
    codes, numbers = ("U8",), ("I32",)
    tensors: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    for name, shape in quantization["modules"].items():
        out, stored = shape["out_features"], shape["stored_features"]
        groups = stored // size
        own: dict[str, tuple[tuple[str, ...], tuple[int, ...]] | None] = {
            "plane_high": (codes, (out, stored // 4)),
            "plane_mid": (codes, (out, stored // 4)) if shape["max_bits"] > 2 else None,
            "plane_low": (codes, (out, stored // 2)) if shape["max_bits"] > 4 else None,
            "scale": (codes, (out, groups)),
            "scale_exponent": (numbers, ()),
            "zero_point": (codes, (out, -(-groups * zero_bits // 8))) if zero_bits else None,
            "ocs_index": (numbers, (stored,)) if shape["expands_input"] else None,
            "out_index": None if shape["stored_rows"] is None else (numbers, (shape["stored_rows"],)),
            "bias": (FLOATS, (out,)) if shape["bias"] else None,
        }
        tensors |= {f"{name}.{key}": value for key, value in own.items() if value is not None}
    for name, columns in quantization["duplicated_outputs"].items():
        tensors[f"{name}.duplicate_index"] = (numbers, (columns,))
    return tensors


def check_stored(quantization: dict[str, Any], stored: Mapping[str, TensorEntry]) -> None:
    """Compare the headers of a checkpoint with its configuration.

    Raises:
        ModelError: a packed tensor is missing, of another type or shape, or one too many; names the first.
    """
    for name, (types, shape) in expected_tensors(quantization).items():
        entry = stored.get(name)
        if entry is not None and entry.dtype in types and entry.shape == shape:
            continue
        found = "none" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        width = PLANE_WIDTHS.get(name.rpartition(".")[2])
        layer = quantization["modules"].get(name.rpartition(".")[0], {})
        loads = ""
        if width is not None and quantization["grid"]["kind"] == "half_step" and not layer.get("fixed_bits"):
            loads = f" (the planes before it load up to {width} bits)"
        raise ModelError(
            f"{name}: expected {' or '.join(types)} {list(shape)}, got {found}{loads}; fix: copy all files again"
        )
    known = expected_tensors(quantization).keys()
    for name in stored.keys() - known:
        parent, _, key = name.rpartition(".")
        if parent in quantization["modules"] or key in ("plane_high", "duplicate_index"):
            raise ModelError(f"{name}: expected no such tensor by the configuration, got one; {FIX}")
