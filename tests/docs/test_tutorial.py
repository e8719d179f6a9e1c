"""Every example of the tutorial runs, in the order in which it stands there."""

import re
from pathlib import Path

from doc_examples import ROOT, run_examples


def test_examples_run(tmp_path: Path) -> None:
    printed = run_examples(ROOT / "docs" / "tutorial.md", tmp_path)
    figures = r"([\d.]+)"
    assert re.search(rf"^full precision: perplexity {figures}", printed, re.MULTILINE)
    for pattern in (rf"^(\d) bits: perplexity {figures}", rf"^(\d) bits: {figures} bits per weight, loss"):
        assert [found[0] for found in re.findall(pattern, printed, re.MULTILINE)] == ["8", "4", "2"]
    # The dense export is a plain model again.
    assert printed.rstrip().endswith("Linear torch.bfloat16")
