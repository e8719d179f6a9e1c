"""What every bad input has in common, and a packed checkpoint to damage."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bbb_ao.checkpoint import save_packed
from bbb_ao.convert import convert_model
from bbb_ao.qat_linear import set_training_bits
from bbb_ao.recipes.prepare import prepare_student
from bbb_ao.recipes.stages import Recipe, Split, Stage


@pytest.fixture
def refused(refused: Callable[..., str]) -> Callable[..., str]:
    """The `refused` of all commands, whose line also says what was expected, what was found and what to do."""

    def call(code: int, *arguments: object, reports: bool = False) -> str:
        line = refused(code, *arguments, reports=reports)
        assert re.fullmatch(r"bbb-ao: error: .+: .*expected .+, got\b.+; fix: .+\n", line), line
        # Not an error in an error.
        assert line.count("; fix: ") == 1, line
        return line

    return call


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets as far as its plan, which takes half a minute for a large model, fails the test."""

    def planned(*arguments: object) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr("bbb_ao.cli.commands.check_plan", planned)


@pytest.fixture(scope="session")
def whole_checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model split, rounded to nearest and packed with all widths; it opens at 4 bits."""
    path = tmp_path_factory.mktemp("packed") / "packed"
    split = Split(ratio_min=0.5, ratio_max=0.5, metric="weight")
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    prepare_student(model, Recipe(name="test", stages=(Stage(weight_bits=2),), split=split), None)
    set_training_bits(model, 8, None)
    save_packed(convert_model(model, 8), AutoTokenizer.from_pretrained(tiny_model), path, 4, "schema: 1\n")
    return path


@pytest.fixture
def checkpoint(whole_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(whole_checkpoint, tmp_path / "checkpoint"))
