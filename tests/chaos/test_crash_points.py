"""The table of crash points fits the product, and an armed point kills exactly there and then."""

import asyncio
import errno
import inspect
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator import inbox
from fedrt.session import frames
from silo import agent, ledger
from tests.chaos import crash_points, refusing_disk
from tests.chaos.crash_points import FROM_COORDINATOR, FROM_SILO, TABLE, Role, Wrapped, find, points
from tests.chaos.hooks import CONTROL, STATE, Hooks
from tests.chaos.processes import ROOT
from tests.chaos.schedule import TELLING

WRITER = """
import sys
from pathlib import Path
from fedrt.statefile import write_atomic
from tests.chaos import crash_points, refusing_disk
from tests.chaos.crash_points import Role
from tests.chaos.hooks import Hooks
hooks = Hooks.from_environment()
crash_points.install(Role.SILO, hooks)
refusing_disk.install(Role.SILO, hooks)
for number in range(3):
    write_atomic(Path(sys.argv[1]), bytes([number]) * 1000)
"""


@pytest.mark.parametrize("wrapped", [wrapped for role in Role for wrapped in TABLE[role]], ids=lambda one: one.place)
def test_every_place_is_in_the_product(wrapped: Wrapped) -> None:
    assert callable(find(wrapped.place)[2])


@pytest.mark.parametrize(
    "place",
    [
        *crash_points.TRANSPORT,
        *refusing_disk.WRITING,
        *refusing_disk.SILO_WRITING,
        refusing_disk.COORDINATOR_INTAKE,
        refusing_disk.CONNECT,
    ],
)
def test_every_other_place_is_in_the_product(place: str) -> None:
    assert callable(find(place)[2])


def test_a_place_that_is_gone_is_named() -> None:
    with pytest.raises(LookupError, match=r"the product has no 'silo\.spool:Spool\.gone' any more"):
        find("silo.spool:Spool.gone")


def test_the_kinds_are_those_of_the_product() -> None:
    every = {kind.__name__ for kind in frames.SiloFrame.__args__}
    assert set(FROM_SILO) == every
    assert set(FROM_COORDINATOR) == {kind.__name__ for kind in frames.CoordinatorFrame.__args__}
    kinds = {role: [kind for one in TABLE[role] for kind, _ in one.kinds] for role in Role}
    assert all(hasattr(inbox, kind) for kind in kinds[Role.COORDINATOR])
    assert all(hasattr(agent, kind) or hasattr(ledger, kind) for kind in kinds[Role.SILO])
    source = inspect.getsource(find(crash_points.TRANSPORT[0])[2])
    assert all(f"self.{name} " in source or f"self.{name}:" in source for name in ("_encode", "_decode", "_on_sent"))


def test_names_are_used_once_and_what_comes_first_exists() -> None:
    for role in Role:
        names = [point.name for point in points(role)]
        assert len(names) == len(set(names)) > 50
    known = {(point.role, point.name) for role in Role for point in points(role)}
    assert set(TELLING) <= known


