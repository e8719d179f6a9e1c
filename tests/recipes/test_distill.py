"""The end-to-end stage: the whole student against the model's distribution."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bbb_ao.errors import NumericsError
from bbb_ao.grid import quantize_weight
from bbb_ao.passes import find_blocks
from bbb_ao.qat_linear import qat_linears, set_training_bits
from bbb_ao.recipes.distill import confidence, divergence, next_token_loss, train_model_stage, usual_masks
from bbb_ao.recipes.prepare import prepare_student
from bbb_ao.recipes.stages import Stage

CPU = torch.device("cpu")


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    vocabulary=st.integers(1, 40),
    magnitude=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    reverse=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_divergence_is_the_formula(seed, batch, tokens, vocabulary, magnitude, temperature, reverse):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = magnitude * torch.randn(2, batch, tokens, vocabulary, generator=generator)
    p = (teacher.double() / temperature).softmax(-1)
    log_p, log_q = ((z.double() / temperature).log_softmax(-1) for z in (teacher, student))
    forward, backward = (p * (log_p - log_q)).sum(-1).mean(), (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    expected = temperature**2 * ((1 - reverse) * forward + reverse * backward)
    # A sum of K products of a probability and a difference of logarithms, each right to a few eps of the largest.
    bound = 8 * vocabulary**0.5 * 2**-23 * (temperature**2 + temperature * 8 * magnitude)
    assert abs(float(divergence(teacher, student, temperature, reverse) - expected)) <= bound
    assert float(divergence(teacher, teacher, temperature, reverse)) == 0


def test_divergence_takes_bfloat16_logits_in_float32():
    teacher, student = torch.randn(2, 2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(divergence(teacher, student), divergence(teacher.float(), student.float()))


def test_the_gradient_is_that_of_cross_entropy():
    """d/dz_q of KL is (q - p) / positions at temperature 1."""
    teacher, student = torch.randn(2, 2, 3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student.requires_grad_()
    divergence(teacher, student).backward()
    expected = (student.detach().softmax(-1) - teacher.softmax(-1)) / 6
    # The loss is taken in float32.
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=4 * 2**-24)


@pytest.fixture(scope="module")
def pairs(make_model, make_recipe):
    """Architecture -> (teacher, prepared student); the embedding and head are one in the last."""
    found = {}
    for name in ("llama", "tied", "opt"):
        model = make_model("llama" if name == "tied" else name)
        if name == "tied":
            model.config.tie_word_embeddings = True
            model.lm_head.weight = model.model.embed_tokens.weight
        student = copy.deepcopy(model)
        prepare_student(student, make_recipe(split=None), None)
        found[name] = (model, student)
    return found


def test_blocks_get_the_masks_of_an_ordinary_call(pairs, ids, monkeypatch):
    """While a graph is recorded, transformers takes itself to be traced and builds masks that it else leaves out."""
    seen = []
    models = copy.deepcopy(pairs["llama"])
    handles = [
        block.register_forward_pre_hook(lambda b, a, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
        for model in models
        for _, block in find_blocks(model)
    ]
    usual = [model(ids, use_cache=False).logits for model in models]
    assert seen == [None] * 4
    with usual_masks(*models, ids[:1]):
        for handle in handles:
            handle.remove()
        after = []
        for model in models:
            for _, block in find_blocks(model):
                block.register_forward_pre_hook(
                    lambda b, a, kwargs: after.append(kwargs["attention_mask"]), with_kwargs=True
                )
        monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *tensors: True)
        traced = [model(ids, use_cache=False).logits for model in models]
    assert after == [None] * 4
    for one, other in zip(usual, traced, strict=True):
        assert torch.equal(one, other)
    models[0](ids, use_cache=False)
    assert after[-1] is not None, "the hooks are gone"


def kl(teacher, student, ids, bits):
    set_training_bits(student, bits)
    with torch.no_grad():
        return float(divergence(teacher(ids, use_cache=False).logits, student(ids, use_cache=False).logits))


@pytest.mark.parametrize("name", ["llama", "tied", "opt"])
def test_divergence_falls_and_only_the_blocks_move(name, pairs, make_recipe, ids):
    teacher, student = copy.deepcopy(pairs[name])
    before = {key: value.clone() for key, value in student.state_dict().items()}
    teacher_before = {key: value.clone() for key, value in teacher.state_dict().items()}
    start = kl(teacher, student, ids, 2)
    steps = []
    stage = Stage(scope="model", epochs=6, lr=2e-3, batch_size=4)
    fit = train_model_stage(
        teacher, student, ids, stage, make_recipe(), CPU, 0, lambda step, count, loss: steps.append(step)
    )
    assert steps == list(range(1, 13))
    assert fit.last_loss < fit.first_loss
    assert kl(teacher, student, ids, 2) < 0.8 * start
    blocks = tuple(f"{name}." for name, _ in find_blocks(student))
    moved = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all(key.startswith(blocks) for key in moved), moved
    assert all(torch.equal(value, teacher_before[key]) for key, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in student.parameters())
    assert all(p.grad is None for p in (*teacher.parameters(), *student.parameters()))


def test_a_tied_head_stays_tied(pairs, make_recipe, ids):
    teacher, student = copy.deepcopy(pairs["tied"])
    train_model_stage(teacher, student, ids, Stage(scope="model", batch_size=8), make_recipe(), CPU, 0)
    for model in (teacher, student):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not isinstance(student.lm_head, type(next(iter(qat_linears(student).values()))))


def test_the_first_loss_is_the_weighted_divergence(pairs, make_recipe, ids):
    teacher, student = copy.deepcopy(pairs["llama"])
    stage = Stage(
        scope="model", weight_bits=(4, 2), loss_weights=(0.5, 2.0), epochs=1, batch_size=8, lr=1e-30, kl_temperature=2.0
    )
    fit = train_model_stage(teacher, student, ids, stage, make_recipe(micro_batch=2), CPU, 0)
    expected = 0.0
    for width, factor in ((4, 0.5), (2, 2.0)):
        set_training_bits(student, width)
        with torch.no_grad():
            expected += factor * float(divergence(teacher(ids).logits, student(ids).logits, 2.0))
    assert fit.first_loss == pytest.approx(expected, rel=1e-4)


def test_one_seed_is_bit_identical(pairs, make_recipe, ids):
    states = []
    for seed in (0, 0, 1):
        teacher, student = copy.deepcopy(pairs["llama"])
        train_model_stage(teacher, student, ids, Stage(scope="model"), make_recipe(), CPU, seed)
        states.append(student.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_divergence_that_is_nan_names_the_stage(pairs, make_recipe, ids):
    teacher, student = copy.deepcopy(pairs["llama"])
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^w2a16 model: the loss is NaN or infinite at step 1"):
        train_model_stage(teacher, student, ids, Stage(scope="model", batch_size=8), make_recipe(), CPU, 0)
    assert not any(p.requires_grad for p in student.parameters()), "left as after a success"


def test_confidence_is_the_mean_probability_of_the_text(pairs, ids):
    teacher, _ = pairs["llama"]
    with torch.no_grad():
        probabilities = teacher(ids, use_cache=False).logits.double().softmax(-1)[:, :-1]
    expected = float(probabilities.gather(-1, ids[:, 1:, None]).mean())
    assert confidence(teacher, ids, 3, CPU) == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_the_text_is_the_models_own(pairs, ids):
    teacher, _ = pairs["llama"]
    with torch.no_grad():
        output = teacher(ids, labels=ids, use_cache=False)
    assert float(next_token_loss(output.logits, ids)) == pytest.approx(float(output.loss), rel=1e-6)


@pytest.mark.parametrize("objective", ["reverse_kl", "mixed_kl", "next_token"])
def test_the_first_loss_is_that_of_the_objective(objective, pairs, make_recipe, ids):
    teacher, student = copy.deepcopy(pairs["llama"])
    stage = Stage(scope="model", objective=objective, epochs=1, batch_size=8, lr=1e-30)
    fit = train_model_stage(teacher, student, ids, stage, make_recipe(), CPU, 0)
    set_training_bits(student, 2)
    with torch.no_grad():
        target, logits = (model(ids, use_cache=False).logits for model in (teacher, student))
    reverse = {"reverse_kl": 1.0, "mixed_kl": confidence(teacher, ids, 8, CPU)}.get(objective)
    expected = next_token_loss(logits, ids) if reverse is None else divergence(target, logits, 1.0, reverse)
    assert fit.first_loss == pytest.approx(float(expected), rel=1e-4)


def test_a_stage_of_scales_keeps_every_code(pairs, make_recipe, ids):
    teacher, student = copy.deepcopy(pairs["llama"])
    before = {name: copy.deepcopy(linear) for name, linear in qat_linears(student).items()}
    start = kl(teacher, student, ids, 2)
    stage = Stage(scope="model", train="scales", epochs=8, lr=1e-3, batch_size=4)
    train_model_stage(teacher, student, ids, stage, make_recipe(), CPU, 0)
    assert kl(teacher, student, ids, 2) < 0.95 * start
    for name, linear in qat_linears(student).items():
        codes = [quantize_weight(x.weight.detach(), *x.rounded_scales(), x.grid) for x in (before[name], linear)]
        assert torch.equal(codes[0].codes, codes[1].codes), name
        assert torch.equal(codes[0].zero_point, codes[1].zero_point), name
        assert not torch.equal(codes[0].scale, codes[1].scale), name
        assert linear.frozen_scale is None


def test_a_stage_reads_the_text_that_it_names(pairs, make_recipe, ids, monkeypatch):
    seen = []
    teacher, student = copy.deepcopy(pairs["llama"])
    student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for text, rows in (("calibration", ids[:5]), ("generated", ids[5:]), ("both", ids)):
        seen.clear()
        stage = Stage(scope="model", text=text, epochs=1, batch_size=8)
        recipe = make_recipe(stages=(stage,), generated=3)
        train_model_stage(teacher, student, ids, stage, recipe, CPU, 0)
        drawn = torch.cat(seen)
        assert sorted(drawn.tolist()) == sorted(rows.tolist())
