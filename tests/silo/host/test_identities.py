"""Every virtual silo needs its own certificate, and whoever lacks some is told how to get them."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from certs.throwaway import Plan, prepare
from fedrt.errors import ExitCode, IdentityError
from silo.host.identities import check_identities

NOW = datetime.now(UTC)


def places(directory: Path, *names: str) -> dict[str, Path]:
    return {name: directory / "silos" / name for name in names}


def made(directory: Path, *names: str, federation: str = "test") -> Path:
    prepare(directory, Plan(federation, names), NOW)
    return directory


def test_identities_are_those_of_their_directories(tmp_path: Path) -> None:
    found = check_identities(places(made(tmp_path, "a", "b"), "a", "b"), None, NOW)
    assert [(one.federation, one.name) for one in found] == [("test", "a"), ("test", "b")]


def test_all_that_are_missing_are_told_in_one_message_with_the_command(tmp_path: Path) -> None:
    named = [f"silo-{number:02d}" for number in range(1, 13)]
    made(tmp_path, "silo-03", federation="clinics")
    with pytest.raises(IdentityError) as caught:
        check_identities(places(tmp_path, *named), None, NOW)
    assert caught.value.exit_code is ExitCode.IDENTITY_REFUSED
    said = str(caught.value)
    assert "lacks the certificates of 11 of 12 virtual silos: 'silo-01', 'silo-02', 'silo-04' and 8 more" in said
    command = (
        f"fedrt-certs dev --directory {tmp_path} --federation clinics --silo=silo-{{01..02}} --silo=silo-{{04..12}}"
    )
    assert f"{command};" in said


@pytest.mark.parametrize(
    ("named", "options"),
    [
        (["north"], "--silo=north"),
        (["photo-09", "photo-10", "sketch-01"], "--silo=photo-{09..10} --silo=sketch-01"),
        (["silo-99", "silo-100"], "--silo=silo-{99..100}"),
        (["a1", "a3", "b4", "7", "8"], "--silo=a1 --silo=a3 --silo=b4 --silo={7..8}"),
    ],
)
def test_names_that_count_on_are_written_as_a_brace_expansion(tmp_path: Path, named: list[str], options: str) -> None:
    with pytest.raises(IdentityError) as caught:
        check_identities(places(tmp_path, *named), "test", NOW)
    assert f"--federation test {options};" in str(caught.value)


def test_identities_elsewhere_are_not_promised_to_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        IdentityError, match=r"--directory DIRECTORY .*, then set identities to DIRECTORY/silos; otherwise"
    ):
        check_identities({"a": tmp_path / "keys" / "a"}, "test", NOW)


def test_a_silo_cannot_use_anothers_identity(tmp_path: Path) -> None:
    made(tmp_path, "a", "b")
    (tmp_path / "silos/b").rename(tmp_path / "silos/c")
    with pytest.raises(
        IdentityError, match=r"silos/c' is that of silo 'b', not of 'c'; each virtual silo needs its own"
    ):
        check_identities(places(tmp_path, "a", "c"), None, NOW)


def test_all_are_of_one_federation(tmp_path: Path) -> None:
    made(tmp_path / "one", "a")
    made(tmp_path / "two", "b", federation="other")
    mixed = places(tmp_path / "one", "a") | places(tmp_path / "two", "b")
    with pytest.raises(IdentityError, match="'other'"):
        check_identities(mixed, None, NOW)
    with pytest.raises(IdentityError, match="'test'"):
        check_identities(places(tmp_path / "one", "a"), "other", NOW)
