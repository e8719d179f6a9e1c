"""The command line, `bbb-ao`: a thin front to recipes and checkpoints. Nothing here imports torch at start."""

from bbb_ao.cli.entry import main

__all__ = ["main"]
