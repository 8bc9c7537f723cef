"""The throw-away federation: repeatable, repairable, and careful with what is already there."""

import os
import stat
from datetime import UTC, datetime, timedelta

import pytest

from certs import throwaway
from certs.custody import load_issuer, load_root
from certs.requests import make_key, write_key
from certs.throwaway import Outcome, Plan, prepare
from fedrt.certificates import Expectation
from fedrt.errors import ConfigurationError, IdentityError, StorageError
from fedrt.identity import Role
from fedrt.tls import IdentityFiles, load_identity

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
PLAN = Plan("demo", silos=("north", "south"), operators=("alice",))


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def made(members):
    return {member.identity.name for member in members if member.outcome is Outcome.MADE}


def test_every_member_gets_three_fit_files(tmp_path):
    members = prepare(tmp_path / "f", PLAN, NOW)
    assert [str(member.directory.relative_to(tmp_path / "f")) for member in members] == [
        "coordinator",
        "silos/north",
        "silos/south",
        "operators/alice",
    ]
    for member in members:
        loaded = load_identity(IdentityFiles(member.directory), NOW, Expectation(member.identity.role, "demo"))
        assert loaded.identity == member.identity
        assert loaded.credential.not_after == member.not_after == NOW + timedelta(days=7)
        assert loaded.pem.certificate.count(b"BEGIN CERTIFICATE") == 2  # own, issuer
        assert loaded.pem.trust.count(b"BEGIN CERTIFICATE") == 1


