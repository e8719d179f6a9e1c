"""Training steps as CUDA graphs: the same numbers as without, run after run."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bbb_ao.recipes import replay
from bbb_ao.recipes.compress import train
from bbb_ao.recipes.replay import WARM_UP, Recorded, recording_stream
from bbb_ao.recipes.stages import Recipe, Split, Stage


def tiny_llama() -> nn.Module:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


RECIPE = Recipe(
    name="tiny",
    stages=(
        Stage(weight_bits=(8, 4, 2), epochs=12, lr=1e-3, batch_size=4),
        Stage(weight_bits=2, act_bits=4, epochs=12, lr=1e-3, batch_size=4),
        Stage(scope="model", weight_bits=2, act_bits=4, epochs=12, lr=1e-4, batch_size=4),
    ),
    split=Split(ratio_min=0.2, ratio_max=0.2),
    micro_batch=2,
    copies_lr_factor=0.5,
)
# What else a step can be: averaged weights, text of the model's own, other objectives, scales alone.
OTHER = replace(
    RECIPE,
    stages=(
        Stage(weight_bits=2, epochs=6, lr=1e-3, batch_size=4, text="both"),
        Stage(scope="model", weight_bits=2, epochs=12, lr=1e-4, batch_size=4, objective="mixed_kl", text="generated"),
        Stage(scope="model", weight_bits=2, epochs=12, lr=1e-4, batch_size=4, objective="next_token", train="scales"),
    ),
    generated=8,
    average=0.5,
)
# The losses of both blocks reach the logits.
LOGITS = replace(RECIPE, stages=RECIPE.stages[:2], lookahead=2, logits=1.0)
IDS = torch.randint(0, 200, (8, 64), generator=torch.Generator().manual_seed(1))


def trained(monkeypatch: pytest.MonkeyPatch, worthwhile: int, recipe: Recipe = RECIPE) -> tuple[list, list[str]]:
    monkeypatch.setattr(replay, "WORTHWHILE", worthwhile)
    generated = IDS.flip(1) if recipe.generated else None
    result = train(copy.deepcopy(tiny_llama()), IDS, recipe, torch.device("cuda"), generated=generated)
    how = [fit.how for stage in result.fits for fit in stage]
    return [p.detach() for p in result.model.parameters()], how


@pytest.mark.parametrize("recipe", [RECIPE, OTHER, LOGITS], ids=["plain", "other", "logits"])
def test_recorded_training_equals_eager_training(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    eager, how = trained(monkeypatch, 10**9, recipe)
    assert set(how) == {f"eager: 24 steps are fewer than {10**9}"}
    recorded, how = trained(monkeypatch, 20, recipe)
    assert set(how) == {"recorded"}, how
    for a, b in zip(eager, recorded, strict=True):
        # The same kernels in the same order; 24 AdamW steps of 1e-3 move a weight by up to 2e-2.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_one_seed_gives_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = trained(monkeypatch, 20)
    second, _ = trained(monkeypatch, 20)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other, _ = trained(monkeypatch, 20, replace(RECIPE, seed=1))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_step_that_waits_for_the_device_goes_on_eagerly() -> None:
    total = torch.zeros((), device="cuda")

    def step(x: torch.Tensor) -> torch.Tensor:
        total.add_(x.sum())
        if float(total) < 0:
            raise AssertionError("sums of ones")
        return total.clone()

    recorded = Recorded(step, 100)
    values = [float(recorded(torch.ones(4, device="cuda"))) for _ in range(WARM_UP + 3)]
    assert recorded.how.startswith("eager: ")
    assert "captur" in recorded.how
    assert values == [4.0 * (i + 1) for i in range(WARM_UP + 3)]


def test_replays_follow_their_inputs() -> None:
    recorded = Recorded(lambda x, y: (x * y).sum(), 100)
    for number in range(WARM_UP + 4):
        x = torch.full((5,), float(number), device="cuda")
        assert float(recorded(x, x + 1)) == 5.0 * number * (number + 1)
    assert recorded.how == "recorded"


def test_steps_of_many_blocks_take_cublas_memory_once() -> None:
    """cuBLAS keeps 32 MiB or so for every stream that it ran on, and a model has as many recorded steps as blocks."""
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.ones(256, 256, device=device)

    def step(value: torch.Tensor) -> torch.Tensor:
        return value @ x

    def after_one_more() -> int:
        recorded = Recorded(step, steps=100)
        for _ in range(WARM_UP + 2):
            recorded(x)
        assert recorded.how == "recorded"
        del recorded
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)

    first = after_one_more()
    assert [after_one_more() for _ in range(3)] == [first] * 3
    assert recording_stream(device) is recording_stream(device)
