"""No file of the package can turn data into code: no pickle, no eval, no unsafe YAML, no import by a name from data."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*(ROOT / "bbb_ao").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
PICKLED_FORMATS = {"torch.distributed.checkpoint"}  # its metadata is a pickle
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load",
    "torch.save",
    "torch.hub.load",
    "torch.jit.load",
    "numpy.load",
    "np.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "os.system",
    "pydoc.locate",
    "pkgutil.resolve_name",
    "runpy.run_path",
    "runpy.run_module",
}
SAFE_LOADERS = {"StrictLoader", "SafeLoader", "yaml.SafeLoader"}
# Names from a table in the same file, or from a literal of the caller in the same file.
IMPORTS_BY_TABLE = {("bbb_ao/__init__.py", "_HOMES[name]"), ("benchmarks/peers.py", "module")}


def findings(text: str, where: str = "") -> list[str]:
    """What the source must not contain, each as its own text."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLES or a.name in PICKLED_FORMATS]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            pickled = node.module.split(".")[0] in PICKLES or node.module in PICKLED_FORMATS
            found += sorted(names if pickled else names & (CALLS | PICKLED_FORMATS))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            dynamic = name.split(".")[-1] == "import_module" and not isinstance(node.args[0], ast.Constant)
            unsafe = name == "yaml.load" and keywords.get("Loader") not in SAFE_LOADERS
            if unsafe or name in BUILTINS | CALLS:
                found.append(name)
            if dynamic and (where, ast.unparse(node.args[0])) not in IMPORTS_BY_TABLE:
                found.append(ast.unparse(node))
            for keyword in ("trust_remote_code", "shell", "allow_pickle"):
                if keywords.get(keyword, "False") != "False":
                    found.append(f"{keyword}={keywords[keyword]}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_data_becomes_code(path: Path) -> None:
    assert findings(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import dill as d",
        "from pickle import loads",
        "from torch import load",
        "from torch.distributed.checkpoint import load",
        "import torch.distributed.checkpoint as dcp",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "eval(text)",
        "exec(text)",
        "compile(text, '', 'exec')",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "importlib.import_module(config['target'])",
        "import_module(name)",
        "__import__(name)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_scan_finds(text: str) -> None:
    assert findings(text)


@pytest.mark.parametrize(
    "text",
    ["model.eval()", "torch.compile(f)", "yaml.load(t, Loader=StrictLoader)", "importlib.import_module('torch')"],
)
def test_the_scan_passes(text: str) -> None:
    assert findings(text) == []
