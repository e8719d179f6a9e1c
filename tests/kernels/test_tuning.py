"""Launch settings: shipped, measured once and kept, or the first candidate; on made-up times, without a GPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="tuning measures with Triton's tools")
from bbb_ao.kernels.packed_linear import tuning

CANDIDATES = [(1, 4), (1, 8), (2, 4)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """How many candidates each measurement had; (1, 8) is the fastest."""
    calls: list[int] = []

    def times(candidates, run, device):
        calls.append(len(candidates))
        return {each: abs(each[1] - 8) + each[0] for each in candidates}

    monkeypatch.setattr(tuning, "milliseconds", times)
    monkeypatch.setattr(tuning, "device_name", lambda index: f"made_up_{index}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("BBB_AO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BBB_AO_TUNING", raising=False)
    tuning._tables.cache_clear()
    yield calls
    tuning._tables.cache_clear()


def test_a_shape_is_measured_once_and_kept_for_the_next_process(measured: list[int], tmp_path: Path) -> None:
    for _ in range(2):
        assert tuning.settings_for("decode 64x128", CANDIDATES, print, 0) == (1, 8)
    assert measured == [3]
    tuning._tables.cache_clear()  # as a process that starts anew
    assert tuning.settings_for("decode 64x128", CANDIDATES, print, 0) == (1, 8)
    assert measured == [3]
    assert json.loads((tmp_path / "cache" / "made_up_0.json").read_text()) == {"decode 64x128": [1, 8]}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["made_up_0.json"]


def test_another_gpu_is_measured_anew(measured: list[int]) -> None:
    tuning.settings_for("decode 64x128", CANDIDATES, print, 0)
    tuning.settings_for("decode 64x128", CANDIDATES, print, 1)
    assert measured == [3, 3]


def test_shipped_settings_are_not_measured(
    measured: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "made_up_0.json").write_text('{"decode 64x128": [2, 4]}')
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    assert tuning.settings_for("decode 64x128", CANDIDATES, print, 0) == (2, 4)
    assert measured == []


def test_a_cache_of_an_older_kernel_hides_no_shipped_settings(
    measured: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "made_up_0.json").write_text('{"decode 64x128": [2, 4]}')
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "made_up_0.json").write_text('{"decode 64x128": [1, 8, 1], "decode 32x128": [1, 8, 1]}')
    assert tuning.settings_for("decode 64x128", CANDIDATES, print, 0) == (2, 4)
    assert measured == []
    # One that is not shipped is measured again, and replaced.
    assert tuning.settings_for("decode 32x128", CANDIDATES, print, 0) == (1, 8)
    assert measured == [3]
    assert json.loads((tmp_path / "cache" / "made_up_0.json").read_text())["decode 32x128"] == [1, 8]


def test_nothing_is_measured_while_a_graph_is_captured(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.settings_for("decode 64x128", CANDIDATES, print, 0) == (1, 4)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # What was taken unmeasured was not kept.
    assert tuning.settings_for("decode 64x128", CANDIDATES, print, 0) == (1, 8)


def test_tuning_can_be_switched_off(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBB_AO_TUNING", "off")
    assert tuning.settings_for("decode 64x128", CANDIDATES, print, 0) == (1, 4)
    assert measured == []


def test_a_cache_that_cannot_be_written_costs_only_the_measurement(
    measured: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("BBB_AO_CACHE", str(tmp_path / "file"))
    assert tuning.settings_for("decode 64x128", CANDIDATES, print, 0) == (1, 8)
