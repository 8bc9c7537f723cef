"""The command `fedrt-certs`: what it prints and how it ends."""

import json
import sys
from datetime import timedelta

import pytest

from certs import cli
from certs.inspection import KeyMatch, Period, as_text, inspect_file
from certs.requests import make_key, write_key
from fedrt.tls import utc_now


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedrt-certs", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capsys.readouterr()
        return int(end.value.code or 0), output.out, output.err

    return run


def test_dev_says_what_it_made_and_what_it_kept(run, tmp_path):
    code, out, _ = run("dev", "--directory", tmp_path, "--silo", "north", "--days", 2)
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["made coordinator 'main'", "made silo 'north'"]
    code, out, _ = run("dev", "--directory", tmp_path, "--operator", "alice", "--federation", "demo")
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "kept coordinator 'main'",
        "kept silo 'north'",
        "made operator 'alice'",
    ]
    code, out, _ = run("dev", "--directory", tmp_path, "--replace")
    assert [line.split()[0] for line in out.splitlines()] == ["made"] * 3


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (("--federation", "skin"), 78, "holds federation 'demo', not 'skin'"),
        (("--silo", "North"), 77, "name 'North' is not usable"),
        (("--address", "localhost:7443"), 78, "leave the port out"),
        (("--days", "0"), 78, "--days 0 is not possible"),
        (("--days", "nan"), 78, "--days nan is not possible"),
    ],
)
def test_mistakes_end_with_one_line_and_their_code(run, tmp_path, options, code, complaint):
    run("dev", "--directory", tmp_path)
    ended, out, err = run("dev", "--directory", tmp_path, *options)
    assert ended == code
    assert err.startswith("fedrt-certs: ")
    assert complaint in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in out + err


def test_a_directory_open_to_others_is_refused(run, tmp_path):
    tmp_path.chmod(0o777)
    code, _, err = run("dev", "--directory", tmp_path)
    assert code == 75
    assert "writable by others" in err


def test_inspect_prints_text_and_json(run, tmp_path):
    run("dev", "--directory", tmp_path, "--silo", "north")
    code, out, _ = run("inspect", tmp_path / "silos/north", tmp_path / "coordinator/certificate.pem")
    assert code == 0
    for line in (
        "owner      silo 'north' of federation 'demo'",
        "identity   spiffe://demo/coordinator/main",
        "addresses  localhost, 127.0.0.1",
        "issuer     CN=fedrt issuer,O=demo",
        "key        matches",
        "state      valid, 7.0 days left",
    ):
        assert line in out.splitlines()
    code, out, _ = run("inspect", "--json", tmp_path / "silos/north")
    leaf, issuer = json.loads(out)
    assert (leaf["identity"], leaf["key"], leaf["period"]) == ("spiffe://demo/silo/north", "matches", "valid")
    assert (issuer["identity"], issuer["owner"]) == (None, "fedrt issuer of federation 'demo'")
    assert "PRIVATE" not in out


def test_inspect_names_what_it_cannot_read(run, tmp_path):
    code, _, err = run("inspect", tmp_path / "absent.pem")
    assert (code, err.count("\n")) == (75, 1)
    (tmp_path / "text").write_text("hello")
    code, _, err = run("inspect", tmp_path / "text")
    assert code == 77
    assert "holds no readable PEM certificate" in err


def test_inspection_tells_period_and_key(run, tmp_path):
    run("dev", "--directory", tmp_path, "--silo", "north")
    place = tmp_path / "silos/north"

    def first(when=timedelta(0), name="certificate.pem"):
        return inspect_file(place / name, utc_now() + when)[0]

    assert first().period is Period.VALID
    assert first(timedelta(days=-1)).period is Period.NOT_YET_VALID
    assert first(timedelta(days=8)).period is Period.EXPIRED
    assert "expired, -1.0 days left" in as_text(first(timedelta(days=8)))
    assert first(name="trust.pem").key is KeyMatch.ABSENT
    write_key(place / "key.pem", make_key())
    assert first().key is KeyMatch.DIFFERS
    (place / "key.pem").write_bytes(b"x")
    assert first().key is KeyMatch.UNREADABLE
    (place / "key.pem").unlink()
    assert first().key is KeyMatch.ABSENT
