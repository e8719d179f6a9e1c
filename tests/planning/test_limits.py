"""What cannot fit is refused, by name and with what to change."""

from pathlib import Path

import pytest
import torch

from bbb_ao.errors import ResourceError
from bbb_ao.planning import limits
from bbb_ao.planning.limits import Limits, check_limits, read_limits
from bbb_ao.planning.memory import Phase

FOUND = [
    Phase("norms", {"forward": 1}, {"model": 10}),
    Phase("stage 1 w2a16", {"step": 600, "optimizer": 300}, {"model": 100, "streams": 800}, disk=70),
]
ENOUGH = Limits(device=900, host=900, output=50, temporary=70)


def test_what_just_fits_passes(make_recipe) -> None:
    check_limits(make_recipe(), FOUND, ENOUGH)
    check_limits(make_recipe(), FOUND, Limits(None, None, None, None))


@pytest.mark.parametrize(
    ("field", "start", "fix"),
    [
        ("device", "stage 1 w2a16: GPU memory: expected 900 B free, got 899 B", "micro_batch"),
        ("host", "stage 1 w2a16: memory: expected 900 B free, got 899 B", "cache=disk"),
        ("temporary", "disk: expected 70 B free, got 69 B", "TMPDIR"),
    ],
)
def test_each_shortage_is_refused(field: str, start: str, fix: str, make_recipe) -> None:
    short = Limits(**{**vars(ENOUGH), field: getattr(ENOUGH, field) - 1})
    with pytest.raises(ResourceError) as error:
        check_limits(make_recipe(), FOUND, short)
    message, _, advice = str(error.value).partition("; fix: ")
    assert start in message
    assert fix in advice
    assert error.value.exit_code == 5


def test_advice_names_a_key_that_can_still_be_lowered(make_recipe) -> None:
    short = Limits(device=1, host=None, output=None, temporary=None)
    with pytest.raises(ResourceError, match="fix: lower sequence_length"):
        check_limits(make_recipe(micro_batch=1), FOUND, short)


def test_advice_is_given_only_where_it_suffices(make_recipe) -> None:
    for host, fix in ((100, "cache=disk"), (99, "use a machine with more memory")):
        with pytest.raises(ResourceError, match=f"stage 1 w2a16: memory: .*; fix: .*{fix}"):
            check_limits(make_recipe(), FOUND, Limits(None, host, None, None))


def test_container_limits_count(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    monkeypatch.setattr(limits, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(limits, "CGROUP", tmp_path)
    assert read_limits(torch.device("cpu"), None).host == 50 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    assert read_limits(torch.device("cpu"), None).host == 50 * 1024
    (tmp_path / "memory.max").write_text("10000\n")
    assert read_limits(torch.device("cpu"), None).host == 10000 - 3000 + 500


def test_disk_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    found = read_limits(torch.device("cpu"), tmp_path / "not" / "there")
    assert found.device is None
    assert found.output is not None
    assert found.output > 0
    assert not (tmp_path / "not").exists()
