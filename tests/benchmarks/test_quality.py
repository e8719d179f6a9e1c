"""The quality benchmark: its lines, its rows, and that it survives being cut off."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experiment_lines
import pytest
import quality
import torch
from experiment_lines import method_of, parse_recipe
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bbb_ao.errors import RecipeError
from bbb_ao.recipes.loader import load_recipe, shipped_recipes
from bbb_ao.recipes.stages import Clip, GridSettings, Split, Stage

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_the_loaders(name: str) -> None:
    built = parse_recipe(f"{name}/seed=3/stages.*.lr=2e-4", 3)
    loaded = load_recipe(name, ["seed=3", "stages.*.lr=2e-4", f"name={name}/seed=3/stages.*.lr=2e-4"])
    assert built == loaded
    assert method_of(f"{name}/seed=3") == name


def test_a_schedule_of_its_own() -> None:
    line = (
        "128x512/8:0.5@1e-4/8+4+2*64,8,1:3/2a2:1/m2a2:1.5,objective=mixed_kl,text=both,batch_size=16/lr=6e-4/batch=2"
        "/split=0.1/split.metric=weight/group_size=64/act_kind=integer/clip.asymmetric=true/generated=8/warmup=0"
    )
    recipe = parse_recipe(line, 7)
    assert recipe.stages == (
        Stage(weight_bits=8, epochs=0.5, lr=1e-4, batch_size=2),
        Stage(weight_bits=(8, 4, 2), loss_weights=(64.0, 8.0, 1.0), epochs=3.0, lr=6e-4, batch_size=2),
        Stage(weight_bits=2, act_bits=2, epochs=1.0, lr=6e-4, batch_size=2),
        Stage(
            scope="model",
            weight_bits=2,
            act_bits=2,
            epochs=1.5,
            lr=6e-4,
            batch_size=16,
            objective="mixed_kl",
            text="both",
        ),
    )
    assert (recipe.name, recipe.seed, recipe.sequences, recipe.sequence_length) == (line, 7, 128, 512)
    assert recipe.split == Split(ratio_max=0.1, metric="weight")
    assert recipe.grid == GridSettings(group_size=64, act_kind="integer")
    assert (recipe.clip, recipe.generated, recipe.warmup) == (Clip(asymmetric=True), 8, 0)
    assert parse_recipe("8x32/8+4:1", 0).default_bits == 4
    assert method_of(line) == "bitbybit"


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("8x32/x2:1", ValueError, "stage: expected"),
        ("8x32/2", ValueError, "stage: expected"),
        ("8x32", RecipeError, "stages"),
        ("8x32/2:1/group_size=48", RecipeError, "group_size"),
        ("8x32/2:1,text=both", RecipeError, "generated"),
        ("w2a16/2:1", ValueError, "takes settings"),
        ("w2a61", RecipeError, "w2a61.yaml"),
        ("8x32/2:1/nonsense=1", TypeError, "nonsense"),
    ],
)
def test_lines_without_meaning_are_refused(line: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_recipe(line, 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a token file."""
    folder = tmp_path_factory.mktemp("quality")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    ids = torch.randint(60, (40, 32), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    save_file(
        {"calibration": ids.flatten(), "evaluate.test": ids[:4].clone(), "evaluate.wikitext2": ids[4:8].clone()},
        folder / "tokens",
    )
    return folder


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function: arguments of the script -> what it prints, with the folder as working directory."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COMMIT", "c0ffee")

    def run_main(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, arguments)])
        capsys.readouterr()
        quality.main()
        return capsys.readouterr().out

    return run_main


@pytest.fixture
def run(call: Callable[..., str], place: Path) -> Callable[..., list[dict[str, Any]]]:
    """A function: output and lines -> the rows in the output after running them."""

    def run_lines(output: str, *lines: str, more: tuple[object, ...] = ()) -> list[dict[str, Any]]:
        call("run", "--model", "model", "--tokens", "tokens", "--output", output, "--experiments", *lines, *more)
        return json.loads((place / output).read_text())

    return run_lines


