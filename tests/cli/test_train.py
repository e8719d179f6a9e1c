"""The main job on a tiny model: train, eval at every width, inspect; and what `train` refuses with the model open."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bbb_ao.recipes.loader import load_recipe

SMALL = ("--set", "sequences=4", "sequence_length=32", "micro_batch=2", "stages.*.epochs=1", "split.ratio_max=0.9")
SMALL += ("generated=2",)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An any_precision checkpoint of the tiny model, with the text it was trained on beside it."""
    from bbb_ao.cli import main

    folder = tmp_path_factory.mktemp("trained")
    text = folder / "data.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(20)))
    files = ("--data", str(text), "--recipe", "any_precision", "--output", str(folder / "out"))
    assert main(["train", str(tiny_model), *files, *SMALL]) == 0
    return folder


def test_train_leaves_checkpoint_recipe_and_log(trained: Path) -> None:
    assert sorted(p.name for p in trained.iterdir()) == ["data.jsonl", "out", "out.log.jsonl"]
    recipe = load_recipe(trained / "out" / "recipe.yaml")
    assert recipe == load_recipe("any_precision", SMALL[1:])
    rows = [json.loads(line) for line in (trained / "out.log.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows if row["event"] == "stage"] == [stage.name for stage in recipe.stages]


def test_eval_runs_at_every_width(run, refused, trained: Path, tiny_model: Path) -> None:
    data = ("--data", trained / "data.jsonl")
    result = run("eval", trained / "out", *data, "--bits", 8, 6, 4, 3, 2, "--json")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert (result.code, result.err, [row["bits"] for row in rows]) == (0, "", [8, 6, 4, 3, 2])
    assert len({row["ppl"] for row in rows}) == 5
    whole = json.loads(run("eval", tiny_model, *data, "--json").out)
    assert rows[0]["ppl"] == pytest.approx(whole["ppl"], rel=0.05)
    default = json.loads(run("eval", trained / "out", *data, "--json").out)
    assert default == rows[4]
    assert "2 bits: perplexity" in run("eval", trained / "out", *data).out
    refused(2, "eval", trained / "out", *data, "--bits", 9)
    refused(2, "eval", trained / "out", *data, "--bits", 1)


def test_inspect_has_a_line_per_layer(run, trained: Path) -> None:
    lines = run("inspect", trained / "out").out.splitlines()
    assert lines[0].split() == ["layer", "widths", "bits", "act_bits", "bits_per_weight", "split_channels", "bytes"]
    assert len(lines) == 1 + 7 + 1
    cells = [line.split() for line in lines[1:-1]]
    assert all(row[1:4] == ["2-8", "2", "16"] for row in cells)
    assert lines[-1].split()[0] == "total"
    assert int(lines[-1].split()[-1]) == sum(int(row[-1]) for row in cells)


def test_inspect_and_eval_of_a_packed_head(run, trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    files = ("--data", trained / "data.jsonl", "--recipe", "any_precision", "--output", tmp_path / "out")
    assert run("train", tiny_model, *files, *SMALL, "head_bits=4").code == 0
    plain, lines = (run("inspect", folder / "out").out.splitlines() for folder in (trained, tmp_path))
    (head,) = [line.split() for line in lines if line.startswith("lm_head")]
    assert head[1:4] == ["4", "4", "16"]
    assert 4.3 < float(head[4]) < 4.6
    assert int(lines[-1].split()[-1]) == int(plain[-1].split()[-1]) + int(head[-1])
    # The head does not narrow the choice of widths.
    text = ("--data", trained / "data.jsonl", "--window", 32, "--limit", 2)
    assert run("eval", tmp_path / "out", *text, "--bits", 8, 2).code == 0


def test_assign_gives_layers_their_own_widths(run, refused, trained: Path, tmp_path: Path, monkeypatch) -> None:
    data = ("--data", trained / "data.jsonl")
    # Four bits for all are 4.375 with scales and zero offsets: some layer keeps two, and all have no other in common.
    result = run("assign", trained / "out", *data, "--output", tmp_path / "mixed", "--budget", 4, "--drop-planes")
    assert (result.code, result.err) == (0, "")
    rows = dict(line.split() for line in result.out.splitlines()[1:-1])
    assert len(rows) == 7
    assert {"2"} < set(rows.values()) <= {"2", "4", "8"}
    assert float(result.out.splitlines()[-1].split()[1]) <= 4
    cells = [line.split() for line in run("inspect", tmp_path / "mixed").out.splitlines()[1:-1]]
    assert {row[0]: row[2] for row in cells} == rows
    evaluated = json.loads(run("eval", tmp_path / "mixed", *data, "--json").out)
    wide, narrow = (json.loads(run("eval", trained / "out", *data, "--json", "--bits", n).out) for n in (8, 2))
    assert evaluated["bits"] == "mixed"
    assert evaluated["ppl"] not in (wide["ppl"], narrow["ppl"])
    assert "mixed widths: perplexity" in run("eval", tmp_path / "mixed", *data).out
    out = ("--output", tmp_path / "other")
    for size in ((), ("--budget", 3, "--bytes", 10**6)):
        assert "got both or none" in refused(2, "assign", trained / "out", *data, *out, *size)
    assert "budget: expected at least" in refused(2, "assign", trained / "out", *data, *out, "--bytes", 10)
    assert "two stored widths" in refused(2, "assign", trained / "out", *data, *out, "--budget", 3, "--bits", 2)
    assert "expected kl or loss" in refused(2, "assign", trained / "out", *data, *out, "--budget", 3, "--metric", "l2")
    assert "as stored" in refused(2, "assign", tmp_path / "mixed", *data, *out, "--budget", 3, "--bits", 2, 8)
    assert "two stored widths" in refused(2, "assign", tmp_path / "mixed", *data, *out, "--budget", 3)
    monkeypatch.setattr("bbb_ao.checkpoint.openable_widths", lambda directory: 1 / 0)
    taken = ("--output", tmp_path / "mixed", "--budget", 3)
    assert "empty or missing" in refused(2, "assign", trained / "out", *data, *taken), "before anything is measured"


def test_one_seed_gives_one_checkpoint(run, trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    files = ("--data", trained / "data.jsonl", "--recipe", "any_precision", "--output", tmp_path / "again")
    assert run("train", tiny_model, *files, *SMALL).code == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (trained / "out", tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_packed_checkpoint_is_no_source(refused, trained: Path, tmp_path: Path) -> None:
    files = ("--data", trained / "data.jsonl", "--recipe", "smoke", "--output", tmp_path / "out")
    assert "'bitbybit'" in refused(3, "train", trained / "out", *files)


BAD_DATA = {
    "too little": (b'{"text": "a few words"}\n', "expected 4 of 32 tokens, got 0"),
    "fewer": (b'{"text": "' + b"word " * 16 + b'"}\n', "expected 4 of 32 tokens, got 2"),
    "malformed": (b'{"text": "a"}\n{"text: 1}\n', "line 2"),
    "missing column": (b'{"words": "a"}\n', "line 1: column"),
    "empty": (b"", "an empty file"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused_before_training(name: str, refused, model: Path, tmp_path: Path) -> None:
    content, expected = BAD_DATA[name]
    (tmp_path / "d.jsonl").write_bytes(content)
    files = ("--data", tmp_path / "d.jsonl", "--recipe", "smoke", "--output", tmp_path / "out")
    assert expected in refused(4, "train", model, *files, *SMALL)


def test_pattern_that_matches_no_layer_is_refused(refused, model: Path, data: Path, tmp_path: Path) -> None:
    files = ("--data", data, "--recipe", "smoke", "--output", tmp_path / "out")
    message = refused(2, "train", model, *files, *SMALL, "targets=['.*qproj']")
    assert "targets.0: expected a pattern that matches one of 7 layers" in message


def test_nan_weight_is_refused(refused, model: Path, data: Path, tmp_path: Path) -> None:
    state = load_file(model / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(state, model / "model.safetensors", {"format": "pt"})
    files = ("--data", data, "--recipe", "smoke", "--output", tmp_path / "out")
    assert "up_proj.weight: values: expected finite ones" in refused(3, "train", model, *files, *SMALL)


def test_missing_tensor_is_refused(refused, model: Path, data: Path, tmp_path: Path) -> None:
    state = load_file(model / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, model / "model.safetensors", {"format": "pt"})
    files = ("--data", data, "--recipe", "smoke", "--output", tmp_path / "out")
    assert "1 missing" in refused(3, "train", model, *files, *SMALL)


def test_zero_and_constant_weights_succeed(run, model: Path, data: Path, tmp_path: Path) -> None:
    state = load_file(model / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"].zero_()
    state["model.layers.0.mlp.gate_proj.weight"].fill_(0.5)
    save_file(state, model / "model.safetensors", {"format": "pt"})
    files = ("--data", data, "--recipe", "smoke", "--output", tmp_path / "out")
    assert run("train", model, *files, *SMALL).code == 0
    assert run("eval", tmp_path / "out", "--data", data).code == 0


def test_train_names_the_weights_that_it_leaves_alone(run, tiny_model: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "moe")
    files = ("--data", data, "--recipe", "smoke", "--output", tmp_path / "out")
    result = run("train", tmp_path / "moe", *files, *SMALL[:3], "stages.*.epochs=1", "--device", "cpu")
    assert result.code == 0, result
    assert "left as it is in MixtralDecoderLayer: mlp.experts" in result.out
