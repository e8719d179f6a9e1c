"""From a model to a student: which Linears, by which rule, with which channels split."""

from functools import cache

import pytest
import torch
from torch import nn

from bbb_ao.errors import RecipeError
from bbb_ao.grid import fake_quantize_weight, scale_and_zero_point
from bbb_ao.passes import RewritePlan, SplitSite, block_linears, capture_model, find_blocks, plan_block
from bbb_ao.passes.capture import CapturedBlock
from bbb_ao.qat_linear import qat_linears, set_training_bits
from bbb_ao.recipes import prepare
from bbb_ao.recipes.blockwise import BlockRun
from bbb_ao.recipes.compress import train
from bbb_ao.recipes.prepare import activation_norms, prepare_student, restrict_plan, round_to_nearest
from bbb_ao.recipes.stages import Clip, GridSettings, Split, Stage

CPU = torch.device("cpu")
PLAN = RewritePlan(
    (
        SplitSite("q", ("q", "k", "v"), "norm", ("norm1",)),
        SplitSite("o", ("o",), "index"),
        SplitSite("gate", ("gate", "up"), "norm", ("norm2",)),
        SplitSite("down", ("down",), "rows", ("gate", "up")),
    )
)
ALL = {"q", "k", "v", "o", "gate", "up", "down"}


def rules(plan):
    return {site.name: (site.rule, site.consumers, site.producers) for site in plan.sites}


def test_a_plan_for_all_linears_stays_as_it_is():
    assert restrict_plan(PLAN, ALL, True) == PLAN


def test_without_producer_rows_down_gathers_its_own_input():
    restricted = rules(restrict_plan(PLAN, ALL, False))
    assert restricted["down"] == ("index", ("down",), ())
    assert restricted["gate"] == ("norm", ("gate", "up"), ("norm2",))


def test_a_skipped_consumer_takes_the_norm_rule_from_its_neighbours():
    restricted = rules(restrict_plan(PLAN, ALL - {"q"}, True))
    assert restricted == {
        "k": ("index", ("k", "v"), ()),
        "o": ("index", ("o",), ()),
        "gate": ("norm", ("gate", "up"), ("norm2",)),
        "down": ("rows", ("down",), ("gate", "up")),
    }


def test_a_skipped_producer_takes_the_rows_rule_from_down():
    restricted = rules(restrict_plan(PLAN, ALL - {"gate"}, True))
    assert restricted["up"] == ("index", ("up",), ())
    assert restricted["down"] == ("index", ("down",), ())
    assert rules(restrict_plan(PLAN, {"down"}, True)) == {"down": ("index", ("down",), ())}
    assert restrict_plan(PLAN, set(), True).sites == ()


@pytest.fixture(scope="module")
def run_of(make_model, make_recipe, ids):
    """A function: architecture -> its BlockRun, with float32 streams."""

    @cache
    def make(name):
        return BlockRun(make_model(name), ids, make_recipe(), CPU)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bbb_ao.recipes.optimization._cpu_multiplies_bfloat16", lambda: False)
        yield make


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


CASES = [
    ("llama", {}),
    ("llama", {"split": Split(ratio_min=0.4, ratio_max=0.9, producer_rows=False)}),
    ("llama", {"skip": (r".*\.q_proj", r".*\.gate_proj")}),
    ("llama", {"targets": (r".*down_proj",)}),
    ("ragged", {}),
    ("ragged", {"split": None}),
    ("opt", {"grid": GridSettings(kind="integer", zero_point_bits=2)}),
    ("gemma2", {}),
]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_a_student_in_full_precision_is_the_model(name, fields, make_model, make_recipe, run_of, ids):
    student = make_model(name)
    recipe = make_recipe(**fields)
    before = logits(student, ids)
    prepared = prepare_student(student, recipe, run_of(name))
    names = [f"{block}.{n}" for block, module in find_blocks(run_of(name).teacher) for n in block_linears(module)]
    assert prepared.layers == recipe.select(names) == tuple(qat_linears(student))
    assert {linear.bits for linear in qat_linears(student).values()} == {2}
    quantized = logits(student, ids)
    set_training_bits(student, None)
    # Halves add up exactly, so only the order of sums differs: a few eps of the largest logit, for each of 2 blocks.
    atol = 100 * 2**-23 * float(before.abs().max())
    torch.testing.assert_close(logits(student, ids), before, rtol=0, atol=atol)
    assert (quantized - before).abs().max() > 1e-2 * before.abs().max(), "two bits must show"


