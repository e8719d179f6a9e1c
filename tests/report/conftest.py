"""Runs in a folder, and a browser to look at their reports."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chromium import Browser, find_browser
from written_runs import Lines, write_lines


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """A function: (log lines, evaluation lines) -> output directory; None leaves that file out."""

    def write(log: Lines | None, evaluations: Lines | None, name: str = "out") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        config = {"model_type": "llama", "quantization_config": {"quant_method": "bitbybit"}}
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "recipe.yaml").write_text("schema: 1\nname: smoke\nsequences: 16\n")
        if log is not None:
            write_lines(tmp_path / f"{name}.log.jsonl", log)
        if evaluations is not None:
            write_lines(directory / "evaluations.jsonl", evaluations)
        return directory

    return write


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on the path: install the package chromium to look at reports in a browser")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
