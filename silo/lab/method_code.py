"""Tells whether a method is still the one that a cell was run with: a digest of the source of both its halves.

It covers the module of each half and what these import of methods and of the code that methods share; of a method that
another package brings also that package's modules, and the name and version of its distribution. Nothing is imported:
a local half would bring torch with it.
"""

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from fedrt.errors import SpecError
from fedrt.methods import BUILT_IN
from silo.lab.grid import digest_of

SHARED = ("fedrt.context", "silo.contexts", "silo.transport")
PACKAGES = ("fedrt.methods.", "silo.methods.")
GROUPS = ("fedrt.methods", "silo.methods")


def method_digest(name: str) -> str:
    """The SHA-256 of a method's code as it is installed now. Raises `SpecError` if a file of it cannot be read."""
    if name in BUILT_IN:
        half = BUILT_IN[name].__module__.removeprefix("fedrt.methods.")
        return digest_of(_sources([f"{package}{half}" for package in PACKAGES]))
    points = [point for group in GROUPS for point in entry_points(group=group) if point.name == name]
    return digest_of([_sources([point.module for point in points]), sorted({_distribution(point) for point in points})])


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else ""


def _sources(modules: Sequence[str]) -> list[list[str]]:
    """[module, source] of these modules and of those that they import, in order; other packages are left out."""
    tops = {module.partition(".")[0] for module in modules} - {"fedrt", "silo"}
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        path = None if module in found else _file_of(module)
        if path is None:
            continue
        try:
            found[module] = path.read_text(encoding="utf-8")
            tree = ast.parse(found[module])
        except (OSError, ValueError, SyntaxError) as error:
            raise SpecError(f"the source of a method, '{path}', cannot be read: {error}; mend the file") from None
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        waiting += [one for one in _imported(tree, package) if _counts(one, tops)]
    return [[module, found[module]] for module in sorted(found)]


def _counts(module: str, tops: set[str]) -> bool:
    return module in SHARED or module.startswith(PACKAGES) or module.partition(".")[0] in tops


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """What the source may import, by full name; a name imported from a module may be a module, too, or may not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield start
            yield from (f"{start}.{alias.name}" for alias in node.names)


def _file_of(module: str) -> Path | None:
    """The file with the module's source, if there is one; only its first package is looked up, nothing is imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest and spec.origin is not None and spec.origin.endswith(".py"):
        return Path(spec.origin)
    for place in spec.submodule_search_locations or ():
        whole = Path(place, *rest)
        for path in (whole.parent / f"{whole.name}.py", whole / "__init__.py"):
            if rest and path.is_file():
                return path
    return None
