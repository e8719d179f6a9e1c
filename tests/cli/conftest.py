"""A packed checkpoint for the commands that run one."""

from pathlib import Path

import pytest

from bbb_ao.checkpoint import save_packed
from bbb_ao.convert import convert_model
from bbb_ao.recipes.loading import load_model, load_tokenizer
from bbb_ao.recipes.prepare import round_to_nearest
from bbb_ao.recipes.stages import Recipe, Stage


@pytest.fixture(scope="session")
def packed_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model rounded to nearest, with all widths; it opens at 2 bits. Its tokenizer has a chat template."""
    recipe = Recipe(name="rtn", stages=(Stage(weight_bits=2),))
    packed = convert_model(round_to_nearest(load_model(tiny_model, "float32"), recipe), 8)
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}[{{ m.content }}]{% endfor %}"
    )
    save_packed(packed, tokenizer, directory := tmp_path_factory.mktemp("packed") / "model", 2)
    return directory
