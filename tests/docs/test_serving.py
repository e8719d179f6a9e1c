"""Every example of the page on serving runs, in the order in which it stands there."""

import re
from pathlib import Path

from doc_examples import ROOT, run_examples


def test_examples_run(tmp_path: Path) -> None:
    printed = run_examples(ROOT / "docs" / "serving.md", tmp_path)
    assert "opened at 4 bits" in printed
    assert re.search(r"^16 tokens, [\d.]+ tokens/s, accepted \d+ of \d+ drafted tokens", printed, re.MULTILINE)
    assert "as without drafts: True" in printed
    assert printed.rstrip().endswith("exit code 0")
