"""A perplexity is kept with what it depends on, beside the checkpoint and nowhere else."""

import json
import os

import pytest
import torch

from bbb_ao.errors import ModelError, ResourceError
from bbb_ao.packed_linear import set_bits
from bbb_ao.recipes.compress import pack, train
from bbb_ao.recipes.evaluate import perplexity
from bbb_ao.recipes.evaluations import Text, baseline_rows, check_store, perplexity_row, store_row
from bbb_ao.recipes.prepare import round_to_nearest
from bbb_ao.recipes.stages import Stage
from bbb_ao.storage import footprint

CPU = torch.device("cpu")


def test_a_row_says_what_was_measured(make_model, make_recipe, ids):
    recipe = make_recipe(stages=(Stage(weight_bits=(8, 2), epochs=0),), default_bits=2)
    source = make_model("llama")
    packed = pack(train(source, ids, recipe, CPU).model, source, recipe)
    row = perplexity_row(set_bits(packed, 2), "checkpoint", 2, Text(ids, "text", 3, CPU))
    assert row["ppl"] == pytest.approx(perplexity(packed, ids, 3), rel=1e-4)
    assert row["bits_per_weight"] == pytest.approx(footprint(packed, 2).bits_per_weight, abs=1e-4)
    assert (row["windows"], row["window"], row["tokens"], row["batch"], row["backend"]) == (8, 32, 248, 3, "bbb_ao")
    assert row["versions"]["torch"] == torch.__version__
    json.dumps(row, allow_nan=False)
    assert perplexity_row(source, "full_precision", None, Text(ids, "text", 3, CPU))["bits_per_weight"] is None


def test_baselines_are_the_model_and_its_round_to_nearest(make_model, make_recipe, ids, tmp_path):
    recipe = make_recipe(stages=(Stage(weight_bits=(8, 2), epochs=0),), default_bits=2)
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    rows = list(baseline_rows(tmp_path, recipe, [8, 2, "mixed"], Text(ids, "text", 4, CPU)))
    assert [(row["of"], row["bits"]) for row in rows] == [
        ("full_precision", None),
        ("round_to_nearest", 8),
        ("round_to_nearest", 2),
    ]
    assert rows[0]["ppl"] == pytest.approx(perplexity(model, ids), rel=1e-5)
    assert rows[2]["ppl"] == pytest.approx(perplexity(round_to_nearest(model, recipe), ids), rel=1e-3)
    assert rows[1]["bits_per_weight"] > 8 > 3 > rows[2]["bits_per_weight"] > 2


def test_rows_are_appended(tmp_path):
    assert check_store(tmp_path)
    store_row(tmp_path, {"a": 1})
    store_row(tmp_path, {"b": 2})
    assert (tmp_path / "evaluations.jsonl").read_text() == '{"a": 1}\n{"b": 2}\n'
    assert check_store(tmp_path)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluations.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"evaluations.jsonl: file: expected a regular one, got a link"):
        check_store(tmp_path / "out")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not check_store(tmp_path)
    with pytest.raises(ResourceError, match=r"evaluations.jsonl: file: expected it writable"):
        store_row(tmp_path / "absent", {})
