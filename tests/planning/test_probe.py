"""The probe times real steps and scales them by their number."""

from dataclasses import replace

import pytest
import torch

from bbb_ao.planning import probe
from bbb_ao.planning.job import Job
from bbb_ao.recipes.skeleton import build_skeleton
from bbb_ao.recipes.stages import Stage


def test_seconds_scale_with_steps(make_directory, make_recipe, monkeypatch) -> None:
    stages = (
        Stage(weight_bits=8, epochs=0),
        Stage(weight_bits=4, epochs=2, batch_size=4),
        Stage(weight_bits=2, epochs=4, batch_size=4),
        Stage(scope="model", weight_bits=2, epochs=4, batch_size=4),
    )
    job = Job.prepare(build_skeleton(make_directory("llama")), make_recipe(stages=stages), torch.device("cpu"))
    timed = []
    monkeypatch.setattr(probe, "probe", lambda job, stage: timed.append(stage.name) or probe.Times(10.0, 1.0))
    # 2 blocks, 8 sequences, one prefix and the full-precision stream; 4 and 8 steps of 4 sequences.
    assert probe.stage_seconds(job) == [0.0, 2 * (4 * 10 + 8 * 2), 2 * (8 * 10 + 8 * 2), 2 * 8 * (10 + 4)]
    assert timed == ["w4a16"]


def test_steps_are_timed_on_the_device(make_directory, make_recipe, monkeypatch) -> None:
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    job = Job.prepare(build_skeleton(make_directory("llama")), make_recipe(), torch.device("cpu"))
    (stage,) = job.recipe.stages
    times = probe.probe(job, stage)
    assert times is not None
    assert 0 < times.forward < 4 * times.step
    monkeypatch.setattr(probe, "CPU_OPERATIONS", 1)
    assert probe.probe(job, stage) is None
    assert probe.stage_seconds(replace(job, recipe=job.recipe)) == [None]


@pytest.mark.parametrize("architecture", ["gemma2", "opt"])
def test_other_calls_are_probed(architecture: str, make_directory, make_recipe, monkeypatch) -> None:
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    recipe = make_recipe(stages=(Stage(weight_bits=2, act_bits=4, batch_size=2),), learned_scales=True)
    job = Job.prepare(build_skeleton(make_directory(architecture)), recipe, torch.device("cpu"))
    (seconds,) = probe.stage_seconds(job)
    assert seconds is not None
    assert seconds > 0
