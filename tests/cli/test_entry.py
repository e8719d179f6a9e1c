"""The command line itself: help, usage errors, exit codes, signals, and what `eval` prints."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bbb_ao import errors
from bbb_ao.cli.entry import Lasting, escape, explain
from bbb_ao.recipes import loader

HEAVY = ("torch", "transformers", "datasets", "pydantic", "yaml", "rich", "numpy")


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['bbb-ao', '--help']; from bbb_ao.cli import main; code = main(); "
        f"assert code == 0; assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("train", "eval", "inspect", "recipes"))


def test_modules_import_no_more_than_they_need() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "bbb_ao.demo.stdlib_corpus", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not Path("--help").exists()
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers"}


def test_help_names_every_value(run) -> None:
    lines = run("--help").out.splitlines()
    listed = lines[lines.index("Commands:") + 1 :]
    assert len(listed) > 8
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)
    for line in listed:
        command = line.split()[0]
        text = run(command, "--help").out
        assert text.startswith(f"Usage: bbb-ao {command} [OPTIONS]")
        assert not re.search(r"\{[a-z]|range>|^  [a-z]+ <", text, re.MULTILINE), text


def test_a_run_goes_on_when_its_reader_leaves(tmp_path: Path) -> None:
    """As behind `| head -1`, or without the terminal."""
    program = (
        "import sys, time; sys.argv = ['bbb-ao']; from bbb_ao.cli import main\n"
        "import typer; app = typer.Typer()\n"
        "@app.command()\n"
        "def work() -> None:\n"
        "    typer.echo('first'); sys.stdin.read(); typer.echo('x' * 10**6); print('y', file=sys.stderr)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w')\n"
        "sys.exit(main([], lambda: app))\n"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"first\n"
        child.stdout.close()
        child.stderr.close()
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait() == 0
    assert (tmp_path / "done").exists()


def test_a_terminal_that_was_closed_is_no_error() -> None:
    terminal, program = os.openpty()
    os.close(terminal)
    with os.fdopen(program, "w") as stream:
        for _ in range(2):
            Lasting(stream).write("x" * 10**6)
            Lasting(stream).flush()


def test_output_that_cannot_be_written_is_an_error() -> None:
    with open("/dev/full", "w") as full, pytest.raises(OSError, match="No space left"):
        Lasting(full).write("x" * 10**6)


def test_module_and_version_run() -> None:
    done = subprocess.run([sys.executable, "-m", "bbb_ao", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("bbb-ao")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trian",),
        ("train",),
        ("--no-such-option",),
        ("eval", "dir"),
        ("eval", "dir", "--data", "x", "--bits", "two"),
        ("eval", "dir", "--data", "x", "--batch", "0"),
        ("eval", "dir", "--data", "x", "--bats", "1"),
        ("inspect", "a", "b"),
        ("recipes", "nothing"),
    ],
)
def test_usage_error_is_one_line(arguments: tuple[str, ...], refused) -> None:
    assert "; fix: " in refused(2, *arguments)


def test_recipes_are_listed_and_shown(run) -> None:
    names = [line.split()[0] for line in run("recipes").out.splitlines()]
    assert names == list(loader.shipped_recipes())
    assert {"any_precision", "smoke", "w2a16_best", "w2a2_light", "rtn", "efficientqat_small"} <= set(names)
    assert "weight_bits: 2" in run("recipes", "smoke").out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_with_their_code(number: int, code: int, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "shipped_recipes", lambda: os.kill(os.getpid(), number))
    # A shell starts background jobs with SIGINT ignored, which Python inherits.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert refused(code, "recipes")
        assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_an_ignored_signal_stays_ignored(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a job in the background, which Ctrl-C is not meant for."""
    monkeypatch.setattr(loader, "shipped_recipes", lambda: os.kill(os.getpid(), signal.SIGINT) or ())
    inherited = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("recipes").code == 0
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_debug_shows_the_traceback(run, tmp_path: Path) -> None:
    for arguments in (("--debug", "inspect", tmp_path), ("inspect", tmp_path, "--debug")):
        result = run(*arguments)
        assert result.code == 3
        assert "Traceback" in result.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RecipeError("x"), 2),
        (errors.ModelError("x"), 3),
        (errors.DataError("x"), 4),
        (errors.ResourceError("x"), 5),
        (errors.NumericsError("x"), 6),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 5),
        (torch.OutOfMemoryError("x"), 5),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 5),
        (OSError(errno.ENOSPC, "No space left on device", "file"), 5),
        (PermissionError(errno.EACCES, "Permission denied", "file"), 5),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert explain(error)[0] == code


def test_what_a_stopped_run_adds_stands_in_its_line() -> None:
    error = errors.ResourceError("disk: full; fix: free it")
    error.add_note("the same command goes on from stage 1/3")
    assert explain(error) == (5, "disk: full; fix: free it; the same command goes on from stage 1/3")


def test_escape_keeps_text_and_shows_the_rest() -> None:
    assert escape("naïve: a\tb\r\n\x00\x9b\u2028\udcff") == "naïve: a\\tb\\r\\n\\x00\\x9b\\u2028\\udcff"


def reference_perplexity(model: Path, text: Callable[[int], list[int]], window: int) -> float:
    """The protocol, written without this package: a loop over windows and tokens in float64."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = text(AutoTokenizer.from_pretrained(model).bos_token_id)
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        piece = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logits = network(piece).logits[0].double().log_softmax(-1)
        losses += [-logits[i, piece[0, i + 1]].item() for i in range(window - 1)]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


def test_eval_follows_the_protocol(run, model: Path, data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["text"] for line in data.read_text().splitlines()]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    result = run("eval", model, "--data", data, "--json", "--window", 48)
    row = json.loads(result.out)
    assert result.code == 0
    assert result.err == ""
    assert row["bits"] is None
    assert row["data"] == "data.jsonl"
    expected = reference_perplexity(model, lambda bos: [i for text in rows for i in [bos, *ids(text)]], 48)
    assert row["ppl"] == pytest.approx(expected, abs=1e-3)
    assert row["tokens"] == row["windows"] * 47

    plain = tmp_path / "plain.txt"
    plain.write_bytes(b"one line\r\nanother line\n" * 30)
    row = json.loads(run("eval", "--json", "--data", plain, "--window", "48", model).out)
    expected = reference_perplexity(model, lambda bos: ids("one line\nanother line\n" * 30), 48)
    assert row["ppl"] == pytest.approx(expected, abs=1e-3)


def test_eval_takes_the_context_as_its_window(run, refused, model: Path, data: Path) -> None:
    row = json.loads(run("eval", model, "--data", data, "--json", "--limit", 2).out)
    assert row["windows"] == 2
    assert row["tokens"] == 2 * 63
    assert "at most 64" in refused(2, "eval", model, "--data", data, "--window", 65)


def test_bits_of_a_plain_model_are_refused(refused, model: Path, data: Path) -> None:
    assert "leave out --bits" in refused(2, "eval", model, "--data", data, "--bits", 4, 2)


def test_unknown_device_is_refused(refused, model: Path, data: Path) -> None:
    for device in ("gpu", "meta", "mps"):
        refused(5, "eval", model, "--data", data, "--device", device)
