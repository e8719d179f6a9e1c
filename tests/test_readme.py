"""Every example of the README runs, in the order in which it stands there."""

import re
from pathlib import Path

from doc_examples import ROOT, run_examples

README = ROOT / "README.md"


def test_examples_run(tmp_path: Path) -> None:
    printed = run_examples(README, tmp_path)
    assert "2 bits: perplexity" in printed
    assert "bits per weight at 2 bits" in printed
    assert (tmp_path / "dense" / "model.safetensors").is_file()


def test_readme_is_short_and_names_the_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "demo", "test"):
        assert f"make {target}" in text
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
