import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedrt.errors import StorageError
from silo.vault import Vault

arrays = hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64]), hnp.array_shapes(max_dims=3, max_side=4))
tensors = st.dictionaries(st.sampled_from(["own", "local", "head"]), arrays, min_size=1)
OWN = {"own": np.arange(6, dtype=np.float32).reshape(2, 3)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes() for name in one
    )


def test_before_the_first_accepted_round_there_is_nothing(tmp_path: Path):
    assert Vault(tmp_path).load("e") == {}


@given(tensors)
def test_what_is_promoted_is_what_the_next_run_finds(tmp_path_factory: pytest.TempPathFactory, values: dict):
    directory = tmp_path_factory.mktemp("vault")
    Vault(directory).promote("e", values)
    assert same(Vault(directory).load("e"), values)
    Vault(directory).promote("e", values)  # again changes nothing
    assert same(Vault(directory).load("e"), values)
    assert len(list(directory.iterdir())) == 1


def test_promoting_nothing_keeps_what_is_there(tmp_path: Path):
    vault = Vault(tmp_path)
    vault.promote("e", OWN)
    vault.promote("e", {})
    assert same(vault.load("e"), OWN)


def test_experiments_are_kept_apart_however_alike_their_names(tmp_path: Path):
    vault = Vault(tmp_path)
    alike = ["e", "e-1", "E", "x" * 63, "x" * 64, "x" * 65]
    for index, name in enumerate(alike):
        vault.promote(name, {"own": np.full(1, index, np.float32)})
    assert [float(vault.load(name)["own"][0]) for name in alike] == list(range(len(alike)))


def test_the_files_are_ours_alone(tmp_path: Path):
    Vault(tmp_path / "vault").promote("e", OWN)
    (file,) = (tmp_path / "vault").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "vault").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: b"", lambda content: b"x" * 99])
def test_damaged_private_tensors_are_named_and_not_taken_for_none(tmp_path: Path, damage):
    vault = Vault(tmp_path)
    vault.promote("e", OWN)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StorageError, match="are damaged; restore them from a backup") as found:
        vault.load("e")
    assert str(file) in str(found.value)


PROMOTER = """
import sys
from pathlib import Path
import numpy as np
from silo.vault import Vault

vault, number = Vault(Path(sys.argv[1])), 0
while True:
    vault.promote("e", {"own": np.full(100_000, number, np.float32)})
    print(number, flush=True)
    number += 1
"""


def test_a_kill_in_the_middle_of_a_promotion_leaves_the_old_tensors_or_the_new_ones(tmp_path: Path):
    for attempt in range(3):
        directory = tmp_path / f"vault-{attempt}"
        child = subprocess.Popen([sys.executable, "-c", PROMOTER, directory], stdout=subprocess.PIPE, text=True)
        last = [child.stdout.readline() for _ in range(4)][-1]
        time.sleep(0.0007 * attempt)  # somewhere within a write
        child.send_signal(signal.SIGKILL)
        child.wait()
        last = int((child.stdout.read().split() or [last])[-1])
        child.stdout.close()
        own = Vault(directory).load("e")["own"]
        assert own[0] in (last, last + 1)
        assert (own == own[0]).all()
