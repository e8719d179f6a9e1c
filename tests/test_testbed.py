"""Figures on the testbed beside the checkout; skipped where it is absent."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bbb_ao.checkpoint import save_packed
from bbb_ao.convert import convert_model
from bbb_ao.packed_linear import set_bits
from bbb_ao.recipes.data import evaluation_windows
from bbb_ao.recipes.evaluate import perplexity
from bbb_ao.recipes.loading import load_model, load_tokenizer
from bbb_ao.recipes.prepare import round_to_nearest
from bbb_ao.recipes.stages import Recipe, Stage
from bbb_ao.speculation import at_bits, speculate

SHARED = Path(__file__).parent.parent.parent / "shared"
MODEL = SHARED / "testbed" / "openstax-llama-16m"
TEXTS = ("test.jsonl", "wikitext2_test.txt")
WINDOWS = 2

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the testbed is not beside this checkout")


def reference_perplexity(model: Path, text: str) -> float:
    """What the independent evaluator says of a directory."""
    command = [sys.executable, str(SHARED / "tools" / "ppl.py"), str(model), str(SHARED / "testbed" / text)]
    done = subprocess.run([*command, "--limit", str(WINDOWS)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["ppl"]


@pytest.fixture(scope="module")
def windows() -> dict[str, torch.Tensor]:
    tokenizer = load_tokenizer(MODEL)
    return {text: evaluation_windows(tokenizer, SHARED / "testbed" / text, 1024, WINDOWS) for text in TEXTS}


@pytest.mark.parametrize("text", TEXTS)
def test_full_precision_agrees_with_the_independent_evaluator(text: str, windows: dict[str, torch.Tensor]) -> None:
    ours = perplexity(load_model(MODEL, "float32"), windows[text])
    assert ours == pytest.approx(reference_perplexity(MODEL, text), abs=5e-4)


def test_every_width_agrees_before_and_after_saving(tmp_path: Path, windows: dict[str, torch.Tensor]) -> None:
    recipe = Recipe(name="rtn", stages=(Stage(weight_bits=(8, 4, 2)),))
    packed = convert_model(round_to_nearest(load_model(MODEL, "float32"), recipe), 8)
    save_packed(copy.deepcopy(packed), load_tokenizer(MODEL), tmp_path / "packed", 2)
    text = TEXTS[0]
    for bits in (8, 4, 2):
        before = perplexity(set_bits(packed, bits), windows[text])
        # The evaluator knows no widths: it opens a directory at the width that its config names.
        folder = shutil.copytree(tmp_path / "packed", tmp_path / f"w{bits}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"bits": bits}))
        after = perplexity(load_model(folder, "float32"), windows[text])
        assert after == pytest.approx(before, abs=5e-4)
        assert reference_perplexity(folder, text) == pytest.approx(before, abs=5e-4)


def test_drafts_of_two_bits_give_the_tokens_of_eight() -> None:
    recipe = Recipe(name="rtn", stages=(Stage(weight_bits=(8, 4, 2)),))
    packed = convert_model(round_to_nearest(load_model(MODEL, "float32"), recipe), 8).eval()
    model, draft, tokenizer = set_bits(packed, 8), at_bits(packed, 2), load_tokenizer(MODEL)
    for prompt in ("The cell membrane is", "In economics, demand"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=10, do_sample=False)
        assert torch.equal(speculate(model, draft, ids, 3, max_new_tokens=10).sequences, expected)