def test_rows_say_what_was_run(place: Path, call, run) -> None:
    call("generate", "--model", "model", "--tokens", "tokens", "--sequences", 3, "--length", 32, "--batch", 2)
    assert load_file(place / "tokens")["generated"].shape == (3, 32)
    lines = ("full-precision", "8x32/8+4+2:1/m8+4+2:1,text=both/generated=2/batch=4", "rtn")
    rows = run("a.json", *lines, more=("--seeds", 1))
    expected = {("full-precision", 2, 1), ("rtn", 2, 1)} | {("bitbybit", w, 1) for w in (8, 6, 4, 3, 2)}
    assert {(row["method"], row["weight_bits"], row["seed"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["recipe"] in lines
        assert row["commit"] == "c0ffee"
        assert row["test_ppl"] > 1
        assert row["wikitext2_ppl"] > 1
        trained = row["method"] == "bitbybit"
        assert (row["calibration_tokens"], row["generated_tokens"]) == ((256, 64) if trained else (0, 0))
        assert (row["bits_per_weight"] is None) == (row["method"] == "full-precision")
        assert {"act_bits", "seconds", "peak_bytes", "device", "torch"} <= row.keys()
    table = call("table", "--output", "a.json").splitlines()
    assert len(table) == 2 + 1 + 5 + 1
    assert any("| tokens | 8, 16 |" in line for line in table)


def test_a_finished_run_is_passed_over_and_another_commit_is_not(run, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "4x32/2:1"
    first = run("b.json", line, more=("--seeds", 0))
    assert run("b.json", line, more=("--seeds", 0)) == first
    both = run("b.json", line, "rtn", more=("--seeds", 0))
    assert both[:1] == first
    assert [row["recipe"] for row in both] == [line, "rtn"]
    monkeypatch.setenv("COMMIT", "beef")
    again = run("b.json", line, more=("--seeds", 0))
    assert [(row["recipe"], row["commit"]) for row in again] == [("rtn", "c0ffee"), (line, "beef")]
    # Everything but the time and the commit is the same again.
    assert {k: v for k, v in again[1].items() if k not in ("seconds", "commit")} == {
        k: v for k, v in first[0].items() if k not in ("seconds", "commit")
    }


def test_every_seed_runs_every_line_but_references_once() -> None:
    done = {"recipe": "rtn", "seed": 0, "commit": quality.commit(), "tokens": "t"}
    rows = [done, {"recipe": "a", "seed": 0, "commit": "other", "tokens": "t"}]
    assert quality.pending_runs(rows, ["rtn"], [0], "other text") == [("rtn", 0)]
    pending = quality.pending_runs(rows, ["full-precision", "rtn", "a", "a"], [0, 1], "t")
    assert pending == [("full-precision", 0), ("a", 0), ("rtn", 1), ("a", 1)]


STUB = """
import json, os, sys, time
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
line = given["--experiments"]
if line == "slow":
    time.sleep(100)
if line == "wrong":
    sys.exit(3)
row = {"recipe": line, "seed": int(given["--seeds"]), "commit": os.environ["COMMIT"], "tokens": "tokens"}
open(given["--output"], "w").write(json.dumps([row]))
"""


def test_runs_side_by_side_are_limited_and_gathered(
    place: Path, call, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(quality, "__file__", str(tmp_path / "stub.py"))
    rows = run("c.json", "slow", "a", "wrong", "b", more=("--seeds", 0, 1, "--jobs", 3, "--timeout", 5))
    assert {(row["recipe"], row["seed"], row["commit"]) for row in rows} == {
        (line, seed, "c0ffee") for line in "ab" for seed in (0, 1)
    }
    arguments = (
        "run",
        "--model",
        "model",
        "--tokens",
        "tokens",
        "--output",
        "c.json",
        "--experiments",
        "a",
        "slow",
        "d",
    )
    printed = call(*arguments, "wrong", "--seeds", 0, "--jobs", 2, "--deadline", 4)
    assert "slow seed 0: ended after" in printed
    assert "wrong seed 0: failed with code 3" in printed
    assert [row["recipe"] for row in quality.read_rows(place / "c.json")][-1] == "d"
    assert not list(place.glob("*.part*"))
    late = call(*arguments, "e", "--seeds", 0, "--jobs", 2, "--deadline", 0)
    assert late == "2 runs were not started; run the same command again\n"


ABLATIONS = sorted((ROOT / "benchmarks" / "ablations").glob("*.txt"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_line_of_the_ablations_has_a_meaning(path: Path) -> None:
    parser = quality.Parser()
    parser.add_argument("--experiments", nargs="+")
    lines = parser.parse_args(["--experiments", f"@{path}"]).experiments
    assert len(set(lines)) == len(lines)
    for line in lines:
        if line not in experiment_lines.REFERENCES:
            assert parse_recipe(line, 0).name == line


def test_rows_that_are_committed_have_their_fields() -> None:
    rows = quality.read_rows(ROOT / "benchmarks" / "results" / "quality.json")
    fields = "method recipe weight_bits act_bits seed test_ppl wikitext2_ppl bits_per_weight calibration_tokens"
    needed = {*fields.split(), "seconds", "peak_bytes", "commit"}
    assert rows
    for row in rows:
        assert needed <= row.keys()
        assert row["method"] == experiment_lines.method_of(row["recipe"])
