"""The authority of a federation: an offline root certifies an online issuer, which certifies daemons and people.

    root (10 years, offline) --> issuer (1 year, online) --> coordinator, silos, operators (7 days)

Everyone trusts the root alone and shows the issuer beside the own certificate, so an issuer can be replaced without
touching a silo. Whoever asks brings a key and nothing else: name, rights, lifetime and addresses are the authority's
decision. Only coordinators may act as TLS servers; that is what keeps a silo from posing as one.

No clock and no files here; keys and serial numbers are drawn from the operating system.
"""

import ipaddress
import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.requests import make_key, proven_key
from fedrt.certificates import describe_time, federation_of
from fedrt.errors import ConfigurationError, IdentityError
from fedrt.identity import Identity, Role, check_federation

ROOT_LIFE = timedelta(days=3650)
ISSUER_LIFE = timedelta(days=365)
LEAF_LIFE = timedelta(days=7)
CLOCK_SKEW = timedelta(minutes=5)  # certificates begin this long before now, for hosts whose clock is behind

_HOST_NAME = re.compile(r"(?=.{1,253}\Z)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*\Z")


@dataclass(frozen=True)
class Root:
    """The key that a federation's trust hangs on; needed only to certify an issuer."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def federation(self) -> str:
        """The federation it is the root of."""
        return federation_of(self.certificate)


@dataclass(frozen=True)
class Issuer:
    """The key that certifies daemons and people, with the certificate of the root above it."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    root_certificate: x509.Certificate

    @property
    def federation(self) -> str:
        """The federation it issues for."""
        return federation_of(self.certificate)

    @property
    def trust_pem(self) -> bytes:
        """What members trust: the root."""
        return _pem(self.root_certificate)

    def chain_pem(self, leaf: x509.Certificate) -> bytes:
        """Return what a member shows: its certificate first, then the issuer's."""
        return _pem(leaf) + _pem(self.certificate)


@dataclass(frozen=True)
class Grant:
    """What the authority is willing to certify. Raises ConfigurationError if it makes no sense."""

    identity: Identity
    addresses: tuple[str, ...] = ()  # host names and IP addresses under which a coordinator is dialled
    life: timedelta = LEAF_LIFE

    def __post_init__(self) -> None:
        if self.life <= timedelta(0):
            raise ConfigurationError(f"a certificate cannot live {self.life}; choose a positive number of days")
        if self.identity.role is Role.COORDINATOR:
            if not self.addresses:
                raise ConfigurationError(f"{self.identity} needs an address that silos dial; name at least one")
        elif self.addresses:
            raise ConfigurationError(f"{self.identity} is never dialled; leave its addresses out")
        for address in self.addresses:
            _alternative_name(address)


def create_root(federation: str, now: datetime, life: timedelta = ROOT_LIFE) -> Root:
    """Return a new root of trust, self-signed; raises IdentityError for an unusable federation name."""
    key = make_key()
    name = _authority_name(check_federation(federation), "root")
    builder = _builder(name, name, key.public_key(), now, now + life)
    builder = _with_authority_rights(builder, path_length=1)
    builder = _with_key_identifiers(builder, key.public_key(), key.public_key())
    return Root(key, builder.sign(key, hashes.SHA256()))


def create_issuer(root: Root, now: datetime, life: timedelta = ISSUER_LIFE) -> Issuer:
    """Return a new issuer under `root`, which it does not outlive; raises IdentityError if the root has expired."""
    key = make_key()
    until = _limit(root.certificate, now, life)
    name = _authority_name(root.federation, "issuer")
    builder = _builder(name, root.certificate.subject, key.public_key(), now, until)
    builder = _with_authority_rights(builder, path_length=0)
    builder = _with_key_identifiers(builder, key.public_key(), root.key.public_key())
    return Issuer(key, builder.sign(root.key, hashes.SHA256()), root.certificate)


def issue(issuer: Issuer, request: x509.CertificateSigningRequest, grant: Grant, now: datetime) -> x509.Certificate:
    """Return a certificate for the request's key and the grant's identity; it does not outlive the issuer.

    Nothing but the public key is taken from the request. Raises IdentityError if the request does not prove that its
    sender holds the key, if the grant is for another federation, or if the issuer has expired.
    """
    identity = grant.identity
    if identity.federation != issuer.federation:
        raise IdentityError(f"the issuer of federation {issuer.federation!r} cannot certify {identity}")
    key = proven_key(request)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, identity.federation),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, identity.role.value),
            x509.NameAttribute(NameOID.COMMON_NAME, identity.name),
        ]
    )
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    names += [_alternative_name(address) for address in grant.addresses]
    until = _limit(issuer.certificate, now, grant.life)
    builder = _builder(subject, issuer.certificate.subject, key, now, until)
    builder = _with_member_rights(builder, identity.role).add_extension(x509.SubjectAlternativeName(names), False)
    builder = _with_key_identifiers(builder, key, issuer.key.public_key())
    return builder.sign(issuer.key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(until)
    )


def _with_authority_rights(builder: x509.CertificateBuilder, path_length: int) -> x509.CertificateBuilder:
    return builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True).add_extension(
        _key_usage(signs_certificates=True), critical=True
    )


def _with_member_rights(builder: x509.CertificateBuilder, role: Role) -> x509.CertificateBuilder:
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role is Role.COORDINATOR:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    )


def _with_key_identifiers(
    builder: x509.CertificateBuilder, own: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(own), critical=False).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_name(federation: str, part: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, f"fedrt {part}"),
        ]
    )


def _alternative_name(address: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        if _HOST_NAME.match(address) is None:
            raise ConfigurationError(
                f"address {address[:80]!r} is neither a lower-case host name nor an IP address; leave the port out"
            ) from None
        return x509.DNSName(address)


def _limit(above: x509.Certificate, now: datetime, life: timedelta) -> datetime:
    end = above.not_valid_after_utc
    if end <= now:
        name = above.subject.rfc4514_string()
        raise IdentityError(f"authority certificate '{name}' expired {describe_time(end)}; renew the authority first")
    return min(end, now + life)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
