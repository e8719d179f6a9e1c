"""The report of a run: one HTML file with charts, made from what `bbb-ao train` and `bbb-ao eval` left behind.

Nothing here imports torch. `write_report` is the door.
"""

from bbb_ao.report.writer import write_report

__all__ = ["write_report"]
