"""What a certificate says and whether it may be used now; decided from bytes and a time, without files or a clock."""

import ipaddress
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedrt.errors import IdentityError
from fedrt.identity import Identity, Role, identity_from_uris

ASK = "ask the federation operator for a new certificate"


@dataclass(frozen=True)
class Expectation:
    """Whom a certificate should belong to; None leaves a part open."""

    role: Role | None = None
    federation: str | None = None


@dataclass(frozen=True)
class Credential:
    """A member's certificate chain and the roots it trusts, parsed; the private key stays outside."""

    identity: Identity
    leaf: x509.Certificate
    issuers: tuple[x509.Certificate, ...]  # what the member shows beside its own, nearest first
    roots: tuple[x509.Certificate, ...]

    @property
    def not_after(self) -> datetime:
        """The instant from which the certificate is refused, in UTC."""
        return self.leaf.not_valid_after_utc

    def check(self, now: datetime, expected: Expectation) -> None:
        """Raise IdentityError unless the certificate may be used now, by whom it should be, under our roots."""
        if expected.role is not None and self.identity.role is not expected.role:
            raise IdentityError(
                f"the certificate is for {self.identity}, but the role {expected.role.value!r} is needed; "
                "check the configured identity directory"
            )
        if expected.federation is not None and self.identity.federation != expected.federation:
            raise IdentityError(
                f"the certificate is for {self.identity}, but the configured federation is {expected.federation!r}; "
                "correct the configuration or " + ASK
            )
        check_period(self.leaf, f"certificate of {self.identity.role.value} {self.identity.name!r}", now)
        _check_chain(self, now)


def parse_credential(certificate_pem: bytes, trust_pem: bytes) -> Credential:
    """Return the parsed chain (leaf first) and roots; raises IdentityError naming which of the two is wrong."""
    leaf, *issuers = parse_certificates(certificate_pem, "certificate.pem")
    roots = parse_certificates(trust_pem, "trust.pem")
    return Credential(identity_of(leaf), leaf, tuple(issuers), roots)


def parse_certificates(pem: bytes, source: str) -> tuple[x509.Certificate, ...]:
    """Return the certificates in a PEM text, at least one; raises IdentityError that calls the text `source`."""
    try:
        return tuple(x509.load_pem_x509_certificates(pem))
    except ValueError:
        raise IdentityError(f"'{source}' holds no readable PEM certificate; restore it or {ASK}") from None


def parse_key(pem: bytes, source: str) -> ec.EllipticCurvePrivateKey:
    """Return the unencrypted P-256 key in a PEM text; raises IdentityError that calls the text `source`."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
        raise IdentityError(f"'{source}' holds no readable unencrypted PEM key; restore it or {ASK}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(f"'{source}' is not a P-256 key; make a new one with fedrt and {ASK}")
    return key


def identity_of(certificate: x509.Certificate) -> Identity:
    """Return whom a certificate names in its alternative names; raises IdentityError."""
    return identity_from_uris(_alternative_names(certificate, x509.UniformResourceIdentifier))


def addresses_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the host names, then the IP addresses, under which a certificate may serve."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    numbers = [ipaddress.ip_address(str(number)) for number in names.get_values_for_type(x509.IPAddress)]
    return (*names.get_values_for_type(x509.DNSName), *(str(number) for number in numbers))


def federation_of(authority: x509.Certificate) -> str:
    """Return the federation that an authority's certificate (root or issuer) belongs to; raises IdentityError."""
    found = authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if len(found) != 1:
        raise IdentityError(f"authority certificate '{authority.subject.rfc4514_string()}' names no federation")
    return str(found[0].value)


def same_key(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bool:
    """Tell whether the certificate was issued for this key."""
    return key.public_key() == certificate.public_key()


def check_period(certificate: x509.Certificate, title: str, now: datetime) -> None:
    """Raise IdentityError if the certificate, called `title`, is not yet valid or has expired."""
    if now < certificate.not_valid_before_utc:
        start = describe_time(certificate.not_valid_before_utc)
        raise IdentityError(f"{title} is not valid before {start}, and it is {describe_time(now)}; set the clock right")
    if now > certificate.not_valid_after_utc:
        raise IdentityError(f"{title} expired {describe_time(certificate.not_valid_after_utc)}; {ASK}")


def describe_time(instant: datetime) -> str:
    """Return the instant as operators read it, for example '2026-11-01 12:00 UTC'; it must be in UTC."""
    return f"{instant:%Y-%m-%d %H:%M} UTC"


def _check_chain(credential: Credential, now: datetime) -> None:
    # While a root is being replaced, an expired one may lie beside the new one.
    roots = [root for root in credential.roots if root.not_valid_after_utc >= now] or [credential.roots[0]]
    for authority in (*credential.issuers, *roots):
        check_period(authority, f"authority certificate '{authority.subject.rfc4514_string()}'", now)
    # As a client: every role may dial, only a coordinator may serve, and that would need its address here.
    verifier = PolicyBuilder().store(Store(roots)).time(now).build_client_verifier()
    try:
        verifier.verify(credential.leaf, list(credential.issuers))
    except VerificationError as error:
        trusted = ", ".join(repr(federation_of(root)) for root in credential.roots)
        raise IdentityError(
            f"the certificate of {credential.identity} does not lead to the root of federation {trusted} in "
            f"'trust.pem' ({error}); take both files from the same federation"
        ) from None


def _alternative_names(certificate: x509.Certificate, kind: type[x509.UniformResourceIdentifier]) -> list[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return extension.value.get_values_for_type(kind)