def test_directories_and_keys_are_private(tmp_path):
    prepare(tmp_path / "f", PLAN, NOW)
    for path in (tmp_path / "f", *(tmp_path / "f").rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_running_again_keeps_everything_and_adds_what_is_new(tmp_path):
    prepare(tmp_path, PLAN, NOW)
    before = contents(tmp_path)
    assert made(prepare(tmp_path, PLAN, NOW + timedelta(hours=1))) == set()
    assert contents(tmp_path) == before
    more = prepare(tmp_path, Plan("demo", silos=("west",)), NOW)
    assert made(more) == {"west"}
    assert {member.identity.name for member in more} == {"main", "west", "north", "south", "alice"}
    assert before.items() <= contents(tmp_path).items()


def test_near_its_end_a_certificate_is_renewed_for_the_same_key(tmp_path):
    prepare(tmp_path, PLAN, NOW)
    key = (tmp_path / "silos/north/key.pem").read_bytes()
    assert made(prepare(tmp_path, PLAN, NOW + timedelta(days=4, hours=12))) == set()
    assert made(prepare(tmp_path, PLAN, NOW + timedelta(days=4, hours=18))) == {"main", "north", "south", "alice"}
    assert (tmp_path / "silos/north/key.pem").read_bytes() == key


def test_an_issuer_that_ends_too_soon_is_replaced_under_the_same_root(tmp_path):
    prepare(tmp_path, PLAN, NOW)
    root, issuer = load_root(tmp_path / "authority"), load_issuer(tmp_path / "authority")
    later = NOW + timedelta(days=360)
    members = prepare(tmp_path, PLAN, later)
    assert load_root(tmp_path / "authority").certificate == root.certificate
    assert load_issuer(tmp_path / "authority").certificate != issuer.certificate
    assert {member.not_after for member in members} == {later + timedelta(days=7)}


def test_a_new_address_makes_the_coordinator_certificate_anew_and_nothing_else(tmp_path):
    prepare(tmp_path, PLAN, NOW)
    assert made(prepare(tmp_path, Plan("demo", addresses=("localhost",)), NOW)) == set()
    assert made(prepare(tmp_path, Plan("demo", addresses=("localhost", "10.0.0.1")), NOW)) == {"main"}


@pytest.mark.parametrize("anew", [False, True])
def test_a_directory_of_another_federation_is_left_alone(tmp_path, anew):
    prepare(tmp_path, PLAN, NOW)
    before = contents(tmp_path)
    with pytest.raises(ConfigurationError, match=r"holds federation 'demo', not 'skin'; choose another directory"):
        prepare(tmp_path, Plan("skin", silos=("east",)), NOW, anew=anew)
    assert contents(tmp_path) == before


def test_anew_replaces_every_key_of_every_member(tmp_path):
    prepare(tmp_path, PLAN, NOW)
    before = contents(tmp_path)
    members = prepare(tmp_path, Plan("demo"), NOW, anew=True)
    after = contents(tmp_path)
    assert before.keys() == after.keys()
    assert all(before[path] != after[path] for path in before)
    assert made(members) == {"main", "north", "south", "alice"}


@pytest.mark.parametrize("damage", ["key.pem", "certificate.pem", "trust.pem"])
def test_damaged_material_is_made_anew(tmp_path, damage):
    prepare(tmp_path, PLAN, NOW)
    (tmp_path / "silos/north" / damage).write_bytes(b"garbage")
    assert made(prepare(tmp_path, PLAN, NOW)) == {"north"}
    load_identity(IdentityFiles(tmp_path / "silos/north"), NOW, Expectation(Role.SILO, "demo"))


def test_a_key_that_others_could_read_is_not_used_again(tmp_path):
    prepare(tmp_path, PLAN, NOW)
    path = tmp_path / "silos/north/key.pem"
    key = path.read_bytes()
    path.chmod(0o644)
    assert made(prepare(tmp_path, PLAN, NOW)) == {"north"}
    assert path.read_bytes() != key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("anew", [False, True])
def test_a_run_cut_off_at_any_write_is_repaired_by_the_next(tmp_path, monkeypatch, anew):
    if anew:
        prepare(tmp_path / "start", PLAN, NOW)
    write = throwaway.write_atomic
    writes = 5 + 4 * 3  # authority, members
    for cut in range(writes):
        directory = tmp_path / f"cut{cut}"
        if anew:
            prepare(directory, PLAN, NOW)
        with monkeypatch.context() as patched:
            left = iter(range(cut))

            def limited(path, data, mode=0o600, left=left):
                if next(left, None) is None:
                    raise StorageError("the disk is full")
                write(path, data, mode)

            for module in ("throwaway", "custody", "requests"):
                patched.setattr(f"certs.{module}.write_atomic", limited)
            with pytest.raises(StorageError):
                prepare(directory, PLAN, NOW, anew=anew)
        members = prepare(directory, PLAN, NOW)
        trust = {(member.directory / "trust.pem").read_bytes() for member in members}
        assert len(members) == 4
        assert trust == {load_issuer(directory / "authority").trust_pem}


def test_a_damaged_root_is_named_and_only_replaced_on_request(tmp_path):
    prepare(tmp_path, PLAN, NOW)
    write_key(tmp_path / "authority/root/key.pem", make_key())
    with pytest.raises(IdentityError, match=r"root/key.pem' does not belong to .*restore both from one backup"):
        prepare(tmp_path, PLAN, NOW)
    assert made(prepare(tmp_path, PLAN, NOW, anew=True)) == {"main", "north", "south", "alice"}


def test_a_lost_root_key_is_named(tmp_path):
    prepare(tmp_path, PLAN, NOW)
    os.remove(tmp_path / "authority/root/key.pem")
    with pytest.raises(StorageError, match=r"root/key.pem' is missing beside its certificate; restore it"):
        prepare(tmp_path, PLAN, NOW)


def test_the_issuer_needs_nothing_of_the_root_directory(tmp_path):
    prepare(tmp_path, PLAN, NOW)
    (tmp_path / "authority/root").rename(tmp_path / "taken-offline")
    assert load_issuer(tmp_path / "authority").federation == "demo"
    before = contents(tmp_path)
    with pytest.raises(StorageError, match="holds no root, but its issuer is there"):
        prepare(tmp_path, Plan("skin"), NOW)
    assert contents(tmp_path) == before


def test_unusable_names_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(IdentityError, match="name 'North' is not usable"):
        Plan("demo", silos=("North",))
    with pytest.raises(IdentityError, match="federation 'a b' is not usable"):
        Plan("a b")
