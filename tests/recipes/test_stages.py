"""Recipes made in Python obey the same rules as those from YAML."""

from dataclasses import replace
from typing import Any

import pytest

from bbb_ao.errors import ModelError, RecipeError
from bbb_ao.recipes.stages import Clip, GridSettings, Recipe, Split, Stage

LAYERS = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")]


def recipe(**values: Any) -> Recipe:
    return Recipe(**({"name": "x", "stages": (Stage(),)} | values))


@pytest.mark.parametrize("bits", [3.5, "2", True, 0, 1, 9, -2, None, (8, 2.0), (2, 8), (8, 8), ()])
def test_bad_widths_are_refused(bits: Any) -> None:
    with pytest.raises(RecipeError, match="weight_bits: expected"):
        Stage(weight_bits=bits)


@pytest.mark.parametrize("name", ["lr", "kl_temperature"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0, True, "1", 1e9])
def test_bad_rates_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"{name}: expected a finite number > 0"):
        Stage(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, True, "1", 1e9])
def test_bad_epochs_are_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match="epochs: expected a finite number >= 0"):
        Stage(epochs=value)


def test_objectives_belong_to_model_stages_and_generated_text_to_recipes_that_have_it() -> None:
    assert Stage(scope="model", objective="mixed_kl").objective == "mixed_kl"
    with pytest.raises(RecipeError, match=r"^objective: expected none in a block stage, got 'reverse_kl'; fix: "):
        Stage(objective="reverse_kl")
    own = (Stage(), Stage(scope="model", text="both"))
    assert recipe(stages=own, generated=4).generated == 4
    with pytest.raises(RecipeError, match=r"^stages\.1\.text: expected calibration .*; fix: set generated"):
        recipe(stages=own)
    for values in ({"generated": -1}, {"average": 1.5}, {"average": -0.1}):
        with pytest.raises(RecipeError, match=next(iter(values))):
            recipe(**values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, True, "1"])
def test_bad_weights_of_logits_are_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"^logits: expected a finite number >= 0, got .*; fix: "):
        recipe(logits=value, lookahead=1)


def test_logits_need_a_lookahead() -> None:
    assert recipe(logits=0.5, lookahead=1).logits == 0.5
    with pytest.raises(RecipeError, match=r"^logits: expected 0 without lookahead, got 0\.5; fix: set lookahead"):
        recipe(logits=0.5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (-1.0,), (float("nan"),), (0.0,)])
def test_bad_loss_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match="loss_weights"):
        Stage(loss_weights=weights)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (GridSettings, {"group_size": 0}),
        (GridSettings, {"group_size": -32}),
        (GridSettings, {"group_size": 33}),
        (GridSettings, {"zero_point_bits": 9}),
        (GridSettings, {"kind": "integer", "zero_point_bits": 4}),
        (Split, {"ratio_max": 1.1}),
        (Clip, {"lowest": 0.0}),
        (Clip, {"lowest": 1.1}),
        (Clip, {"steps": 0}),
        (Split, {"ratio_min": float("nan")}),
    ],
)
def test_bad_parts_are_refused(kind: Any, values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"expected .* got .*; fix: "):
        kind(**values)


def stages(*widths: Any) -> tuple[Stage, ...]:
    return tuple(Stage(weight_bits=w, act_bits=a) for w, a in widths)


@pytest.mark.parametrize(
    "schedule",
    [
        stages((8, None), (4, None), (2, None), (2, 8), (2, 4), (2, 2)),
        stages((8, None), ((8, 4), None), ((8, 4, 2), None)),
        stages((2, None), (2, None)),
        (Stage(), Stage(scope="model")),
    ],
)
def test_falling_schedules_are_accepted(schedule: tuple[Stage, ...]) -> None:
    assert recipe(stages=schedule, default_bits=2).stages == schedule


@pytest.mark.parametrize(
    "schedule",
    [
        stages((4, None), (8, None)),
        stages(((8, 2), None), (4, None)),
        stages((2, 4), (2, 8)),
        stages((2, 4), (2, None)),
        (Stage(scope="model"), Stage()),
        (),
    ],
)
def test_rising_schedules_are_refused(schedule: tuple[Stage, ...]) -> None:
    with pytest.raises(RecipeError, match=r"^stages"):
        recipe(stages=schedule)


def test_default_bits_must_have_been_trained() -> None:
    joint = stages(((8, 4, 2), None))
    assert recipe(stages=joint, default_bits=3).default_bits == 3
    for bits, schedule in ((4, stages((2, None))), (2, stages((4, None))), (9, joint), (True, joint)):
        with pytest.raises(RecipeError, match="default_bits"):
            recipe(stages=schedule, default_bits=bits)


def test_select_takes_all_layers_by_default_and_keeps_their_order() -> None:
    assert recipe().select(LAYERS) == tuple(LAYERS)
    chosen = recipe(targets=(r".*up_proj", r".*\.1\..*"), skip=(r".*\.0\..*",)).select(LAYERS)
    assert chosen == tuple(n for n in LAYERS if ("up_proj" in n or ".1." in n) and ".0." not in n)
    # The whole name has to match: layer 1 is not layer 11.
    assert recipe(targets=(r"model\.layers\.1\.mlp\.up_proj",)).select(LAYERS) == ("model.layers.1.mlp.up_proj",)


@pytest.mark.parametrize(
    ("values", "field"),
    [({"targets": ("up_proj",)}, "targets.0"), ({"skip": (".*", "lm_head")}, "skip.1"), ({"skip": (".*",)}, "skip")],
)
def test_pattern_that_matches_no_layer_is_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{field}: expected .*; fix: "):
        recipe(**values).select(LAYERS)


def test_model_without_linears_is_refused() -> None:
    with pytest.raises(ModelError, match="got none"):
        recipe().select([])


def test_names_of_stages_are_short() -> None:
    assert [s.name for s in (Stage(), Stage(weight_bits=(8, 4), act_bits=8), Stage(scope="model"))] == [
        "w2a16",
        "w8+4a8",
        "w2a16 model",
    ]


@pytest.mark.parametrize("bits", [0, 1, 4, 8, True, 2.0])
def test_kept_bits_must_be_below_the_widths(bits) -> None:
    with pytest.raises(RecipeError, match="keep_bits"):
        Stage(weight_bits=(8, 4), keep_bits=bits)


def test_kept_bits_are_those_that_the_stage_before_trained() -> None:
    below = Stage(weight_bits=(8, 4), keep_bits=2)
    assert recipe(stages=(Stage(weight_bits=2), below, below), default_bits=3).default_bits == 3
    for stages in ((below,), (Stage(weight_bits=4), below), (Stage(weight_bits=2), replace(below, keep_bits=3))):
        with pytest.raises(RecipeError, match="keep_bits"):
            recipe(stages=stages)
    with pytest.raises(RecipeError, match="train"):
        replace(below, train="scales")
