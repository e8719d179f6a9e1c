"""The profiling benchmark without a GPU: what it reads from Nsight Compute, and what it says where that fails."""

import json
import sys
from pathlib import Path

import profile_kernels
import pytest
from profile_kernels import METRICS, CountersRefused, parse, profile, profile_all

FIXED = ["ID", "Process ID", "Kernel Name", "Block Size", "Grid Size"]


def table(names: list[str]) -> str:
    """Two kernels as `--csv --page raw` writes them, between other lines; counter i is 1000.5 + i and 1001.5 + i."""
    lines = [[*FIXED, *names], ["", "", "", "", "", *("ns" if "duration" in name else "" for name in names)]]
    for kernel in (0, 1):
        values = (f"1,00{i + kernel}.5" if i < 9 else "n/a" for i in range(len(names)))
        lines.append([str(kernel), "7", f'gemm<a, "{kernel}">', "(128, 1, 1)", "(2, 3, 1)", *values])
    body = (",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines)
    return "\n".join(["==PROF== Connected to process 7", *body, "==PROF== Disconnected"]) + "\n"


@pytest.fixture
def fake_ncu(tmp_path: Path):
    """An `ncu` that runs a Python body with `metrics` and `log`, and returns its path."""

    def make(body: str) -> str:
        path = tmp_path / "ncu"
        head = f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
        head += "metrics = sys.argv[sys.argv.index('--metrics') + 1].split(',')\n"
        head += "log = Path(sys.argv[sys.argv.index('--log-file') + 1])\n"
        path.write_text(head + body)
        path.chmod(0o755)
        return str(path)

    return make


def test_one_row_a_kernel_in_microseconds_and_plain_numbers() -> None:
    rows = parse(table(list(METRICS.values())))
    assert [(row["launch"], row["kernel"]) for row in rows] == [(0, 'gemm<a, "0">'), (1, 'gemm<a, "1">')]
    assert rows[0]["microseconds"] == pytest.approx(1.0005)
    assert (rows[0]["dram_bytes_read"], rows[1]["dram_bytes_read"]) == (1001.5, 1002.5)
    assert rows[0]["stalled_wait"] is None
    assert set(METRICS) < set(rows[0])


@pytest.mark.parametrize("text", ["", "==PROF== Connected\n==WARNING== No kernels were profiled.\n", '"Kernel Name"\n'])
def test_output_without_kernels_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="got none"):
        parse(text)


def test_a_counter_that_ncu_does_not_know_is_null(fake_ncu) -> None:
    lost = ("launch__grid_size", "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio")
    regex = r"regex:^smsp__average_warps_issue_stalled_gmma_per_issue_active\\.(ratio|pct)$"
    body = f"""
unknown = [name for name in metrics if name in {lost}]
if unknown:
    log.write_text("==ERROR== Failed to find metric " + ("launch__grid_size" if len(unknown) == 2 else "{regex}"))
    sys.exit(1)
text = {table([name for name in METRICS.values() if name not in lost])!r}
log.write_text(text)
"""
    rows = profile(fake_ncu(body), ["target"])
    assert [row["grid_size"] for row in rows] == [None, None]
    assert rows[0]["microseconds"] == pytest.approx(1.0005)


@pytest.mark.parametrize(
    "reason", ["ERR_NVGPUCTRPERM - The user has no permission", "Failed to initialize the profiler: LibraryNotLoaded"]
)
def test_no_counters_are_one_line_and_no_file(reason: str, fake_ncu, tmp_path, capsys) -> None:
    ncu = fake_ncu(f"print('==PROF== Connected')\nprint('==ERROR== {reason}')\nprint('done')\nsys.exit(1)\n")
    with pytest.raises(CountersRefused, match=reason):
        profile(ncu, ["target"])
    output = tmp_path / "profile.json"
    assert profile_all(ncu, "8b", [("qkv", 128, "bf16")], 0, output) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not output.exists()


def test_a_failing_product_is_one_row(fake_ncu, tmp_path) -> None:
    output = tmp_path / "profile.json"
    ncu = fake_ncu("log.write_text('==ERROR== The application returned an error code (1).')\nsys.exit(1)\n")
    assert profile_all(ncu, "8b", [("qkv", 128, "bf16")], 0, output) == 1
    (row,) = json.loads(output.read_text())
    assert (row["shape"], row["m"], row["impl"], row["n"]) == ("qkv", 128, "bf16", 6144)
    assert "error code (1)" in row["error"]


def test_without_ncu_there_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(profile_kernels, "find_ncu", lambda: None)
    monkeypatch.setattr(sys, "argv", ["profile_kernels.py"])
    assert profile_kernels.main() == 5
    assert capsys.readouterr().err == (
        "profile_kernels: expected ncu on the PATH or in /usr/local/cuda*/bin, found none\n"
    )
