"""Launch settings of the decoding kernels, tried in the decoding loop of decode.py, for the tuned files.

    python benchmarks/decode_settings.py [--impl w2a16] [--fold 8] [--seconds 300] [--output FILE]

What a setting is worth depends on the kernels that its launch overlaps with, so it is measured where it runs: one
kernel after the other takes each candidate in turn and keeps the one that gives most tokens a second. Inductor runs
with `INDUCTOR` and what `--inductor` adds; one row, batch 1. One flat row for each run: `changed` is what it tried,
`kept` every choice at that time. The last lines are those of the tuned file.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import decode
from environment import environment, lacks_gpu
from settings import MORE

from bbb_ao.kernels.packed_linear import launch
from bbb_ao.kernels.packed_linear.tuning import settings_for

LAYERS = 32
INDUCTOR = (("triton.enable_pdl", True), ("combo_kernels", True))


class Choices:
    """Stands for `settings_for`: remembers the keys of decoding kernels, and takes what is chosen for them."""

    def __init__(self) -> None:
        self.chosen: dict[str, launch.Settings] = {}
        self.used: dict[str, launch.Settings] = {}

    def __call__(self, key, candidates, run, device):
        choice = self.chosen.get(key) or settings_for(key, candidates, run, device)
        if "decode" in key and key.endswith(", 1 rows"):
            self.used[key] = choice
        return choice


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", default="w2a16", choices=[name for name in decode.IMPLEMENTATIONS if name != "bf16"])
    decode.Way.add_options(parser, fold=8, inductor=INDUCTOR)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no further run is begun after these")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "decode_settings.json")
    arguments = parser.parse_args()
    if lacks_gpu("decode_settings"):
        return 5
    begun, choices = time.monotonic(), Choices()
    way, where = decode.Way.of(arguments), environment(arguments.seed)
    launch.settings_for = choices
    model, _ = decode.build_measured(arguments.impl, LAYERS, arguments.seed)
    rows: list[dict[str, object]] = []

    def rate(changed: dict[str, launch.Settings]) -> float:
        """Tokens a second of the steps with a change."""
        kept = dict(choices.chosen)
        choices.chosen = kept | changed
        row = decode.measure(model, 1, arguments.runs, arguments.seed, way, profile=False)
        choices.chosen = kept
        rows.append({"impl": arguments.impl, **asdict(way), "changed": changed, "kept": kept, **row, **where})
        arguments.output.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        print(f"{row['step_tokens_per_second']:8.1f} tokens/s  {changed}", flush=True)
        return float(str(row["step_tokens_per_second"]))

    best = rate({})
    choices.chosen = dict(choices.used)
    for key, at_first in choices.used.items():
        for candidate in dict.fromkeys([*launch.DECODE_SETTINGS, *MORE]):
            if candidate != at_first and time.monotonic() - begun < arguments.seconds:
                found = rate({key: candidate})
                if found > best:
                    best, choices.chosen[key] = found, candidate
    for key, choice in choices.chosen.items():
        print(f'"{key}": {json.dumps(choice)},')
    return 0


if __name__ == "__main__":
    sys.exit(main())
