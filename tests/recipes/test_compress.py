"""The main job, from a model and a recipe to a directory that transformers loads; and all that may stop it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bbb_ao.huggingface  # noqa: F401  registers the quantizer
from bbb_ao.checkpoint import describe, export_dense
from bbb_ao.errors import DataError, ModelError, NumericsError, RecipeError
from bbb_ao.packed_linear import PackedLinear, packed_linears, set_bits
from bbb_ao.qat_linear import qat_linears, set_training_bits
from bbb_ao.recipes import compress as engine
from bbb_ao.recipes.compress import Silent, compress, train
from bbb_ao.recipes.evaluate import perplexity
from bbb_ao.recipes.loader import load_recipe
from bbb_ao.recipes.stages import Clip, GridSettings, Split, Stage

CPU = torch.device("cpu")


def joint(**fields):
    """Two stages that end with the widths 8, 4 and 2 in one checkpoint."""
    stages = (Stage(weight_bits=8, epochs=0.5), Stage(weight_bits=(8, 4, 2), epochs=0.5, lr=1e-3, batch_size=4))
    return {"stages": stages, "default_bits": 2} | fields


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fingerprint(model):
    """Everything of a model that a user could see change."""
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    tensors = {n: (t.clone(), t.requires_grad, t.grad is None) for n, t in model.named_parameters()}
    buffers = {n: t.clone() for n, t in model.named_buffers()}
    return modules, tensors, buffers, model.config.to_dict(), next(model.parameters()).device


def assert_unchanged(model, before):
    modules, tensors, buffers, config, device = fingerprint(model)
    assert (modules, config, device) == (before[0], before[3], before[4])
    assert tensors.keys() == before[1].keys()
    for name, (value, *flags) in tensors.items():
        assert torch.equal(value, before[1][name][0]), name
        assert flags == list(before[1][name][1:]), name
    assert all(torch.equal(value, before[2][name]) for name, value in buffers.items())


CASES = {
    "llama": ("llama", {}),
    "llama, rest skipped": ("llama", {"skip": (r".*\.q_proj", r".*\.gate_proj")}),
    "llama, no producer rows": ("llama", {"split": Split(ratio_min=0.5, ratio_max=0.9, producer_rows=False)}),
    "llama, learned": ("llama", {"learned_scales": True, "split": None}),
    "llama, integer": ("llama", {"grid": GridSettings(kind="integer", zero_point_bits=2)}),
    "llama, groups of 64": ("llama", {"grid": GridSettings(group_size=64)}),
    "llama, groups of 128": ("llama", {"grid": GridSettings(group_size=128), "split": None}),
    "llama, clipped, generated text": (
        "llama",
        {
            "clip": Clip(metric="activation", asymmetric=True, steps=2),
            "generated": 3,
            "stages": (
                Stage(weight_bits=(8, 4, 2), epochs=0.5, batch_size=4, text="both"),
                Stage(scope="model", weight_bits=(8, 4, 2), objective="mixed_kl", text="generated", train="scales"),
            ),
        },
    ),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {}),
    "mamba": ("mamba", {}),
    "ragged": ("ragged", {"split": None}),
    "gemma2": ("gemma2", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_directory_loads_with_the_figures_of_the_result(case, make_model, make_recipe, ids, tmp_path):
    name, fields = CASES[case]
    model, recipe = make_model(name), make_recipe(**joint(**fields))
    before = fingerprint(model)
    output = tmp_path / "out"
    result = compress(model, recipe, ids, output, device=CPU)
    assert_unchanged(model, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert {"config.json", "model.safetensors", "recipe.yaml"} <= {p.name for p in output.iterdir()}
    assert load_recipe(output / "recipe.yaml") == recipe
    assert json.loads((output / "config.json").read_text())["quantization_config"]["quant_method"] == "bitbybit"
    assert tuple(packed_linears(result.model)) == result.prepared.layers
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert {layer.bits for layer in packed_linears(loaded).values()} == {2}
    assert perplexity(loaded, ids) == perplexity(result.model, ids)
    stored = sum(layer.bytes for layer in describe(output))
    weights = sum(layer.in_features * layer.out_features for layer in packed_linears(result.model).values())
    # The two count indices that norms and Linears hold alike differently: a few hundred bytes of this tiny model.
    assert 8 * stored / weights == pytest.approx(result.bits_per_weight, rel=0.01)
    for bits in (8, 4, 2):
        at_width = logits(AutoModelForCausalLM.from_pretrained(output, bits=bits), ids)
        assert torch.equal(at_width, logits(set_bits(result.model, bits), ids)), bits
    # Eight bits are the model again, but for what the few steps of joint training moved.
    set_bits(result.model, 8)
    error = (logits(result.model, ids) - logits(model, ids)).square().mean() / logits(model, ids).var()
    assert error < 0.1


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_packed_head_goes_through_the_directory_and_the_dense_export(name, make_model, make_recipe, ids, tmp_path):
    model = make_model(name)
    tied = model.config.tie_word_embeddings
    result = compress(model, make_recipe(**joint(head_bits=8)), ids, tmp_path / "out", device=CPU)
    head = result.model.get_output_embeddings()
    assert (type(head), head.bits, head.fixed_bits) == (PackedLinear, 8, True)
    assert model.config.tie_word_embeddings == tied, "the source model is not changed"
    assert "head_bits: 8" in (tmp_path / "out" / "recipe.yaml").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", bits=2)
    assert torch.equal(logits(loaded, ids), logits(set_bits(result.model, 2), ids))
    assert sum(layer.widths == (8,) for layer in describe(tmp_path / "out")) == 1
    export_dense(loaded, None, tmp_path / "dense", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dense, ids), logits(result.model, ids), rtol=1e-3, atol=1e-3)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match=r"head: expected an nn\.Linear"):
        compress(model, make_recipe(**joint(head_bits=8)), ids, tmp_path / "other", device=CPU)


def test_biases_and_embeddings_survive(make_model, make_recipe, ids, tmp_path):
    model = make_model("opt")
    result = compress(model, make_recipe(**joint()), ids, tmp_path / "out", device=CPU)
    layer = result.model.model.decoder.layers[0]
    assert isinstance(layer.fc1, PackedLinear)
    assert (layer.fc1.bias - model.model.decoder.layers[0].fc1.bias).abs().max() < 0.05
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(result.model.get_input_embeddings().weight, embeddings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)
    assert torch.equal(loaded.model.decoder.layers[0].fc1.bias, layer.fc1.bias)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight, "tied, as OPT is"


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_a_bfloat16_model_gives_a_bfloat16_checkpoint(name, make_model, make_recipe, ids, tmp_path):
    model = make_model(name)
    types = {n: b.dtype for n, b in model.named_buffers()}
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    result = compress(model, make_recipe(**joint()), ids, tmp_path / "out", device=CPU)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    rotary = {n: b.dtype for n, b in result.model.named_buffers() if "inv_freq" in n}
    assert rotary
    assert rotary == {n: types[n] for n in rotary}, "frequencies keep their type"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded, ids), logits(result.model, ids))


def test_dropout_of_a_model_in_training_mode_plays_no_part(make_model, make_recipe, ids, tmp_path):
    states = []
    for training in (True, False):
        model = make_model("opt").train(training)
        result = train(model, ids, make_recipe(**joint()), CPU)
        assert all(module.training == training for module in model.modules())
        assert not any(module.training for module in result.model.modules())
        states.append(state(result.model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_activations_and_an_end_to_end_stage(make_model, make_recipe, ids, tmp_path):
    stages = (
        Stage(weight_bits=4, epochs=1),
        Stage(weight_bits=2, epochs=1),
        Stage(weight_bits=2, act_bits=8, epochs=1),
        Stage(scope="model", weight_bits=2, act_bits=8, epochs=4, lr=1e-3),
    )
    result = compress(make_model("llama"), make_recipe(stages=stages), ids, tmp_path / "out", device=CPU)
    assert [len(fits) for fits in result.fits] == [2, 2, 2, 1]
    assert result.fits[-1][0].last_loss < result.fits[-1][0].first_loss
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {(layer.bits, layer.max_bits, layer.act_bits) for layer in packed_linears(loaded).values()} == {(2, 2, 8)}
    assert torch.equal(logits(loaded, ids), logits(result.model, ids))
    with pytest.raises(ModelError, match="stores widths 2 to 2, got 4"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", bits=4)


def test_the_packed_model_gives_what_was_trained(make_model, make_recipe, ids):
    recipe = make_recipe(**joint())
    model = make_model("llama")
    result = train(model, ids, recipe, CPU)
    trained = logits(result.model, ids)
    packed = logits(engine.pack(result.model, model, recipe), ids)
    # The dequantized weights are the fake-quantized ones, so only sums differ in order.
    assert (packed - trained).abs().max() <= 100 * 2**-23 * trained.abs().max()


def test_one_seed_gives_one_checkpoint_and_progress_is_told(make_model, make_recipe, ids, tmp_path):
    told = []

    class Told(Silent):
        def event(self, kind, **values):
            told.append(kind)

        def stage(self, number, name, blocks, done=0):
            told.append((number, name, blocks))

        def block(self, number, name, fit):
            told.append(name)

    recipe = make_recipe(**joint())
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        compress(make_model("llama"), replace(recipe, seed=seed), ids, tmp_path / name, device=CPU, report=Told())
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1]
    assert files[0] != files[2]
    blocks = ["model.layers.0", "model.layers.1"]
    stages = [[(n, name, 2), *blocks, "stage_done"] for n, name in enumerate(("w8a16", "w8+4+2a16"))]
    channels = ["channels"] * 8
    expected = ["run", "plan", *channels, "layers", "prepared", *stages[0], *stages[1], "layers", "saved"]
    assert told[: len(expected)] == expected


def listing(folder: Path):
    return sorted((str(p), p.stat().st_size) for p in folder.rglob("*"))


def test_an_output_that_holds_something_is_refused_first(make_model, make_recipe, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "train", lambda *_: pytest.fail("refuse before the work"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    make_model("llama").save_pretrained(tmp_path / "model")
    before = listing(tmp_path)
    for source, output in (
        (make_model("llama"), "out"),
        (make_model("llama"), "file"),
        (tmp_path / "model", "model"),
        (str(tmp_path / "model"), "model/inside"),
    ):
        with pytest.raises(RecipeError, match=r"output: expected .*; fix: "):
            compress(source, make_recipe(), ids, tmp_path / output, device=CPU)
    assert listing(tmp_path) == before


def test_an_empty_output_directory_is_used(make_model, make_recipe, ids, tmp_path):
    (tmp_path / "out").mkdir()
    compress(make_model("llama"), make_recipe(split=None), ids, tmp_path / "out", device=CPU)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_weight_is_refused_by_name(value, make_model, make_recipe, ids, tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(
        ModelError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: values: .* at \[3, 5\] and 1 in all"
    ):
        compress(model, make_recipe(), ids, tmp_path / "out", device=CPU)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("moment", ["plan", "step", "block", "convert_model", "save_packed"])
def test_nothing_is_written_when_it_fails_in_the_middle(moment, make_model, make_recipe, ids, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def fail(*_, **__):
        raise Stop

    report = Silent()
    if moment in ("step", "block"):
        monkeypatch.setattr(report, moment, fail)
    elif moment == "plan":
        monkeypatch.setattr(report, "event", fail)
    else:
        monkeypatch.setattr(engine, moment, fail)
    model = make_model("opt").train()
    before = fingerprint(model)
    stages = (Stage(), Stage(scope="model"))
    for source in (model, make_model("llama")):
        with pytest.raises(Stop):
            compress(source, make_recipe(stages=stages), ids, tmp_path / "out", device=CPU, report=report)
    assert listing(tmp_path) == []
    assert_unchanged(model, before)


def test_nothing_is_left_when_saving_fails(make_model, make_recipe, ids, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            assert Path(folder, "model.safetensors").exists(), "the weights are there already"
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        compress(make_model("llama"), make_recipe(), ids, tmp_path / "out", tokenizer=Tokenizer(), device=CPU)
    assert listing(tmp_path) == []


def test_divergence_in_training_names_the_layer(make_model, make_recipe, ids, tmp_path):
    # A finite model that overflows as soon as it runs.
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
        model.model.layers[1].mlp.up_proj.weight.mul_(1e20)
    with pytest.raises(NumericsError, match=r"^model\.layers\.1: "):
        compress(model, make_recipe(split=None), ids, tmp_path / "out", device=CPU)
    assert listing(tmp_path) == []


BAD_IDS = {
    "ids above": (torch.full((2, 8), 200), "expected ids from 0 to 199, the model's vocabulary, got 200 to 200"),
    "ids below": (torch.full((2, 8), -1), "expected ids from 0 to 199"),
    "one sequence": (torch.ones(8, dtype=torch.int64), r"expected int64 \[sequences, tokens\]"),
    "floats": (torch.ones(2, 8), r"got torch.float32 \(2, 8\)"),
    "none": (torch.ones(0, 8, dtype=torch.int64), r"got torch.int64 \(0, 8\)"),
    "too long": (torch.ones(2, 65, dtype=torch.int64), "expected at most the model's 64 positions, got 65 tokens"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_calibration_ids_are_refused(case, make_model, make_recipe, tmp_path):
    bad, message = BAD_IDS[case]
    with pytest.raises(DataError, match=rf"^sequences: .*{message}.*; fix: "):
        compress(make_model("opt"), make_recipe(), bad, tmp_path / "out", device=CPU)
    assert listing(tmp_path) == []


def test_text_needs_a_tokenizer_and_a_length_that_the_model_has(make_model, make_recipe, tmp_path):
    (tmp_path / "data.txt").write_text("some text " * 100)
    with pytest.raises(DataError, match=r"^tokenizer: .*; fix: pass tokenizer="):
        compress(make_model("llama"), make_recipe(), tmp_path / "data.txt", tmp_path / "out", device=CPU)
    with pytest.raises(RecipeError, match=r"^sequence_length: expected at most the model's 64 positions, got 512; fix"):
        compress(
            make_model("llama"), make_recipe(), tmp_path / "data.txt", tmp_path / "out", tokenizer=object(), device=CPU
        )
    assert not (tmp_path / "out").exists()


def test_a_model_without_blocks_and_a_missing_directory_are_refused(make_recipe, ids, tmp_path, make_model):
    model = make_model("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="decoder blocks: expected"):
        compress(model, make_recipe(), ids, tmp_path / "out", device=CPU)
    with pytest.raises(ModelError, match="expected a directory"):
        compress(tmp_path / "nothing", make_recipe(), ids, tmp_path / "out", device=CPU)


def test_a_pattern_that_matches_nothing_is_refused(make_model, make_recipe, ids, tmp_path):
    with pytest.raises(RecipeError, match=r"^targets\.0: expected a pattern that matches one of 14 layers"):
        compress(make_model("llama"), make_recipe(targets=("lm_head",)), ids, tmp_path / "out", device=CPU)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(("kind", "zero_point_bits"), [("half_step", 4), ("integer", 2)])
@pytest.mark.parametrize("scope", ["block", "model"])
def test_bits_below_the_kept_ones_are_trained_and_those_are_not(
    kind, zero_point_bits, scope, make_model, make_recipe, ids
):
    teacher = make_model("llama")
    grid = GridSettings(kind=kind, zero_point_bits=zero_point_bits)
    first = Stage(weight_bits=2, epochs=4, lr=2e-3)
    below = Stage(scope=scope, weight_bits=(8, 4), keep_bits=2, epochs=8, lr=3e-5)
    narrow = train(teacher, ids, make_recipe(stages=(first,), grid=grid), CPU).model
    start, result = (
        train(teacher, ids, make_recipe(stages=(first, *later), grid=grid, default_bits=4), CPU)
        for later in ((replace(below, epochs=0.01, lr=1e-9),), (below, replace(below, epochs=1)))
    )
    trained = qat_linears(result.model)
    for name, linear in qat_linears(narrow).items():
        assert torch.equal(trained[name].merged_weight(2), linear.merged_weight(2)), name
    with torch.no_grad():
        target = teacher(ids).logits
        errors = {}
        for label, model in (("start", start.model), ("trained", result.model)):
            for bits in (2, 4, 8):
                set_training_bits(model, bits)
                errors[label, bits] = float((model(ids).logits - target).square().mean())
    assert errors["trained", 2] == errors["start", 2]
    assert errors["trained", 8] < errors["trained", 4] < errors["trained", 2]
    assert errors["trained", 8] < errors["start", 8]
    assert errors["trained", 4] < errors["start", 4]
