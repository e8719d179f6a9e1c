"""Every example of the README runs, in the order in which it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(console|python)\n(.*?)```", README, re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_examples_run(tmp_path: Path) -> None:
    (tmp_path / "bbb_ao").symlink_to(ROOT / "bbb_ao")
    outputs = []
    for language, text in BLOCKS:
        if language == "python":
            outputs.append(run([sys.executable, "-c", text], tmp_path))
            continue
        for line in text.strip().splitlines():
            words = shlex.split(line)
            # Set-up is what CI itself has done to get here.
            if words[0] in ("make", "source"):
                continue
            words = {"python": [sys.executable], "bbb-ao": [sys.executable, "-m", "bbb_ao"]}[words[0]] + words[1:]
            outputs.append(run(words, tmp_path))
    printed = "\n".join(outputs)
    assert "2 bits: perplexity" in printed
    assert "bits per weight at 2 bits" in printed
    assert (tmp_path / "dense" / "model.safetensors").is_file()


def test_readme_is_short_and_names_the_commands() -> None:
    assert len(README.splitlines()) <= 120
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
