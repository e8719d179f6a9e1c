"""`bbb-ao eval --tasks`: local tasks of lm-eval where it is installed, one line of error where it is not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

installed = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra")
CHOICES = """task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.5}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "letters.yaml").write_text(CHOICES)
    rows = [{"question": f"letter {i}", "choices": ["a", "bc", "z"], "answer": i % 3} for i in range(12)]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_without_lm_eval_the_extra_is_named(refused, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refused(5, "eval", tiny_model, "--tasks", "letters")
    assert "lm-eval: expected it for --tasks" in message
    assert "pip install 'bbb-ao[eval]'" in message


def test_text_or_tasks_are_needed(refused, tiny_model: Path) -> None:
    assert "--data: expected text, or --tasks, got neither" in refused(2, "eval", tiny_model)


@installed
@pytest.mark.filterwarnings("ignore")
def test_local_tasks_run_with_what_made_each_figure(run, tiny_model: Path, tasks: Path, data: Path) -> None:
    arguments = ("--tasks", "letters", "--task-dir", tasks, "--batch", 3)
    result = run("eval", tiny_model, *arguments, "--data", data, "--json")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in result.out.splitlines() if line.startswith("{")]
    assert "ppl" in rows[0]
    (row,) = rows[1:]
    expected = {
        "bits": None,
        "task": "letters",
        "metric": "acc,none",
        "samples": 12,
        "backend": "lm-eval hf",
        "batch": 3,
    }
    assert expected.items() <= row.items()
    assert row["task_version"] == 1.5
    assert row["value"] in {i / 12 for i in range(13)}
    assert {"lm_eval", "torch", "transformers", "bbb_ao", "python"} == row["versions"].keys()
    few = run("eval", tiny_model, *arguments, "--limit", 4)
    assert "full precision: letters acc,none" in few.out
    assert "(4 samples)" in few.out


@installed
def test_tasks_that_cannot_run_are_refused(run, tiny_model: Path, tasks: Path, tmp_path: Path) -> None:
    def message(*arguments: object) -> str:
        result = run("eval", tiny_model, *arguments)
        assert result.code == 4, result
        return result.err.splitlines()[-1]

    assert "expected one of letters, got 'words'" in message("--tasks", "words", "--task-dir", tasks)
    (tmp_path / "empty").mkdir()
    assert "a folder with .yaml task files" in message("--tasks", "letters", "--task-dir", tmp_path / "empty")
    (tasks / "letters.jsonl").unlink()
    assert "expected ones that lm-eval runs" in message("--tasks", "letters", "--task-dir", tasks)
