"""Shipped recipes, overrides, and the way back to YAML. Bad files are in tests/cli/test_recipe_errors.py."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbb_ao.errors import RecipeError
from bbb_ao.recipes.loader import dump_recipe, load_recipe, shipped_recipes
from bbb_ao.recipes.strict_yaml import parse


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_shipped_schedules_are_the_methods() -> None:
    schedules = {
        name: [stage.name for stage in load_recipe(name).stages if stage.scope == "block"] for name in shipped_recipes()
    }
    assert schedules["w2a16"][-1] == schedules["smoke"][-1] == "w2a16"
    assert schedules["w2a2"] == schedules["w2a2_light"] == ["w2a16", "w2a2"]
    assert schedules["any_precision"] == ["w2a16", "w8+4a16"]
    assert schedules["bitbybit"] == ["w8a16", "w4a16", "w2a16"]
    for budget in ("light", "best"):
        assert load_recipe(f"any_precision_{budget}").stages[-1].keep_bits == 2
        for name in ("w2a16", "w2a2"):
            assert schedules[f"{name}_{budget}"][-1] == schedules[name][-1]
            assert load_recipe(f"{name}_{budget}").grid == load_recipe(name).grid


def test_overrides_apply_in_order_and_are_typed() -> None:
    recipe = load_recipe(
        "smoke",
        [
            "sequences=7",
            "sequences=9",
            "stages.*.lr=1e-4",
            "stages.2.lr=2",
            "grid.zero_point_bits=8",
            "split.ratio_max=.1",
        ],
    )
    assert recipe.sequences == 9
    assert [s.lr for s in recipe.stages] == [1e-4, 1e-4, 2.0]
    assert recipe.grid.zero_point_bits == 8
    assert recipe.split is not None
    assert recipe.split.ratio_max == 0.1
    assert load_recipe("smoke", ["split=null"]).split is None
    assert load_recipe("smoke", ["split=null", "split.metric=weight"]).split is not None
    assert load_recipe("smoke", ["targets=['.*_proj']"]).targets == (".*_proj",)
    assert load_recipe("smoke", ["stages.1={weight_bits: [4, 3], loss_weights: [1, 0.5]}"]).stages[1].widths == (4, 3)


def test_message_names_file_field_and_fix(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nstages:\n  - {weight_bits: 2, lr: -1}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    expected = f"{path}: stages.0.lr: expected a finite number > 0 and <= 10, got -1.0; fix: for example 0.0003"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.", 1.0),
        ("-3", -3),
        ("+.5e3", 500.0),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("~", None),
        ("true", True),
        ("[a, 'null', 3]", ["a", "null", 3]),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = parse(text, "x")
    assert found == value
    assert type(found) is type(value)


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused_in_one_line(text: str) -> None:
    message = "x: "
    try:
        parse(text, "x")
    except RecipeError as error:
        message = str(error)
    assert message.startswith("x: ")
