"""The corpus of the fuzzers, through the same targets, without atheris."""

from pathlib import Path

import pytest
from doc_examples import ROOT
from fuzz_targets import SHARDS, TARGETS, manifest

CORPUS = ROOT / "fuzz" / "corpus"
INPUTS = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: path.relative_to(CORPUS).as_posix())
def test_input_passes(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_inputs() -> None:
    assert {path.parent.name for path in INPUTS} == TARGETS.keys()


@pytest.mark.parametrize(
    ("name", "seed"),
    [("checkpoint", "packed_header"), ("recipe", "every_key"), ("index", "whole"), ("manifest", "whole")],
)
def test_a_whole_input_is_read_to_its_end(name: str, seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused of it, so that mutations of it reach every check."""
    monkeypatch.setattr("fuzz_targets.refusal", Refused)
    TARGETS[name]((CORPUS / name / seed).read_bytes())


class Refused:
    """Lets every error through."""

    def __init__(self, kind: type) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_a_failing_reader_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise KeyError(next(iter(SHARDS)))

    monkeypatch.setattr("fuzz_targets.check_manifest", broken)
    with pytest.raises(KeyError):
        manifest(b"{}")
