"""A pytest plugin that prints a failure when it happens: a run cut short at the end prints none of them."""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n{report.nodeid} ({report.when}, {report.duration:.0f} s)\n{report.longreprtext[-1500:]}", flush=True)
