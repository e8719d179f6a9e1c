"""`bbb-ao train`, `eval --baseline` and `report` on a tiny model: each leaves what the next one shows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = ("--set", "sequences=4", "sequence_length=32", "micro_batch=2", "stages.*.epochs=1", "split.ratio_max=0.9")


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run of the tiny model, with its text and the figures of `eval`."""
    from bbb_ao.cli import main

    folder = tmp_path_factory.mktemp("reported")
    text = folder / "data.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(20)))
    command = ["train", str(tiny_model), "--data", str(text), "--recipe", "smoke", "--output", str(folder / "out")]
    assert main([*command, *SMALL, "--device", "cpu"]) == 0
    assert main(["eval", str(folder / "out"), "--data", str(text), "--baseline", str(tiny_model), "--limit", "4"]) == 0
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_logs_what_a_report_shows(trained: Path, tiny_model: Path) -> None:
    log = lines(trained / "out.log.jsonl")
    events = [line["event"] for line in log]
    order = ["run", "plan", "channels", "layers", "prepared", "stage", "block", "stage_done", "saved"]
    assert [event for n, event in enumerate(events) if event not in events[:n]] == order
    run = log[0]
    words = ["bbb-ao train", str(tiny_model), "--recipe smoke --output", "--set sequences=4", "--device cpu"]
    assert all(word in run["command"] for word in words)
    assert (run["model"], run["sequences"]) == (str(tiny_model), [4, 32])
    assert {"python", "bbb_ao", "torch"} <= run["versions"].keys()
    assert run["recipe"] == (trained / "out" / "recipe.yaml").read_text()
    before, after = (line["errors"] for line in log if line["event"] == "layers")
    assert before.keys() == after.keys()
    assert len(before) == 7
    assert sum(len(line["layers"]) for line in log if line["event"] == "channels") == 7
    phases = [line for line in log if "phase_seconds" in line]
    assert all(line["host_peak_bytes"] > 2**25 and line["phase_seconds"] >= 0 for line in phases)
    assert 2 < log[-1]["bits_per_weight"] < 6


def test_eval_keeps_its_figures(trained: Path) -> None:
    rows = lines(trained / "out" / "evaluations.jsonl")
    assert [(row["of"], row["bits"]) for row in rows] == [
        ("checkpoint", 2),
        ("full_precision", None),
        ("round_to_nearest", 2),
    ]


def test_report_shows_them(run: Callable, trained: Path) -> None:
    result = run("report", trained / "out", "--output", trained / "page.html")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{trained / 'page.html'}: open it in a browser\n"
    text = (trained / "page.html").read_text()
    for row in lines(trained / "out" / "evaluations.jsonl"):
        assert f"<td>{row['ppl']:.4f}</td>" in text
    assert "Not measured yet" not in text
    assert "self_attn.q_proj, k_proj, v_proj" in text
    assert run("report", trained / "out", "--output", trained / "page.html").code == 0
    assert (trained / "page.html").read_text() == text


def test_report_refuses(refused: Callable, model: Path, tmp_path: Path) -> None:
    assert "expected a directory that bbb-ao train wrote" in refused(3, "report", model)
    assert "got neither" in refused(3, "report", tmp_path / "nothing\x1b[2J")
    (tmp_path / "run.log.jsonl").write_text('{"event": "plan"}\n{"event"')
    assert "run.log.jsonl: line 2: content" in refused(3, "report", tmp_path / "run")
    (tmp_path / "mine.html").write_text("mine")
    target = ("--output", tmp_path / "mine.html")
    assert "expected a report or nothing there" in refused(2, "report", tmp_path / "run", *target)


def test_a_baseline_needs_a_checkpoint_and_text(refused: Callable, trained: Path, model: Path, tmp_path: Path) -> None:
    data = ("--data", trained / "data.jsonl")
    assert "got a plain model" in refused(2, "eval", model, *data, "--baseline", model)
    assert "got no --data" in refused(2, "eval", trained / "out", "--tasks", "x", "--baseline", model)
    assert "'bitbybit'" in refused(3, "eval", trained / "out", *data, "--baseline", trained / "out")
