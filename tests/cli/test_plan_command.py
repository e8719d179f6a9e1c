"""`plan`, and what `train` prints and refuses before it loads a weight."""

import json
from pathlib import Path

import pytest

from bbb_ao.planning import limits

SMALL = ("--set", "sequences=4", "sequence_length=32", "split.ratio_max=0.9")


def test_plan_needs_the_configuration_alone(run, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "tokenizer.json").unlink()
    result = run("plan", model, "--recipe", "smoke", "--no-probe", *SMALL, "skip=['.*q_proj']")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].split()[:3] == ["layer", "out", "x"]
    assert sum(line.startswith("model.layers.0") for line in lines) == 6
    assert "left as it is: model.layers.0.self_attn.q_proj: left out by the recipe's targets or skip" in lines
    assert any(line.startswith("stage 3 w2a16: host") and "streams" in line for line in lines)
    assert any(line.startswith("result: ") and "bits per weight" in line for line in lines)
    assert any(line.startswith("disk: ") and line.endswith(" free, with the state of the run") for line in lines)
    assert not any("training" in line for line in lines)


def test_plan_for_machines(run, model: Path) -> None:
    found = json.loads(run("plan", model, "--recipe", "smoke", *SMALL, "--json").out)
    assert len(found["layers"]) == 7
    assert all(seconds > 0 for seconds in found["seconds"])
    assert found["host_bytes"] == max(sum(phase["host"].values()) for phase in found["phases"])
    assert found["available"]["host"] > found["host_bytes"]


def test_plan_refuses_as_train_does(refused, model: Path, monkeypatch) -> None:
    def imported(*arguments: object) -> None:
        raise AssertionError("torch was imported, which takes seconds")

    assert "targets.0" in refused(2, "plan", model, "--recipe", "smoke", *SMALL, "targets=['.*qproj']")
    assert "did you mean" in refused(2, "plan", model, "--recipe", "smoke", "--set", "sequenc=4")
    assert "at most the model's 64 positions" in refused(2, "plan", model, "--recipe", "smoke", "--set", "sequences=4")
    monkeypatch.setattr("bbb_ao.planning.make_plan", imported)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Model"}}))
    assert "auto_map" in refused(3, "plan", model, "--recipe", "smoke", *SMALL)
    (model / "config.json").write_text("{}")
    assert "model_type" in refused(3, "plan", model, "--recipe", "smoke")
    (model / "config.json").unlink()
    assert "config.json" in refused(3, "plan", model, "--recipe", "smoke")


@pytest.mark.parametrize(
    ("short", "what"),
    [("host", "memory: expected"), ("temporary", "disk: expected"), ("output", "free for the result and the run's")],
)
def test_plan_says_what_train_would_refuse(short: str, what: str, run, model: Path, monkeypatch) -> None:
    free = {"device": None, "host": 2**40, "output": 2**40, "temporary": 2**40, short: 1000}
    monkeypatch.setattr("bbb_ao.planning.read_limits", lambda *_: limits.Limits(**free))
    monkeypatch.setattr("bbb_ao.outputs.free_space", lambda path: free["output"])
    result = run("plan", model, "--recipe", "smoke", "--no-probe", *SMALL, "cache=disk")
    assert result.code == 0
    last = result.out.splitlines()[-1]
    assert last.startswith("`train` would refuse it: ")
    assert what in last


def test_train_refuses_what_cannot_fit(run, refused, model: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    def loaded(*arguments: object) -> None:
        raise AssertionError("weights were loaded")

    enough = {"device": None, "host": 2**40, "output": 2**40, "temporary": 2**40}
    monkeypatch.setattr("bbb_ao.planning.read_limits", lambda *_: limits.Limits(**{**enough, "host": 1000}))
    monkeypatch.setattr("bbb_ao.recipes.compress.load_model", loaded)
    files = ("--data", data, "--recipe", "smoke", "--output", tmp_path / "out")
    message = refused(5, "train", model, *files, *SMALL)
    assert "expected" in message
    assert "1.0 kB" in message
    shown = run("train", model, *files, *SMALL).out
    assert shown.splitlines()[-1].endswith("of 1.0 kB free"), "what it is refused for stands above"


def test_train_prints_the_plan_first(run, model: Path, data: Path, tmp_path: Path) -> None:
    files = ("--data", data, "--recipe", "smoke", "--output", tmp_path / "out")
    result = run("train", model, *files, *SMALL, "stages.*.epochs=0")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == "LlamaForCausalLM: 7 layers to pack, 2 weights left as they are"
    planned = float(lines[1].split()[1])
    assert f"{planned:.3f} bits per weight" in lines[-1]
