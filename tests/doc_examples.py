"""Runs the examples of a Markdown file, in the order in which they stand there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def run_examples(document: Path, folder: Path) -> str:
    """Run every `console` and `python` block in `folder`, beside the package, and save every `yaml` block with a name.

    The name is the block's first line, "# recipe.yaml". Set-up lines of the console (make, source) are what CI itself
    has done to get here.

    Returns:
        everything printed.
    """
    (folder / "bbb_ao").symlink_to(ROOT / "bbb_ao")
    outputs = []
    blocks = re.findall(r"```(console|python|yaml)\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    for language, text in blocks:
        if language == "python":
            outputs.append(run([sys.executable, "-c", text], folder))
        elif language == "yaml":
            if name := re.match(r"# (\w+\.yaml)\n", text):
                (folder / name[1]).write_text(text, encoding="utf-8")
        else:
            programs = {"python": [sys.executable], "bbb-ao": [sys.executable, "-m", "bbb_ao"]}
            for line in text.strip().splitlines():
                words = shlex.split(line)
                if words[0] not in ("make", "source"):
                    outputs.append(run(programs[words[0]] + words[1:], folder))
    return "\n".join(outputs)
