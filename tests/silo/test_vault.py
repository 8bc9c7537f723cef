import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedrt.errors import DamageError, StorageError
from silo.tensor_files import read_tensors, write_tensors
from silo.vault import KEPT_ROUNDS, Vault

arrays = hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64]), hnp.array_shapes(max_dims=3, max_side=4))
tensors = st.dictionaries(st.sampled_from(["own", "local", "head"]), arrays, min_size=1)
OWN = {"own": np.arange(6, dtype=np.float32).reshape(2, 3)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes() for name in one
    )


def number(value: float) -> dict:
    return {"own": np.full(3, value, np.float32)}


def held(vault: Vault, before_round: int = sys.maxsize) -> float:
    """The number that was promoted, or 0."""
    found = vault.load("e", before_round)
    return float(found["own"][0]) if found else 0.0


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_before_the_first_accepted_round_there_is_nothing(tmp_path: Path):
    assert Vault(tmp_path).load("e", 1) == {}


@given(tensors)
def test_what_is_promoted_is_what_the_next_run_finds(tmp_path_factory: pytest.TempPathFactory, values: dict):
    directory = tmp_path_factory.mktemp("vault")
    Vault(directory).promote("e", 1, values)
    assert same(Vault(directory).load("e", 2), values)
    (file,) = files(directory)
    before = file.read_bytes()
    Vault(directory).promote("e", 1, values)  # again changes nothing
    assert same(Vault(directory).load("e", 2), values)
    assert [path.read_bytes() for path in files(directory)] == [before]


def test_promoting_nothing_keeps_what_is_there(tmp_path: Path):
    vault = Vault(tmp_path)
    vault.promote("e", 1, OWN)
    vault.promote("e", 2, {})
    assert same(vault.load("e", 3), OWN)


def test_work_begins_from_the_latest_accepted_round_before_it(tmp_path: Path):
    vault = Vault(tmp_path)
    for round_number in (2, 3, 7):
        vault.promote("e", round_number, number(round_number))
    assert [held(vault, before) for before in range(1, 10)] == [0, 0, 2, 3, 3, 3, 3, 7, 7]


def test_an_earlier_round_that_is_accepted_again_replaces_its_own_and_all_later_ones(tmp_path: Path):
    """A coordinator restored from a backup repeats rounds; those of before are as if they had never been."""
    vault = Vault(tmp_path)
    for round_number in range(1, 6):
        vault.promote("e", round_number, number(round_number))
    assert held(vault, before_round=3) == 2  # what round 3 begins from, although 5 were accepted
    vault.promote("e", 3, number(30))
    assert [held(vault, before) for before in (2, 3, 4, 5, 6)] == [1, 2, 30, 30, 30]
    vault.promote("e", 2, number(2))  # the same tensors as before: what followed them still counts no more
    assert [held(vault, before) for before in (2, 3, 4)] == [1, 2, 2]


def test_the_latest_rounds_are_kept_and_what_is_not_kept_is_not_taken_for_nothing(tmp_path: Path):
    vault = Vault(tmp_path)
    for round_number in range(1, KEPT_ROUNDS + 1):
        vault.promote("e", round_number, number(round_number))
    assert held(vault, before_round=1) == 0  # all are here: before the first there was nothing
    vault.promote("e", KEPT_ROUNDS + 1, number(KEPT_ROUNDS + 1))
    assert len(files(tmp_path)) == KEPT_ROUNDS
    assert held(vault, before_round=3) == 2
    for before_round in (1, 2):
        with pytest.raises(DamageError, match=rf"'e' before round {before_round} are no longer kept in .*of round 2"):
            vault.load("e", before_round)
    vault.promote("e", 2, number(20))  # the oldest again: it does not become the first
    assert len(files(tmp_path)) == 1
    with pytest.raises(DamageError, match="no longer kept"):
        vault.load("e", 2)


def test_the_oldest_round_promoted_again_over_damage_does_not_become_the_first(tmp_path: Path):
    vault = Vault(tmp_path)
    for round_number in range(1, KEPT_ROUNDS + 2):
        vault.promote("e", round_number, number(round_number))
    files(tmp_path)[0].write_bytes(b"")
    vault.promote("e", 2, number(2))
    with pytest.raises(DamageError, match="no longer kept"):
        vault.load("e", 2)


def test_experiments_are_kept_apart_however_alike_their_names(tmp_path: Path):
    vault = Vault(tmp_path)
    alike = ["e", "e-1", "E", "x" * 63, "x" * 64, "x" * 65]
    for index, name in enumerate(alike):
        vault.promote(name, 1, {"own": np.full(1, index, np.float32)})
    assert [float(vault.load(name, 2)["own"][0]) for name in alike] == list(range(len(alike)))


def test_the_files_are_ours_alone(tmp_path: Path):
    Vault(tmp_path / "vault").promote("e", 1, OWN)
    (directory,) = (tmp_path / "vault").iterdir()
    (file,) = directory.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "vault").stat().st_mode & 0o777 == 0o700


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-5], lambda content: b"", lambda content: b"x" * 99, flipped]
)
def test_damaged_private_tensors_are_named_and_not_taken_for_none(tmp_path: Path, damage):
    vault = Vault(tmp_path)
    vault.promote("e", 1, OWN)
    vault.promote("e", 2, OWN)
    file = files(tmp_path)[1]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DamageError, match=r"is damaged .*; restore the file from a backup") as found:
        Vault(tmp_path).load("e", 3)
    assert str(file) in str(found.value)
    assert same(vault.load("e", 2), OWN)


def test_a_file_under_another_rounds_name_is_damage(tmp_path: Path):
    vault = Vault(tmp_path)
    vault.promote("e", 1, OWN)
    (file,) = files(tmp_path)
    file.rename(file.with_name("round-0000000004.safetensors"))
    with pytest.raises(DamageError, match="is of round 1"):
        vault.load("e", 5)


def test_a_directory_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path: Path, monkeypatch):
    vault = Vault(tmp_path)
    vault.promote("e", 1, OWN)

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match="permission denied"):
        vault.load("e", 2)


def test_what_a_killed_promotion_left_behind_is_cleared_away_at_the_next_start(tmp_path: Path):
    Vault(tmp_path).promote("e", 1, OWN)
    (file,) = files(tmp_path)
    leftover = file.with_name(f".{file.name}.0badcafe.new")
    leftover.write_bytes(b"half")
    Vault(tmp_path)
    assert files(tmp_path) == [file]


# ---- the files themselves


@given(st.dictionaries(st.sampled_from("abc"), arrays), st.dictionaries(st.text(max_size=5), st.integers()))
def test_tensors_and_their_record_come_back(tmp_path_factory: pytest.TempPathFactory, values: dict, about: dict):
    path = tmp_path_factory.mktemp("files") / "x"
    write_tensors(path, values, about)
    found, said = read_tensors(path)
    assert same(found, values)
    assert said == about
    content = path.read_bytes()
    write_tensors(path, dict(reversed(values.items())), about)
    assert path.read_bytes() == content  # the same content is the same bytes


def test_a_change_of_the_record_is_damage_too(tmp_path: Path):
    write_tensors(tmp_path / "x", OWN, {"round": 1})
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content.replace(b": 1", b": 2"))
    assert (tmp_path / "x").read_bytes() != content
    with pytest.raises(DamageError, match="does not fit its digest"):
        read_tensors(tmp_path / "x")