def write(tmp_path: Path, armed: str = "", disk: str = "") -> tuple[int, str, bytes, str]:
    """Write a file three times in a process of its own; returns exit code, what was hit, the file and stderr."""
    control, state = tmp_path / "control", tmp_path / "state"
    for directory in (control, state):
        directory.mkdir(exist_ok=True)
    for name, text in (("armed", armed), ("disk", disk)):
        if text:
            (control / name).write_text(text)
    target, hit = state / "file", control / "hit"
    target.write_bytes(b"old")
    environment = os.environ | {CONTROL: str(control), STATE: str(state), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, hit.read_text() if hit.exists() else "", target.read_bytes(), done.stderr


def test_nothing_armed_nothing_happens(tmp_path: Path) -> None:
    assert write(tmp_path) == (0, "", bytes([2]) * 1000, "")


@pytest.mark.parametrize(
    ("point", "count", "left"),
    [
        ("statefile create before", 1, b"old"),
        ("statefile write middle", 2, bytes([0]) * 1000),
        ("statefile rename before", 3, bytes([1]) * 1000),
        ("statefile rename after", 3, bytes([2]) * 1000),
        ("statefile fsync directory before", 2, bytes([1]) * 1000),
    ],
)
def test_an_armed_point_kills_at_its_passage(tmp_path: Path, point: str, count: int, left: bytes) -> None:
    code, hit, content, _ = write(tmp_path, armed=f"{point} #{count} 0 token")
    assert (code, hit, content) == (-signal.SIGKILL, "token\n", left)
    assert not (tmp_path / "control" / "armed").exists()  # the next life is not killed again


def test_a_point_that_is_not_passed_often_enough_kills_nobody(tmp_path: Path) -> None:
    assert write(tmp_path, armed="statefile create before #4 0 token")[:2] == (0, "")


@pytest.mark.parametrize(("name", "words"), [("ENOSPC", "the disk is full"), ("EROFS", "the file system is read-only")])
def test_a_disk_that_refuses_is_what_the_product_knows(tmp_path: Path, name: str, words: str) -> None:
    code, _, content, stderr = write(tmp_path, disk=name)
    assert (code, content) == (1, b"old")
    assert words in stderr


def test_a_disk_can_refuse_from_a_point_on(tmp_path: Path) -> None:
    hooks = Hooks(tmp_path, tmp_path)
    (tmp_path / "disk").write_text("ENOSPC #spool put before")
    assert hooks.refusal is None
    hooks.passage("spool put after")
    assert hooks.refusal is None
    hooks.passage("spool put before")
    refusal = hooks.refusal
    assert refusal is not None
    assert refusal.errno == errno.ENOSPC
    (tmp_path / "disk").unlink()
    assert hooks.refusal is None
    (tmp_path / "disk").write_text("EROFS #spool put before")
    assert hooks.refusal is None  # each time from the next passage on


async def test_asynchronous_functions_have_points_too(tmp_path: Path) -> None:
    passed = []

    class Noting(Hooks):
        def passage(self, point: str) -> None:
            passed.append(point)

    async def work(self: object, message: object) -> int:
        await asyncio.sleep(0)
        passed.append("inside")
        return 5

    wrapped = Wrapped("message", "", kinds=(("str", crash_points.Occasion.WORK),))
    around = crash_points._around(work, wrapped, Noting(tmp_path, tmp_path))
    assert await around(None, "a message") == 5
    assert passed == ["message str before", "inside", "message str after"]


def test_the_database_has_points_and_refuses_like_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqlite3.dbapi2.connect", sqlite3.dbapi2.connect)  # put back at the end
    passed = []

    class Noting(Hooks):
        def passage(self, point: str) -> None:
            passed.append(point)

    refusing_disk._wrap_database(Noting(tmp_path, tmp_path))
    connection = sqlite3.dbapi2.connect(tmp_path / "file.db")
    connection.execute("CREATE TABLE one (value)")
    connection.commit()
    assert passed == []  # nothing was changed in a transaction
    connection.cursor().execute("INSERT INTO one VALUES (1)")
    (tmp_path / "disk").write_text("ENOSPC")
    with pytest.raises(sqlite3.OperationalError, match="database or disk is full"):
        connection.cursor().execute("INSERT INTO one VALUES (2)")
    with pytest.raises(sqlite3.OperationalError, match="database or disk is full"):
        connection.commit()
    connection.rollback()
    (tmp_path / "disk").write_text("EROFS")
    with pytest.raises(sqlite3.OperationalError, match="attempt to write a readonly database"):
        connection.cursor().execute("INSERT INTO one VALUES (3)")
    (tmp_path / "disk").unlink()
    connection.cursor().execute("INSERT INTO one VALUES (4)")
    connection.commit()
    assert connection.cursor().execute("SELECT value FROM one").fetchall() == [(4,)]
    assert passed == ["commit before", "commit before", "commit after"]
    connection.close()
