"""What holds for the repository as a whole: what its files may name, and that what its documents name exists."""

import ast
import io
import os
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import fedrt

ROOT = Path(__file__).parent.parent
WITHOUT_TORCH = ("coordinator", "fedrt", "certs")
MAX_DECISION_LINES = 40
# Homes and checkouts of particular machines, and hosts that serve packages: they differ from place to place.
LOCAL = re.compile(
    r"(?<![\w.])/(?:root|home(?!/ada)|Users|work|mnt|workspace)/\w"
    r"|\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|download\.pytorch\.org|docker\.io|ghcr\.io|quay\.io)\b"
    r"|--(?:extra-)?index-url|--registry|PIP_INDEX_URL",
)


@lru_cache(maxsize=1)
def files() -> tuple[Path, ...]:
    """Every file that is committed or would be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return tuple(path for path in paths if path.is_file())


def documents() -> list[Path]:
    places = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(places)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def docstring_lines(source: str) -> set[int]:
    """The lines of the docstrings of a module, its classes and its functions."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def mentions(source: str, word: str) -> Iterator[int]:
    """The lines where code, and not a comment or a docstring, contains the word."""
    prose = docstring_lines(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if word in token.string.lower() and token.type != tokenize.COMMENT and token.start[0] not in prose:
            yield token.start[0]


def test_mentions_finds_code_only() -> None:
    source = '"""torch."""\nx = "torch"  # torch\nimport torch\n\n\ndef f():\n    """Torch."""\n    return 1  # torch\n'
    assert list(mentions(source, "torch")) == [2, 3]


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_torch_is_in_comments_and_docstrings_only(package: str) -> None:
    found = {
        f"{named(path)}:{line}"
        for path in sorted((ROOT / package).rglob("*.py*"))
        if path.suffix in (".py", ".pyi")
        for line in mentions(path.read_text("utf-8"), "torch")
    }
    assert found == set()


def test_no_file_names_a_particular_machine_or_package_host() -> None:
    found = []
    for path in files():
        if path == Path(__file__):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # weights and images
        found += [f"{named(path)}: {match[0]}" for match in LOCAL.finditer(text)]
    assert found == []


def test_the_newest_heading_of_the_changelog_is_the_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == fedrt.__version__


def test_every_make_target_that_a_document_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named_targets = set()
    for path in documents():
        code = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", path.read_text(), re.MULTILINE | re.DOTALL))
        named_targets |= set(re.findall(r"(?:^|`|\s)make (?:[A-Z]+=\S+ )*([a-z][a-z-]*)", code, re.MULTILINE))
    assert {"demo", "test"} <= named_targets
    assert named_targets <= targets


def anchors(text: str) -> set[str]:
    """The fragments that the headings of a document can be linked by."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", documents(), ids=named)
def test_every_relative_link_resolves(path: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, fragment = target.partition("#")
        linked = (path.parent / place).resolve() if place else path
        if not linked.exists() or (fragment and fragment not in anchors(linked.read_text())):
            broken.append(target)
    assert broken == []


def test_decisions_are_numbered_in_order_and_short() -> None:
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [path.name[:4] for path in decisions] == [f"{number:04}" for number in range(1, len(decisions) + 1)]
    for path in decisions:
        lines = path.read_text().splitlines()
        assert len(lines) <= MAX_DECISION_LINES, named(path)
        assert lines[0].startswith(f"# {path.name[:4]}. "), named(path)
        assert lines[2].startswith("Status: "), named(path)


@pytest.mark.parametrize("path", [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"], ids=named)
def test_shell_scripts_run_and_stop_at_the_first_error(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert os.access(path, os.X_OK)
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


def test_continuous_integration_runs_make_test() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
