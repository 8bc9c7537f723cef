"""What a certificate file says, for people and scripts: whose it is, who issued it, its life, whether its key fits."""

import enum
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from fedrt.certificates import (
    addresses_of,
    describe_time,
    federation_of,
    identity_of,
    parse_certificates,
    parse_key,
    same_key,
)
from fedrt.errors import IdentityError
from fedrt.statefile import storage_error


class Period(enum.Enum):
    """Where now lies in a certificate's life."""

    NOT_YET_VALID = "not yet valid"
    VALID = "valid"
    EXPIRED = "expired"


class KeyMatch(enum.Enum):
    """Whether the private key beside a certificate belongs to it."""

    MATCHES = "matches"
    DIFFERS = "differs"
    UNREADABLE = "unreadable"
    ABSENT = "absent"


@dataclass(frozen=True)
class Report:
    """One certificate, as of one instant."""

    path: Path
    owner: str
    identity: str | None  # the URI; None for an authority
    addresses: tuple[str, ...]
    issuer: str
    not_before: datetime
    not_after: datetime
    days_left: float  # negative once expired
    period: Period
    key: KeyMatch
    sha256: str  # of the certificate, hexadecimal


def inspect_file(path: Path, now: datetime) -> tuple[Report, ...]:
    """Return a report for each certificate in a PEM file, or in `certificate.pem` of a directory.

    A key counts for the first certificate of a file only. Raises IdentityError if the file holds no certificate,
    StorageError if it cannot be read.
    """
    if path.is_dir():
        path = path / "certificate.pem"
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise storage_error("read", path, error) from error
    certificates = parse_certificates(pem, str(path))
    return tuple(
        _report(path, certificate, _match(path, certificate) if position == 0 else KeyMatch.ABSENT, now)
        for position, certificate in enumerate(certificates)
    )


def as_text(report: Report) -> str:
    """Return the report as aligned lines."""
    lines = [
        ("file", str(report.path)),
        ("owner", report.owner),
        ("identity", report.identity or "-"),
        ("addresses", ", ".join(report.addresses) or "-"),
        ("issuer", report.issuer),
        ("valid", f"{describe_time(report.not_before)} to {describe_time(report.not_after)}"),
        ("state", f"{report.period.value}, {report.days_left:.1f} days left"),
        ("key", report.key.value),
        ("sha256", report.sha256),
    ]
    return "\n".join(f"{title:<10} {text}" for title, text in lines)


def as_json(reports: tuple[Report, ...]) -> str:
    """Return the reports as a JSON array; instants in ISO 8601."""

    def plain(value: object) -> str:
        match value:
            case datetime():
                return value.isoformat()
            case enum.Enum():
                return str(value.value)
            case _:
                return str(value)

    return json.dumps([asdict(report) for report in reports], default=plain, indent=2)


def _report(path: Path, certificate: x509.Certificate, key: KeyMatch, now: datetime) -> Report:
    identity = None if _is_authority(certificate) else identity_of(certificate)
    owner = str(identity) if identity else f"{_common_name(certificate)} of federation {federation_of(certificate)!r}"
    return Report(
        path=path,
        owner=owner,
        identity=identity.uri if identity else None,
        addresses=addresses_of(certificate),
        issuer=certificate.issuer.rfc4514_string(),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        days_left=round((certificate.not_valid_after_utc - now).total_seconds() / 86_400, 2),
        period=_period(certificate, now),
        key=key,
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
    )


def _period(certificate: x509.Certificate, now: datetime) -> Period:
    if now < certificate.not_valid_before_utc:
        return Period.NOT_YET_VALID
    return Period.EXPIRED if now > certificate.not_valid_after_utc else Period.VALID


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else "authority"


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _match(path: Path, certificate: x509.Certificate) -> KeyMatch:
    if path.name != "certificate.pem":  # trust.pem lies beside a key that is not its own
        return KeyMatch.ABSENT
    key_path = path.with_name("key.pem")
    if not key_path.exists():
        return KeyMatch.ABSENT
    try:
        key = parse_key(key_path.read_bytes(), str(key_path))
    except (OSError, IdentityError):
        return KeyMatch.UNREADABLE
    return KeyMatch.MATCHES if same_key(key, certificate) else KeyMatch.DIFFERS
