"""The book builds without a warning or a network, and names what the code has."""

import dataclasses
import html
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from doc_examples import ROOT
from torch import nn
from typer.testing import CliRunner

from bbb_ao.cli.commands import app
from bbb_ao.errors import BitByBitError
from bbb_ao.huggingface import BitByBitConfig, quantization_config
from bbb_ao.quantize import bitbybit_qat, quantize_
from bbb_ao.recipes.loader import shipped_recipes
from bbb_ao.recipes.stages import GridSettings, Recipe, Split, Stage

DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def rows(name: str, title: str) -> set[str]:
    """What stands in `code` in the first column of the tables behind the line that holds `title`."""
    table = re.search(r"\n\n\|.*?\n\n", page(name).partition(title)[2] + "\n\n", re.DOTALL)
    assert table, f"{name}.md: no table behind {title}"
    cells = [line.split("|")[1] for line in table[0].strip().splitlines()[2:]]
    return {word for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("book")
    # A socket that is opened ends the build.
    code = (
        "import socket, sys\n"
        "def refuse(*arguments, **named): raise OSError('the build opened a connection')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "from sphinx.cmd.build import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "-q", "-W", "--keep-going", "-d", output / "cache", DOCS, output / "html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output / "html"


def test_pages_load_nothing_from_elsewhere(book: Path) -> None:
    pages = sorted(book.glob("*.html"))
    assert {path.stem for path in DOCS.glob("*.md")} <= {path.stem for path in pages}
    for path in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"([^\"]*)", path.read_text())
        assert loaded, f"{path.name}: no style"
        assert not [url for url in loaded if re.match(r"(?:https?:)?//", url)], path.name


def test_equations_are_set(book: Path) -> None:
    text = (book / "method.html").read_text()
    dollars = re.findall(r"\$\$.+?\$\$", page("method"), re.DOTALL)
    assert len(dollars) > 8
    assert text.count('<div class="math">') == len(dollars)


def test_every_key_and_recipe_is_listed(book: Path) -> None:
    text = (book / "recipes.html").read_text()
    for part in (Recipe, GridSettings, Split, Stage):
        for field in dataclasses.fields(part):
            assert f'<span class="pre">{field.name}</span></code>' in text, f"{part.__name__}.{field.name}"
    for name in shipped_recipes():
        assert f"<p>{name}</p>" in text, name


def test_every_command_and_option_is_listed(book: Path) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", "", (book / "commands.html").read_text()))
    for info in app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__
        assert f"bbb-ao {name}" in text
        shown = CliRunner().invoke(app, [name, "--help"]).output
        options = set(re.findall(r"^ +(--[a-z-]+)", shown, re.MULTILINE)) - {"--help"}
        assert name in ("doctor", "inspect", "recipes") or options
        for option in options:
            assert re.search(rf"^{option}\b", text, re.MULTILINE), f"{name} {option}"
    for option in ("--data FILE...", "--set KEY=VALUE...", "--recipe NAME|FILE", "--bits N...", "--equal-budget"):
        assert option in text, option
    for error in BitByBitError.__subclasses__():
        assert re.search(rf"^\| {error.exit_code} \|", page("commands"), re.MULTILINE), error


def test_fields_of_the_checkpoint_are_described() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_(model, bitbybit_qat(bits=2, split_ratio=0.5))
    quantize_(model, bitbybit_qat(bits=8, step="convert"))
    config = quantization_config(model)
    (shape,) = config.modules.values()
    assert shape.keys() - rows("checkpoint", "Fields of each entry of `modules`") == set()
    assert config.grid.keys() - rows("checkpoint", "Fields of `grid`") == set()
    assert vars(BitByBitConfig()).keys() == rows("checkpoint", "## `quantization_config`")
    tensors = {name.rpartition(".")[2] for name in model.state_dict()}
    assert {"plane_high", "ocs_index", "bias"} <= tensors
    described = {name.removeprefix("NAME.") for name in rows("checkpoint", "## Tensors of a packed layer")}
    assert tensors <= described


def test_layout_of_the_planes_is_the_documented_one() -> None:
    """The equation of the page, byte by byte, for a full block and a short one."""
    from bbb_ao.kernels import pack_planes

    columns = 128 + 96
    codes = torch.randint(0, 256, (3, columns), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    high, mid, low = pack_planes(codes)
    for plane, width, shift in ((high, 2, 6), (mid, 2, 4), (low, 4, 0)):
        per_byte, start, first = 8 // width, 0, 0
        for length in (128, 96):
            for i in range(length // per_byte):
                v, u = divmod(i, length // 4)
                for j in range(per_byte):
                    column = length // per_byte * j + length // 4 * v + u // 2 + length // 8 * (u % 2)
                    expected = (codes[:, start + column] >> shift) & (2**width - 1)
                    assert torch.equal((plane[:, first + i] >> (width * j)) & (2**width - 1), expected)
            start, first = start + length, first + length // per_byte


def test_environment_variables_are_described() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bbb_ao").rglob("*.py"))
    named = set(re.findall(r"\bBBB_AO_[A-Z_]+\b", source))
    assert named
    assert named <= rows("gpu", "A table is JSON")


def test_every_dependency_has_a_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    main = {re.split(r"[^\w-]", text)[0] for text in project["dependencies"]}
    extras = {re.split(r"[^\w-]", text)[0] for group in project["optional-dependencies"].values() for text in group}
    assert main == rows("dependencies", "One line for each")
    assert extras <= rows("dependencies", "Extras, none of which")


def test_changelog_names_the_version() -> None:
    import bbb_ao

    assert f"## [{bbb_ao.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
