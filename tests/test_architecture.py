"""What holds for the shape of the code as a whole; import-linter holds the layers (pyproject.toml)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedrt", "certs", "coordinator", "silo")
WITHOUT_TORCH = ("fedrt", "certs", "coordinator")
TORCH = ("torch", "open_clip", "torchvision")
PURE = (
    "coordinator/rounds.py",
    "coordinator/experiments.py",
    "coordinator/selection.py",
    "coordinator/results.py",
    "coordinator/validation.py",
    "fedrt/aggregation.py",
    "fedrt/payload.py",
    "fedrt/session",
    "fedrt/tensors.py",
    "silo/ledger.py",
    "silo/policy.py",
)
WORLD = {"asyncio", "grpc", "sqlalchemy", "time", "random", "logging", "socket"}
FORBIDDEN_WORDS = {"utils", "helpers", "common", "misc", "manager", "handler", "processor", "info", "base"}


def modules(*places):
    """Python files of packages or single files, without the generated ones."""
    found = [
        path for place in places for path in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
    ]
    return sorted(path for path in found if "v1" not in path.parts)


def imported(path):
    """The top-level names that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def named(path):
    return str(path.relative_to(ROOT))


LOADER = """
import importlib, pkgutil, sys
packages, unwanted = sys.argv[1].split(","), sys.argv[2].split(",")
count = 0
for name in packages:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            count += 1
            loaded = [name for name in unwanted if name in sys.modules]
            if loaded:
                sys.exit(f"{module.name} loads {loaded}")
print(count)
"""


def test_a_coordinator_host_loads_no_torch():
    command = [sys.executable, "-c", LOADER, ",".join(WITHOUT_TORCH), ",".join(TORCH)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(modules("coordinator", "certs"))


@pytest.mark.parametrize("path", modules(*PURE), ids=named)
def test_a_pure_module_knows_no_clock_chance_network_or_database(path):
    assert imported(path) & WORLD == set()


@pytest.mark.parametrize("path", modules(*PACKAGES), ids=named)
def test_a_module_name_says_what_it_is_for(path):
    assert set(path.relative_to(ROOT).with_suffix("").parts) & FORBIDDEN_WORDS == set()
    assert set(path.stem.split("_")) & FORBIDDEN_WORDS == set()
    assert not path.stem.endswith("_data")


@pytest.mark.parametrize("path", modules(*PACKAGES), ids=named)
def test_a_module_starts_with_a_sentence_that_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())), "the module has no docstring"


@pytest.mark.parametrize("path", modules(*PACKAGES), ids=named)
def test_nothing_is_pickled_evaluated_or_given_to_a_shell(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    unsafe = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "os.system"}
    assert {ast.unparse(function) for function in calls} & unsafe == set()
