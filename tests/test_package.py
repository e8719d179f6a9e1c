"""The wheel, made from the source archive, holds all that the package needs, and works outside of the repository."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bbb_ao"
# What is not Python.
DATA = ("py.typed", "recipes/library/*.yaml", "demo/model/*", "kernels/packed_linear/tuned/*.json", "report/page.css")


def run(command: list[object], folder: Path, **variables: str) -> str:
    words = list(map(str, command))
    done = subprocess.run(words, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the source archive and of the wheel that is built from it; no network."""
    source = tmp_path_factory.mktemp("source")
    # A copy: the build leaves folders behind.
    shutil.copytree(PACKAGE, source / "bbb_ao", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source], source)
    return source / "dist"


@pytest.fixture(scope="module")
def site(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own, without its dependencies."""
    site = tmp_path_factory.mktemp("site")
    (wheel,) = archives.glob("*.whl")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", site]
    run([sys.executable, "-m", "pip", "install", *options, wheel], site)
    return site


def shipped() -> set[str]:
    """Paths of all modules and data files, relative to the package."""
    found = {path for pattern in ("**/*.py", *DATA) for path in PACKAGE.glob(pattern) if path.is_file()}
    return {path.relative_to(PACKAGE).as_posix() for path in found}


def test_data_files_exist() -> None:
    for pattern in DATA[:3]:
        assert list(PACKAGE.glob(pattern)), pattern


def test_wheel_holds_the_package_and_nothing_else(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.removeprefix("bbb_ao/") for name in names if name.startswith("bbb_ao/")} == shipped()
    assert all(re.match(r"bbb_ao(-[\w.]+\.dist-info)?/", name) for name in names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_source_archive_holds_the_package(archives: Path) -> None:
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    assert {f"bbb_ao/{name}" for name in shipped()} | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_installed_wheel_quantizes_saves_and_loads(site: Path, tmp_path: Path) -> None:
    code = (
        "import bbb_ao, torch\n"
        "from importlib.resources import files\n"
        "from transformers import AutoModelForCausalLM\n"
        "from bbb_ao import bitbybit_qat, quantize_, save_packed, set_bits\n"
        "model = AutoModelForCausalLM.from_pretrained(files('bbb_ao') / 'demo' / 'model', dtype=torch.float32)\n"
        "quantize_(model.model.layers, bitbybit_qat(bits=2))\n"
        "quantize_(model.model.layers, bitbybit_qat(bits=8, step='convert'))\n"
        "save_packed(model, None, 'packed', 4)\n"
        "again, ids = AutoModelForCausalLM.from_pretrained('packed'), torch.arange(16).unsqueeze(0)\n"
        "assert torch.equal(again(ids).logits, set_bits(model, 4)(ids).logits)\n"
        "print(bbb_ao.__file__)\n"
    )
    environment = {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    printed = run([sys.executable, "-c", code], tmp_path, **environment)
    assert Path(printed.split()[-1]) == site / "bbb_ao" / "__init__.py"


def test_installed_program_lists_the_recipes(site: Path, tmp_path: Path) -> None:
    printed = run([sys.executable, site / "bin" / "bbb-ao", "recipes"], tmp_path, PYTHONPATH=str(site))
    listed = {line.split()[0] for line in printed.splitlines()}
    assert listed == {path.stem for path in (PACKAGE / "recipes" / "library").glob("*.yaml")}


def test_installed_wheel_passes_tests_of_the_repository(site: Path, tmp_path: Path) -> None:
    tests = [ROOT / "tests" / "core" / "test_grid.py", ROOT / "tests" / "kernels" / "test_packing.py"]
    options = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    # From another folder, so that the repository's own package is not found.
    code = (
        "import pytest, sys\n"
        "status = pytest.main(sys.argv[1:])\n"
        "print(sys.modules['bbb_ao'].__file__)\n"
        "sys.exit(status)\n"
    )
    printed = run([sys.executable, "-c", code, *options, *tests], tmp_path, PYTHONPATH=str(site))
    assert Path(printed.split()[-1]) == site / "bbb_ao" / "__init__.py"
    assert re.search(r"\d+ passed", printed)
