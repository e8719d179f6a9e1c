"""Every GPU test on an NVIDIA machine, then a memory checker over the tests marked `memcheck`.

    . benchmarks/gpu_setup.sh; python benchmarks/gpu_tests.py [FOLDER]

WORKERS in the environment is the number of processes, 12 by default. Writes gpu_tests.json (device, versions, commit,
counts, seconds) and gpu_tests.log into FOLDER, which is $OUT or benchmarks/results where it is not given.
compute-sanitizer does not run on every machine: where it cannot check a program that only touches the GPU, the summary
says so and why, and the tests alone decide the exit status.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from environment import environment, lacks_gpu

ROOT = Path(__file__).resolve().parent.parent
SUITES = ["tests/gpu", "tests/kernels", "tests/benchmarks/test_decode_attention.py"]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:benchmark", "-p", "no:cacheprovider", "-p", "failures", "-rfE"]
CHECKER = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "86"]
PROBE = [sys.executable, "-c", "import torch; print(torch.ones(3, device='cuda').sum().item())"]
TEST_SECONDS, CHECKER_SECONDS, PROBE_SECONDS = 400, 90, 30
STUCK_SECONDS = 100  # a test that takes longer has its stack printed
# Compiling kernels takes most of the time, and every worker compiles its own.
WORKERS = int(os.environ.get("WORKERS", "12"))
# Compiles without a GPU, each worker all kernels; CI runs it.
LEFT_OUT = ["--ignore", "tests/kernels/test_gpu_compile.py"]
# Tests choose settings of their own; tuning every small shape would compile each kernel many times.
UNTUNED = {"BBB_AO_TUNING": "off"}


def run(command: list[str], seconds: float, log: Path, **variables: str) -> tuple[int, str, float]:
    """(exit status, output, seconds); 124 where it ran out of time. The output is also added to `log`."""
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, status = process.communicate()[0], 124
    with log.open("a") as file:
        file.write(f"$ {' '.join(command).replace(sys.executable, 'python')}\n{output}\nexit status {status}\n\n")
    return status, output, round(time.monotonic() - start, 1)


def counts(output: str) -> dict[str, int]:
    """What pytest's last line says: passed, failed, skipped, ..."""
    found = re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed)", output)
    return {kind: int(number) for number, kind in found}


def check_memory(log: Path) -> dict[str, object]:
    """compute-sanitizer over the tests marked `memcheck`, or why it cannot run."""
    if shutil.which(CHECKER[0]) is None:
        return {"ran": False, "reason": "compute-sanitizer is not installed"}
    # Every allocation apart, so that a read past the end of one is seen.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output, _ = run([*CHECKER, *PROBE], PROBE_SECONDS, log, **apart)
    if status != 0 or "3.0" not in output:
        lines = [line for line in output.splitlines() if "rror" in line or "not supported" in line]
        return {"ran": False, "reason": lines[0].strip() if lines else f"the probe ended with status {status}"}
    command = [*CHECKER, *PYTEST, "-m", "memcheck", *LEFT_OUT, *SUITES]
    status, output, seconds = run(command, CHECKER_SECONDS, log, **apart, **UNTUNED)
    summary = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    errors = int(summary[-1]) if summary else None
    return {"ran": True, "status": status, "errors": errors, "seconds": seconds, **counts(output)}


def main() -> int:
    if lacks_gpu("gpu_tests"):
        return 5
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "gpu_tests.log"
    log.write_text("")
    options = ["-n", str(WORKERS), "--durations=20", *LEFT_OUT, "-o", f"faulthandler_timeout={STUCK_SECONDS}"]
    status, output, seconds = run([*PYTEST, *options, *SUITES], TEST_SECONDS, log, **UNTUNED)
    print(output[-6000:], flush=True)
    summary = {
        "tests": {"status": status, "seconds": seconds, **counts(output)},
        "memcheck": {"ran": False, "reason": "cut off"},
        **environment(0),
    }
    results = folder / "gpu_tests.json"
    # Before the checker, so that a run cut short leaves what it found.
    results.write_text(json.dumps(summary, indent=2) + "\n")
    memory = check_memory(log)
    text = json.dumps(summary | {"memcheck": memory}, indent=2)
    results.write_text(text + "\n")
    print(text)
    checked = not memory["ran"] or (memory["status"] == 0 and memory["errors"] == 0)
    return int(status != 0 or not checked)


if __name__ == "__main__":
    sys.exit(main())
