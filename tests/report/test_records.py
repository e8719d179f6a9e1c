"""A run is read as it was written; whatever is damaged is refused in one line that names file, line and field."""

import json
import os
from pathlib import Path

import pytest
from written_runs import evaluation_lines, log_lines, write_lines

from bbb_ao.errors import ModelError
from bbb_ao.report.records import read_run


def test_everything_of_a_finished_run_is_read(write_run) -> None:
    run = read_run(write_run(log_lines(), evaluation_lines()))
    assert (run.name, run.saved, run.model, run.sequences, run.bits_per_weight) == (
        "out",
        True,
        "model",
        (16, 256),
        2.66,
    )
    assert run.recipe == "schema: 1\nname: smoke\nsequences: 16\n"
    assert [(stage.name, stage.end_to_end, len(stage.fits)) for stage in run.stages.values()] == [
        ("w8a16", False, 3),
        ("w2a16", False, 3),
        ("w2a16 model", True, 1),
    ]
    assert run.stages[1].fits[2].last_loss == pytest.approx(0.03)
    assert list(run.phases) == ["preparing", "1: w8a16", "2: w2a16", "3: w2a16 model", "packing"]
    assert run.sites[2, "model.layers.2.mlp.down_proj"].before[0] == 11
    assert run.errors["after"]["model.layers.0.self_attn.q_proj"] == 0.005
    assert [row.ppl for row in run.evaluations if row.of == "round_to_nearest"] == [55.5, 8.8]
    assert [task.value for task in run.tasks] == [0.75]


def test_an_unfinished_run_has_only_its_log(tmp_path: Path) -> None:
    # Preparation, the first stage, and a block of the second one.
    lines = log_lines()
    cut = next(n for n, line in enumerate(lines) if line.get("stage") == 1) + 2
    write_lines(tmp_path / "gone.log.jsonl", lines[:cut])
    run = read_run(f"{tmp_path}/gone/")
    assert not run.saved
    assert [len(stage.fits) for stage in run.stages.values()] == [3, 1]


def test_the_last_run_of_a_shared_log_counts(write_run) -> None:
    second = log_lines(blocks=1)
    assert len(read_run(write_run(log_lines() + second, None)).stages[0].fits) == 1


def test_a_resumed_run_goes_on(write_run) -> None:
    lines = log_lines()
    cut = next(n for n, line in enumerate(lines) if line.get("stage") == 1) + 2
    run = read_run(write_run([*lines[:cut], lines[0] | {"resumed": True}, *lines[cut - 1 :]], None))
    assert [len(stage.fits) for stage in run.stages.values()] == [3, 3, 1]


def test_a_later_evaluation_replaces_an_earlier_one(write_run) -> None:
    lines = evaluation_lines()
    run = read_run(write_run(None, [*lines, lines[0] | {"ppl": 9.0}, lines[0] | {"data": "other.txt"}]))
    assert [row.ppl for row in run.evaluations if row.bits == "2" and row.of == "checkpoint"] == [9.0, 10.25]


def test_what_json_has_no_number_for_is_read(write_run) -> None:
    lines = log_lines()
    block = next(line for line in lines if line["event"] == "block")
    block |= {"first_loss": "inf", "last_loss": "nan"}
    fit = read_run(write_run(lines, None)).stages[0].fits[0]
    assert fit.first_loss == float("inf")
    assert fit.last_loss != fit.last_loss


@pytest.mark.parametrize(
    ("event", "key", "value"),
    [
        ("run", "recipe", 1),
        ("run", "device", None),
        ("run", "sequences", [1, 2, 3]),
        ("run", "versions", {"torch": 2}),
        ("channels", "layers", []),
        ("channels", "ranks", [1]),
        ("channels", "split", -1),
        ("layers", "errors", {"a": True}),
        ("stage", "blocks", 2.5),
        ("block", "last_loss", "0.5"),
        ("block", "first_loss", 10**400),
        ("prepared", "phase_seconds", []),
    ],
)
def test_a_wrong_field_is_named(event: str, key: str, value: object, write_run) -> None:
    lines = log_lines()
    number, line = next((n, line) for n, line in enumerate(lines, start=1) if line["event"] == event)
    line[key] = value
    directory = write_run(lines, None)
    with pytest.raises(ModelError, match=rf"out.log.jsonl: line {number}: {key}: expected .*; fix: ") as refused:
        read_run(directory)
    assert "\n" not in str(refused.value)


CUT = {
    "cut": ('{"event": "plan"}\n{"event": "blo', "line 2: content: .*; fix: remove that line"),
    "foreign": ('{"event": "plan"}\n[1]\n{}\n', "line 2: content: .*; fix: restore the file"),
    "nested": ("[" * 100_000 + "\n", "line 1: content"),
    "no event": ("{}\n", "line 1: event: expected text"),
    "block first": ('{"event": "block"}\n', "line 1: event: expected a stage"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_damaged_log_is_refused(name: str, write_run, tmp_path: Path) -> None:
    text, expected = CUT[name]
    directory = write_run(None, None)
    (tmp_path / "out.log.jsonl").write_text(text)
    with pytest.raises(ModelError, match=f"out.log.jsonl: {expected}"):
        read_run(directory)


def test_a_log_that_is_no_text_file_is_refused(write_run, tmp_path: Path) -> None:
    directory = write_run(None, None)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    os.mkfifo(tmp_path / "pipe")
    for name, expected in (("bytes", "UTF-8"), ("pipe", "regular"), ("absent", "No such file")):
        with pytest.raises(ModelError, match=expected):
            read_run(directory, tmp_path / name)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing: run: expected a directory that bbb-ao train wrote"):
        read_run(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="got neither"):
        read_run(tmp_path)


def test_evaluations_through_a_link_are_not_read(write_run, tmp_path: Path) -> None:
    directory = write_run(None, None)
    write_lines(tmp_path / "elsewhere", evaluation_lines())
    (directory / "evaluations.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"evaluations.jsonl: file: expected a regular one"):
        read_run(directory)
