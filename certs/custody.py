"""How an authority lies on disk: two directories, so that the root can be taken offline as a whole.

    <directory>/root/{key.pem,certificate.pem}                  offline; needed only to certify an issuer
    <directory>/issuer/{key.pem,certificate.pem,trust.pem}      online; needs nothing of the root's directory

A certificate is written last and taken away before its key changes: where there is none, the authority was never
finished, nobody holds anything from it, and it may be made anew.
"""

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from certs.authority import Issuer, Root
from certs.requests import write_key
from fedrt.certificates import parse_certificates, parse_key, same_key
from fedrt.errors import IdentityError, StorageError
from fedrt.statefile import ensure_private_directory, storage_error, write_atomic


def load_root(directory: Path) -> Root | None:
    """Return the root kept in the authority's `directory`, None if none; raises IdentityError, StorageError."""
    certificate_path = directory / "root" / "certificate.pem"
    if (pem := _read(certificate_path)) is None:
        return None
    certificate = parse_certificates(pem, str(certificate_path))[0]
    key_path = directory / "root" / "key.pem"
    key = parse_key(_required(key_path), str(key_path))
    if not same_key(key, certificate):
        raise IdentityError(f"'{key_path}' does not belong to '{certificate_path}'; restore both from one backup")
    return Root(key, certificate)


def load_issuer(directory: Path) -> Issuer | None:
    """Return the issuer kept in the authority's `directory`, None if none; raises IdentityError, StorageError."""
    certificate_path = directory / "issuer" / "certificate.pem"
    if (pem := _read(certificate_path)) is None:
        return None
    certificate = parse_certificates(pem, str(certificate_path))[0]
    key_path, trust_path = directory / "issuer" / "key.pem", directory / "issuer" / "trust.pem"
    key = parse_key(_required(key_path), str(key_path))
    if not same_key(key, certificate):
        raise IdentityError(f"'{key_path}' does not belong to '{certificate_path}'; restore both from one backup")
    return Issuer(key, certificate, parse_certificates(_required(trust_path), str(trust_path))[0])


def save_root(directory: Path, root: Root) -> None:
    """Write the root's key (0600) and certificate; raises StorageError."""
    place = directory / "root"
    _open_place(directory, place)
    write_key(place / "key.pem", root.key)
    write_atomic(place / "certificate.pem", _pem(root.certificate))


def save_issuer(directory: Path, issuer: Issuer) -> None:
    """Write the issuer's key (0600), the root it stands under, and its certificate; raises StorageError."""
    place = directory / "issuer"
    _open_place(directory, place)
    write_key(place / "key.pem", issuer.key)
    write_atomic(place / "trust.pem", issuer.trust_pem)
    write_atomic(place / "certificate.pem", _pem(issuer.certificate))


def withdraw(directory: Path) -> None:
    """Take the certificates of issuer and root away, in this order; an issuer without its root means a lost root."""
    for part in ("issuer", "root"):
        _remove(directory / part / "certificate.pem")


def _open_place(directory: Path, place: Path) -> None:
    ensure_private_directory(directory)
    ensure_private_directory(place)
    _remove(place / "certificate.pem")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error("remove", path, error) from error


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("read", path, error) from error


def _required(path: Path) -> bytes:
    if (content := _read(path)) is None:
        raise StorageError(f"'{path}' is missing beside its certificate; restore it from a backup")
    return content


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
