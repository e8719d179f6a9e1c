"""Experiments as lines of text, for `quality.py`.

A line is a shipped recipe or a schedule of its own, followed by settings, all parted by slashes:

    efficientqat_small/sequences=256/stages.*.lr=1e-4
    128x512/8:1/4:1/2:2@4e-4/m2:1@1e-4,objective=mixed_kl,text=both/split=0.17/lr=3e-4/generated=256

A schedule starts with sequences x tokens. A stage is `[m]bits[a act_bits][*loss weights]:epochs[@lr][,field=value...]`:
`2:4` is block-wise W2A16, `m2a2:1@2e-4` end-to-end W2A2, `8+4+2*64,8,1:3` joint with loss weights. A setting is a
dotted path into the recipe's YAML (`clip.metric=activation`); `lr` and `batch` are those of stages that name none,
`split` is `split.ratio_max`, and fields of the grid need no `grid.`.
"""

import re
from dataclasses import replace
from importlib.resources import files
from typing import Any

from bbb_ao.recipes import strict_yaml
from bbb_ao.recipes.overrides import apply_override
from bbb_ao.recipes.stages import Clip, GridSettings, Recipe, Split, Stage

REFERENCES = ("full-precision", "rtn-integer-float32")
STAGE = re.compile(r"(m?)([\d+]+)(?:a(\d))?(?:\*([\d.,]+))?:([\d.]+)(?:@([\d.e-]+))?((?:,\w+=[\w.-]+)*)")
SHORT = {"split": "split.ratio_max"} | {name: f"grid.{name}" for name in GridSettings.__dataclass_fields__}


def parse_recipe(line: str, seed: int) -> Recipe:
    """The recipe of a line.

    Raises:
        ValueError: a part that has no meaning. RecipeError: a setting that the recipe does not allow.
    """
    first, *parts = line.split("/")
    settings = dict(part.split("=", 1) for part in parts if re.match(r"[a-z_.*\d]+=", part))
    stages = [part for part in parts if part.split("=", 1)[0] not in settings]
    if re.fullmatch(r"\d+x\d+", first):
        data = _schedule(first, stages, settings)
    elif stages:
        raise ValueError(f"{line}: a shipped recipe takes settings, key=value, after its name, got {stages[0]!r}")
    else:
        data = strict_yaml.read(files("bbb_ao.recipes") / "library" / f"{first}.yaml")  # type: ignore[arg-type]
    for key, value in settings.items():
        apply_override(data, f"{SHORT.get(key, key)}={value}")
    return replace(build_recipe(data), name=line, seed=seed)


def method_of(line: str) -> str:
    """The shipped recipe or reference that a line names; "bitbybit" for a schedule of its own."""
    first = line.split("/")[0]
    return "bitbybit" if re.fullmatch(r"\d+x\d+", first) else first


def build_recipe(data: dict[str, Any]) -> Recipe:
    """A recipe from YAML's data by plain construction: the loader's checks of types need pydantic.

    Raises:
        TypeError: an unknown key. RecipeError: a value out of range.
    """
    parts: dict[str, Any] = {"grid": GridSettings, "split": Split, "clip": Clip}
    fields = {key: parts[key](**value) if key in parts and value is not None else value for key, value in data.items()}
    fields["stages"] = tuple(Stage(**{k: _tuple(v) for k, v in stage.items()}) for stage in data["stages"])
    return Recipe(**{key: _tuple(value) for key, value in fields.items()})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _schedule(size: str, stages: list[str], settings: dict[str, str]) -> dict[str, Any]:
    """The data of a line that starts with sequences x tokens; takes `lr` and `batch` out of `settings`."""
    sequences, length = map(int, size.split("x"))
    defaults = {"lr": float(settings.pop("lr", "3e-4")), "batch_size": int(settings.pop("batch", "4"))}
    parsed = [defaults | _stage(text) for text in stages]
    narrowest = parsed[-1]["weight_bits"] if parsed else 2
    return {
        "name": "x",
        "sequences": sequences,
        "sequence_length": length,
        "stages": parsed,
        "default_bits": min(narrowest) if isinstance(narrowest, list) else narrowest,
    }


def _stage(text: str) -> dict[str, Any]:
    match = STAGE.fullmatch(text)
    if match is None:
        raise ValueError(f"stage: expected [m]bits[aBITS][*weights]:epochs[@lr][,field=value...], got {text!r}")
    model, bits, act_bits, weights, epochs, lr, more = match.groups()
    widths = [int(width) for width in bits.split("+")]
    stage: dict[str, Any] = {
        "scope": "model" if model else "block",
        "weight_bits": widths if len(widths) > 1 else widths[0],
        "epochs": float(epochs),
    }
    if act_bits:
        stage["act_bits"] = int(act_bits)
    if weights:
        stage["loss_weights"] = [float(weight) for weight in weights.split(",")]
    if lr:
        stage["lr"] = float(lr)
    for item in more.split(",")[1:]:
        key, value = item.split("=")
        stage[key] = strict_yaml.parse(value, text)
    return stage
