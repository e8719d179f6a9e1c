"""Fuzz the readers of `fuzz_targets` for so many seconds in all: `python fuzz/run.py 600`.

Needs atheris (`pip install '.[fuzz]'`). What is found is written below build/fuzz; put it into fuzz/corpus once the
reader is mended, and it is tested from then on.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
INPUT_SECONDS = 10  # as for every refusal
MOST_BYTES = 8192


def fuzz(name: str, seconds: int) -> None:
    """Run one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["bbb_ao", "yaml", "fuzz_targets"]):
        from fuzz_targets import TARGETS
    found = ROOT / "build" / "fuzz" / name
    found.mkdir(parents=True, exist_ok=True)
    limits = (f"-max_total_time={seconds}", f"-timeout={INPUT_SECONDS}", f"-max_len={MOST_BYTES}")
    # New inputs go to the first folder, what fails beside it.
    folders = (str(found), str(HERE / "corpus" / name))
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={found.parent}/{name}-", *folders], TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    sys.path[:0] = [str(ROOT), str(HERE)]
    if len(sys.argv) == 3:
        fuzz(sys.argv[1], int(sys.argv[2]))
    names = sorted(folder.name for folder in (HERE / "corpus").iterdir() if folder.is_dir())
    seconds = int(sys.argv[1]) // len(names)
    return max(subprocess.run([sys.executable, __file__, name, str(seconds)], check=False).returncode for name in names)


if __name__ == "__main__":
    sys.exit(main())
