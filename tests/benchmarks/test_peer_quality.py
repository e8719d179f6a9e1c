"""The peers' rows: their form, their lines, and that only 2-bit weights are measured. None but torchao is installed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import experiment_lines
import peer_quality
import pytest
import quality
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent.parent
SMALL = "auto-round/nsamples=6/seqlen=16/batch_size=4/iters=3"


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """A function: arguments of the script -> the rows in its output."""
    ids = torch.randint(200, (40, 32), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    texts = {"calibration": ids.flatten(), "evaluate.test": ids[:4].clone(), "evaluate.wikitext2": ids[4:8].clone()}
    save_file(texts, tmp_path / "tokens")
    monkeypatch.setenv("COMMIT", "c0ffee")

    def run_main(*arguments: object) -> list[dict[str, Any]]:
        shared = ("--model", tiny_model, "--tokens", tmp_path / "tokens", "--output", tmp_path / "rows.json")
        monkeypatch.setattr(sys, "argv", ["peer_quality.py", *map(str, (*shared, *arguments))])
        peer_quality.main()
        return json.loads((tmp_path / "rows.json").read_text())

    return run_main


@pytest.fixture
def auto_round(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a stand-in for auto-round was called with; its weights are signs."""
    calls: list[dict[str, Any]] = []

    def stand_in(model: Any, tokenizer: Any, **settings: Any) -> SimpleNamespace:
        def quantize() -> None:
            for linear in peer_quality.linears(model):
                linear.weight.data.sign_()

        calls.append(settings | {"tokenizer": tokenizer})
        return SimpleNamespace(quantize=quantize)

    monkeypatch.setitem(sys.modules, "auto_round", SimpleNamespace(AutoRound=stand_in))
    return calls


def test_rows_have_the_form_of_the_others(run, auto_round: list[dict[str, Any]]) -> None:
    rows = run("--peer", SMALL, f"{SMALL}/sym=false", "--seeds", 0, 1)
    assert [(row["seed"], row["bits_per_weight"]) for row in rows] == [(0, 2.5), (0, 2.5625), (1, 2.5), (1, 2.5625)]
    fields = quality.read_rows(ROOT / "benchmarks" / "results" / "quality.json")[-1].keys()
    for row in rows:
        assert fields - {"last_losses", "valid_ppl"} <= row.keys()
        assert (row["method"], row["weight_bits"], row["act_bits"]) == ("auto-round", 2, None)
        assert row["method"] == experiment_lines.method_of(row["recipe"])
        assert row["test_ppl"] > 1
        assert row["wikitext2_ppl"] > 1
        assert (row["calibration_tokens"], row["commit"], row["tokens"]) == (96, "c0ffee", "tokens")
    assert run("--peer", SMALL, "--seeds", 0) == rows


def test_a_peer_gets_the_sequences_of_our_recipes(run, auto_round: list[dict[str, Any]], tmp_path: Path) -> None:
    run("--peer", SMALL, "--seeds", 5)
    (call,) = auto_round
    ids = load_file(tmp_path / "tokens")["calibration"]
    assert [len(batch) for batch in call["dataset"]] == [4, 2]
    assert torch.equal(torch.cat(call["dataset"]), quality.draw(ids, 6, 16, 5))
    assert (call["seed"], call["iters"], call["group_size"], call["tokenizer"].bos_token_id) == (5, 3, 32, 0)


def test_weights_of_more_than_two_bits_are_refused(run, auto_round, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "sign_", lambda weight: weight)
    with pytest.raises(RuntimeError, match="expected at most 4 values in a group, got"):
        run("--peer", SMALL, "--seeds", 0)


def test_parq_trains_to_four_values_in_a_group(run) -> None:
    pytest.importorskip("torchao.prototype.parq")
    line = "parq/sequences=8/sequence_length=32/epochs=3/batch_size=2/lr=1e-2"
    (row,) = run("--peer", line, "--seeds", 0)
    (untrained,) = run("--peer", f"{line}/lr=0", "--seeds", 0)[1:]
    assert (row["method"], row["bits_per_weight"], row["calibration_tokens"]) == ("parq", 2.5, 256)
    assert row["test_ppl"] < untrained["test_ppl"]


@pytest.mark.parametrize("line", [SMALL, "hqq/axis=0", "parq/lr=1e-3", "auto-round/lr=null/sym=false"])
def test_a_recipe_says_the_same_again(line: str) -> None:
    recipe = peer_quality.full_line(line)
    assert peer_quality.parse_line(recipe) == peer_quality.parse_line(line)
    assert peer_quality.full_line(recipe) == recipe


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("auto-rounds", "peer: expected auto-round, hqq, parq"),
        ("hqq/iters=3", "expected settings among group_size, axis"),
    ],
)
def test_lines_without_meaning_are_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peer_quality.parse_line(line)


def test_groups_are_counted_along_the_axis() -> None:
    weight = torch.arange(8.0).repeat_interleave(4).view(4, 8)  # rows of two values, columns of four
    assert peer_quality.most_values(weight, 8) == 2
    assert peer_quality.most_values(weight, 4) == 1
    assert peer_quality.most_values(weight, 4, axis=0) == 4
