"""The digest of a method's code changes with its source and what that imports, and with nothing else."""

from pathlib import Path

import lab_samples
import pytest
from lab_samples import evaluation, record

from fedrt.errors import SpecError
from fedrt.methods import BUILT_IN
from silo.lab.grid import Dealt
from silo.lab.method_code import _sources, method_digest
from silo.lab.perform import Prepared


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with a method in a package: its two halves, what they import, and what they do not."""
    root = tmp_path / "site" / "quaint_prompts"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "declared.py").write_text("from fedrt.methods.promptfl import PromptFL\n")
    (root / "local.py").write_text("import torch\nfrom silo.methods import promptfl\nfrom . import losses\n")
    (root / "losses.py").write_text("WEIGHT = 1\n")
    (root / "unrelated.py").write_text("ANSWER = 42\n")
    metadata = root.parent / "quaint_prompts-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: quaint-prompts\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[fedrt.methods]\nquaint = quaint_prompts.declared:Quaint\n"
        "[silo.methods]\nquaint = quaint_prompts.local:build\n"
    )
    monkeypatch.syspath_prepend(root.parent)
    return root


@pytest.mark.parametrize("file", ["declared.py", "local.py", "losses.py", "../quaint_prompts-1.0.dist-info/METADATA"])
def test_a_change_of_either_half_or_what_it_imports_or_the_version_is_seen(package: Path, file: str) -> None:
    before = method_digest("quaint")
    text = (package / file).read_text()
    (package / file).write_text(
        text.replace("Version: 1.0", "Version: 1.1") if "METADATA" in file else text + "A = 1\n"
    )
    assert method_digest("quaint") != before


def test_no_other_change_is(package: Path) -> None:
    before = method_digest("quaint")
    (package / "unrelated.py").write_text("ANSWER = 43\n")
    assert method_digest("quaint") == before


def test_a_file_that_cannot_be_read_is_named(package: Path) -> None:
    (package / "losses.py").write_text("def\n")
    with pytest.raises(SpecError, match=r"losses\.py', cannot be read.*; mend the file"):
        method_digest("quaint")


def test_the_sources_of_methods_that_build_upon_others(package: Path) -> None:
    fedprox = [module for module, _ in _sources(["fedrt.methods.fedprox", "silo.methods.fedprox"])]
    assert fedprox == [
        "fedrt.context",
        "fedrt.methods.fedprox",
        "fedrt.methods.promptfl",
        "silo.contexts",
        "silo.methods.coop",
        "silo.methods.fedprox",
        "silo.methods.promptfl",
    ]
    quaint = [module for module, _ in _sources(["quaint_prompts.declared", "quaint_prompts.local"])]
    assert {"quaint_prompts.losses", "fedrt.methods.promptfl", "silo.methods.promptfl"} < set(quaint)
    assert not {"torch", "quaint_prompts.unrelated"} & set(quaint)


def test_every_built_in_method_has_two_halves_and_a_digest_of_its_own() -> None:
    assert len({method_digest(name) for name in BUILT_IN}) == len(BUILT_IN)
    for method in BUILT_IN.values():
        half = method.__module__.rpartition(".")[2]
        assert f"silo.methods.{half}" in {module for module, _ in _sources([f"silo.methods.{half}"])}


@pytest.mark.parametrize(
    ("changed", "is_current"),
    [
        ({}, True),
        ({"method_digest": ""}, True),  # a record of before, which does not tell
        ({"method_digest": "of other code"}, False),
        ({"weights_sha256": "cd" * 32}, False),
        ({"partition_digest": "of other images"}, False),
    ],
)
def test_a_cell_is_current_only_with_the_same_images_weights_and_code(
    tmp_path: Path, changed: dict[str, str], is_current: bool
) -> None:
    _, (plan, *_) = lab_samples.read(tmp_path)
    cell = plan.cells[1]
    dealt = {plan.name: Dealt((), (), {}, f"{cell.setting} {cell.seed}")}
    prepared = Prepared({}, dealt, "ab" * 32, {"promptfl": "cd" * 32}, (plan,))
    measured = {"silo-01": {"accuracy": 0.5}, "silo-02": {"accuracy": 0.5}}
    assert prepared.is_current(plan, cell, record(cell, evaluation(4, measured), **changed)) == is_current


def test_a_cell_that_lacks_a_silo_is_not_current(tmp_path: Path) -> None:
    _, (plan, *_) = lab_samples.read(tmp_path)
    cell = plan.cells[1]
    dealt = {plan.name: Dealt((), (), {}, f"{cell.setting} {cell.seed}")}
    found = record(cell, evaluation(4, {"silo-01": {"accuracy": 0.5}}))
    assert not Prepared({}, dealt, "ab" * 32, {"promptfl": "cd" * 32}, (plan,)).is_current(plan, cell, found)
