"""A whole federation on one disk, root and all members' keys together, for development, demonstrations and tests.

    <directory>/authority/...                                     as in `certs.custody`
    <directory>/coordinator/{key.pem,certificate.pem,trust.pem}
    <directory>/silos/<name>/...      <directory>/operators/<name>/...

Every run brings the directory to the wanted state: what is fit for use stays, what is missing, damaged or near its end
is made anew. So a run that was cut off is repaired by the next one. The root is never replaced unless asked.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import ISSUER_LIFE, Grant, Issuer, Root, create_issuer, create_root, issue
from certs.custody import load_issuer, load_root, save_issuer, save_root, withdraw
from certs.requests import make_key, make_request, write_key
from fedrt.certificates import Expectation, addresses_of, parse_key
from fedrt.errors import ConfigurationError, IdentityError, StorageError
from fedrt.identity import Identity, Role, check_federation, check_name
from fedrt.statefile import ensure_private_directory, storage_error, write_atomic
from fedrt.tls import IdentityFiles, LoadedIdentity, load_identity

COORDINATOR_NAME = "main"
_PLURAL = {Role.SILO: "silos", Role.OPERATOR: "operators"}
_RENEWED_BELOW = 1 / 3  # of its life left, a certificate is issued again


@dataclass(frozen=True)
class Plan:
    """The federation that is wanted. Raises IdentityError for an unusable name."""

    federation: str
    silos: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ("localhost", "127.0.0.1")
    life: timedelta = timedelta(days=7)

    def __post_init__(self) -> None:
        check_federation(self.federation)
        for name in (*self.silos, *self.operators):
            check_name(name)

    def members(self) -> Iterator[Identity]:
        """Give everyone who needs a certificate, the coordinator first, each once."""
        yield Identity(self.federation, Role.COORDINATOR, COORDINATOR_NAME)
        yield from (Identity(self.federation, Role.SILO, name) for name in dict.fromkeys(self.silos))
        yield from (Identity(self.federation, Role.OPERATOR, name) for name in dict.fromkeys(self.operators))


class Outcome(enum.Enum):
    """What became of a member's certificate."""

    MADE = "made"
    KEPT = "kept"


@dataclass(frozen=True)
class Member:
    """One member as it now lies on disk."""

    identity: Identity
    directory: Path
    not_after: datetime
    outcome: Outcome


def prepare(directory: Path, plan: Plan, now: datetime, anew: bool = False) -> tuple[Member, ...]:
    """Bring `directory` to the state of `plan`, also for members it already holds; with `anew` replace everything.

    Raises ConfigurationError if it belongs to another federation, IdentityError or StorageError if it cannot be used.
    """
    ensure_private_directory(directory)
    plan = _with_present_members(directory, plan)
    issuer = _ensure_authority(directory / "authority", plan, now, anew)
    members = []
    for identity in plan.members():
        place = member_directory(directory, identity)
        addresses = plan.addresses if identity.role is Role.COORDINATOR else ()
        grant = Grant(identity, addresses, plan.life)
        loaded = None if anew else _fit(place, issuer, grant, now)
        outcome = Outcome.KEPT if loaded else Outcome.MADE
        loaded = loaded or _make(place, issuer, grant, now, anew)
        members.append(Member(identity, place, loaded.credential.not_after, outcome))
    return tuple(members)


def member_directory(directory: Path, identity: Identity) -> Path:
    """Return where a member's three files lie."""
    if identity.role is Role.COORDINATOR:
        return directory / "coordinator"
    return directory / _PLURAL[identity.role] / identity.name


def _with_present_members(directory: Path, plan: Plan) -> Plan:
    present = {role: _entries(directory / plural) for role, plural in _PLURAL.items()}
    return replace(plan, silos=(*plan.silos, *present[Role.SILO]), operators=(*plan.operators, *present[Role.OPERATOR]))


def _entries(directory: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(entry.name for entry in directory.iterdir() if (entry / "key.pem").exists()))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise storage_error("list", directory, error) from error


def _ensure_authority(directory: Path, plan: Plan, now: datetime, anew: bool) -> Issuer:
    root = _load_own_root(directory, plan, anew)
    if anew:
        withdraw(directory)
    elif root is None and load_issuer(directory) is not None:
        raise StorageError(
            f"'{directory / 'root'}' holds no root, but its issuer is there; restore it or use --replace"
        )
    if root is None or anew:
        root = create_root(plan.federation, now)
        save_root(directory, root)
    issuer = None if anew else _load_fit_issuer(directory, root, now + plan.life)
    if issuer is None:
        issuer = create_issuer(root, now, max(ISSUER_LIFE, plan.life))
        save_issuer(directory, issuer)
    return issuer


def _load_own_root(directory: Path, plan: Plan, anew: bool) -> Root | None:
    try:
        root = load_root(directory)
    except IdentityError:
        if anew:
            return None
        raise
    if root is not None and root.federation != plan.federation:
        raise ConfigurationError(
            f"directory '{directory.parent}' holds federation {root.federation!r}, not {plan.federation!r}; "
            "choose another directory, or delete this one if it is no longer needed"
        )
    return root


def _load_fit_issuer(directory: Path, root: Root, needed_until: datetime) -> Issuer | None:
    """Return the issuer unless it is damaged, stands under another root, or ends before `needed_until`."""
    try:
        issuer = load_issuer(directory)
    except IdentityError:
        return None
    if issuer is None or issuer.root_certificate != root.certificate:
        return None
    return issuer if issuer.certificate.not_valid_after_utc >= needed_until else None


def _fit(place: Path, issuer: Issuer, grant: Grant, now: datetime) -> LoadedIdentity | None:
    """Return what lies in `place` if it is what the grant asks for, under this root, with enough life left."""
    try:
        loaded = load_identity(IdentityFiles(place), now, Expectation(grant.identity.role, grant.identity.federation))
    except IdentityError:
        return None
    leaf = loaded.credential.leaf
    life = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    fit = (
        loaded.identity == grant.identity
        and loaded.pem.trust == issuer.trust_pem
        and set(grant.addresses) <= set(addresses_of(leaf))
        and leaf.not_valid_after_utc - now >= life * _RENEWED_BELOW
    )
    return loaded if fit else None


def _make(place: Path, issuer: Issuer, grant: Grant, now: datetime, anew: bool) -> LoadedIdentity:
    """Issue and write; a usable key stays, so that a cut-off or a running daemon never sees a pair that differs."""
    ensure_private_directory(place.parent)
    ensure_private_directory(place)
    files = IdentityFiles(place)
    key = None if anew else _present_key(files.key_path)
    if key is None:
        key = make_key()
        write_key(files.key_path, key)
    certificate = issue(issuer, make_request(key, grant.identity), grant, now)
    write_atomic(files.trust_path, issuer.trust_pem)
    write_atomic(files.certificate_path, issuer.chain_pem(certificate))
    return load_identity(files, now, Expectation(grant.identity.role, grant.identity.federation))


def _present_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    try:
        if path.stat().st_mode & 0o077:  # others may have read it
            return None
        return parse_key(path.read_bytes(), str(path))
    except (OSError, IdentityError):
        return None