def test_ragged_inputs_are_padded_and_split(make_model, make_recipe, run_of):
    student = make_model("ragged")
    prepare_student(student, make_recipe(split=None), None)
    layer = student.model.layers[1]
    assert layer.self_attn.q_proj.weight.shape == (60, 64)
    assert layer.self_attn.q_proj.padding == 4
    assert layer.mlp.down_proj.weight.shape == (60, 128)
    assert layer.mlp.gate_proj.out_index.numel() == 128
    split = make_model("ragged")
    prepare_student(split, make_recipe(), run_of("ragged"))
    assert split.model.layers[1].self_attn.q_proj.weight.shape == (60, 96)
    assert split.model.layers[1].self_attn.q_proj.padding == 0


def test_skipped_linears_are_left_alone_and_neighbours_gather(make_model, make_recipe, run_of):
    student = make_model("llama")
    prepare_student(student, make_recipe(skip=(r".*\.q_proj", r".*\.gate_proj")), run_of("llama"))
    layer = student.model.layers[0]
    assert type(layer.self_attn.q_proj) is nn.Linear
    assert type(layer.mlp.gate_proj) is nn.Linear
    assert not hasattr(layer.input_layernorm, "duplicate_index")
    assert layer.self_attn.k_proj.expands_input
    assert layer.mlp.down_proj.expands_input
    assert layer.mlp.up_proj.out_index is None


def test_split_ratios_grow_with_depth(make_model, make_recipe, run_of):
    student = make_model("llama")
    prepare_student(student, make_recipe(split=Split(ratio_min=0.0, ratio_max=1.0)), run_of("llama"))
    stored = [layer.self_attn.o_proj.stored_features for layer in student.model.layers]
    assert stored == [64, 128]


def test_the_joint_metric_is_the_norm_of_the_activations_times_the_largest_weight(make_model, make_recipe, run_of, ids):
    model = make_model("llama")
    seen = {}

    def keep(module, args, name):
        seen[name] = args[0].double().flatten(0, -2).square().sum(0).sqrt()

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: keep(module, args, name))
    logits(model, ids)
    student = make_model("llama")
    prepared = prepare_student(student, make_recipe(), run_of("llama"))
    norms = activation_norms(run_of("llama"), dict.fromkeys(run_of("llama").names, prepared.plans[0]))
    for number in range(2):
        prefix = f"model.layers.{number}."
        for name, norm in norms[prefix[:-1]].items():
            torch.testing.assert_close(norm.double(), seen[prefix + name], rtol=1e-4, atol=1e-4)
        layer, block = student.model.layers[number], model.get_submodule(prefix[:-1])
        groups = {
            "self_attn.o_proj": ["self_attn.o_proj"],
            "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        }
        for name, readers in groups.items():
            largest = torch.cat([block.get_submodule(reader).weight for reader in readers]).abs().amax(0)
            ranked = (largest.double() * seen[prefix + name]).argsort(descending=True)
            index = layer.get_submodule(name).ocs_index
            assert index[64:].tolist() == ranked[: index.numel() - 64].tolist()


def test_statistics_are_taken_anew_from_a_run_that_keeps_its_streams(make_model, make_recipe, ids):
    run = BlockRun(make_model("llama"), ids, make_recipe(), CPU)
    students = [make_model("llama") for _ in range(2)]
    for student in students:
        prepare_student(student, make_recipe(), run)
    first, second = (student.state_dict() for student in students)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_weight_metric_needs_no_calibration(make_model, make_recipe, monkeypatch):
    monkeypatch.setattr(prepare, "activation_norms", lambda *_: pytest.fail("no statistics are asked for"))
    student = make_model("llama")
    recipe = make_recipe(split=Split(ratio_min=0.5, ratio_max=0.5, metric="weight"))
    prepare_student(student, recipe, BlockRun(student, torch.ones(1, 32, dtype=torch.int64), recipe, CPU))
    weight = make_model("llama").model.layers[0].self_attn.o_proj.weight
    ranked = weight.abs().amax(0).argsort(descending=True, stable=True)
    assert student.model.layers[0].self_attn.o_proj.ocs_index[64:].tolist() == ranked[:32].tolist()


class Unused(nn.Module):
    """Two Linears, of which the forward calls one."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.used(x)


def test_a_linear_that_no_token_reaches_is_ranked_by_its_weights(run_of, make_recipe, ids):
    run = run_of("llama")
    plan = RewritePlan((SplitSite("used", ("used",), "index"), SplitSite("idle", ("idle",), "index")))
    alone = BlockRun(run.teacher, ids, make_recipe(), CPU)
    alone.names, alone.teacher_blocks = ["b"], [Unused()]
    alone.calls = [type(run.calls[0])((None,), {})]
    norms = activation_norms(alone, {"b": plan})["b"]
    assert torch.equal(norms["idle"], torch.ones(64))
    expected = run.entry.states.double().flatten(0, 1).square().sum(0).sqrt()
    torch.testing.assert_close(norms["used"].double(), expected, rtol=1e-5, atol=0)


def test_a_rule_that_fails_its_verification_becomes_an_index(make_model, make_recipe, monkeypatch):
    """The plan that is applied is the verified one, not the analysis' first word."""
    seen = []

    def refuse_norms(captured: CapturedBlock):
        plan = prepare_verified(captured)
        seen.append(plan)
        sites = tuple(SplitSite(s.name, s.consumers, "index") if s.rule == "norm" else s for s in plan.sites)
        return RewritePlan(sites, plan.unsupported, plan.blocks, plan.kind)

    prepare_verified = prepare.verified_plan
    monkeypatch.setattr(prepare, "verified_plan", refuse_norms)
    student = make_model("llama")
    prepare_student(student, make_recipe(split=Split(ratio_min=0.5, metric="weight")), None)
    assert len(seen) == 1, "once for each kind of block"
    assert student.model.layers[0].self_attn.q_proj.expands_input
    assert not hasattr(student.model.layers[0].input_layernorm, "duplicate_index")


def test_a_pattern_that_matches_nothing_is_refused(make_model, make_recipe):
    student = make_model("llama")
    for fields, field in (({"targets": ("lm_head",)}, "targets.0"), ({"skip": (".*qproj",)}, "skip.0")):
        with pytest.raises(RecipeError, match=rf"^{field}: expected a pattern that matches one of 14 layers"):
            prepare_student(student, make_recipe(**fields), None)
    assert not qat_linears(student), "nothing was changed"


def test_round_to_nearest_is_a_copy_at_the_recipes_widths(make_model, make_recipe):
    model = make_model("opt").to(torch.bfloat16)
    recipe = make_recipe(stages=(Stage(weight_bits=(4, 2), act_bits=8),), default_bits=4)
    student = round_to_nearest(model, recipe)
    layers = qat_linears(student).values()
    assert {(linear.bits, linear.act_bits) for linear in layers} == {(4, 8)}
    assert all(linear.weight.dtype == torch.float32 and linear.ocs_index is None for linear in layers)
    assert not qat_linears(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("metric", ["weight", "activation"])
def test_ranges_are_clipped_before_scales_are_learned(metric, make_model, make_recipe, run_of):
    clip = Clip(metric=metric, lowest=0.3, steps=7)
    plain, clipped = make_model("llama"), make_model("llama")
    for student, fields in ((plain, {}), (clipped, {"clip": clip, "learned_scales": True})):
        prepare_student(student, make_recipe(**fields), run_of("llama"))
    plan = plan_block(capture_model(make_model("llama"))[0])
    norms = activation_norms(run_of("llama"), dict.fromkeys(run_of("llama").names, plan))
    for name, host in qat_linears(clipped).items():
        weight = qat_linears(plain)[name].weight.detach()
        assert (host.weight.abs() <= weight.abs()).all(), name
        assert torch.equal(host.scale.detach(), scale_and_zero_point(host.weight.detach(), host.grid)[0]), name
        importance = torch.ones(host.stored_features)
        if metric == "activation":
            block, linear = name.rsplit(".", 2)[0], name.split(".", 3)[3]
            importance = norms[block][linear].square()[host.ocs_index.long()]
        quantized = [
            fake_quantize_weight(w, *scale_and_zero_point(w, host.grid), 2, host.grid)
            for w in (weight, host.weight.detach())
        ]
        before, after = (((q - weight).square() * importance).sum() for q in quantized)
        assert after < 0.98 * before, name


def test_a_stage_without_epochs_only_sets_the_widths(make_model, make_recipe, ids):
    recipe = make_recipe(stages=(Stage(weight_bits=2, act_bits=4, epochs=0),))
    result = train(make_model("llama"), ids, recipe, CPU)
    assert result.fits == [[]]
    student = make_model("llama")
    prepare_student(student, recipe, BlockRun(make_model("llama"), ids, recipe, CPU))
    set_training_bits(student, 2, 4)
    assert torch.equal(logits(result.model, ids), logits(student, ids))
