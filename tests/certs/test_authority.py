"""The authority decides everything but the key: names, rights, lifetimes."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.authority import CLOCK_SKEW, Grant, create_issuer, create_root, issue
from certs.requests import key_pem, make_key, make_request, proven_key
from fedrt.certificates import Expectation, addresses_of, identity_of, parse_credential, parse_key
from fedrt.errors import ConfigurationError, IdentityError
from fedrt.identity import Identity, Role

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
NORTH = Identity("demo", Role.SILO, "north")
MAIN = Identity("demo", Role.COORDINATOR, "main")


@pytest.fixture(scope="module")
def issuer():
    return create_issuer(create_root("demo", NOW), NOW)


def certify(issuer, grant, now=NOW):
    return issue(issuer, make_request(make_key(), grant.identity), grant, now)


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind).value


def test_a_silo_certificate_lives_a_week_and_only_dials(issuer):
    certificate = certify(issuer, Grant(NORTH))
    assert identity_of(certificate) == NORTH
    assert certificate.not_valid_before_utc == NOW - CLOCK_SKEW == NOW - timedelta(minutes=5)
    assert certificate.not_valid_after_utc == NOW + timedelta(days=7)
    assert list(extension(certificate, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not extension(certificate, x509.BasicConstraints).ca
    assert not extension(certificate, x509.KeyUsage).key_cert_sign
    assert addresses_of(certificate) == ()


def test_a_coordinator_certificate_may_serve_under_its_addresses(issuer):
    certificate = certify(issuer, Grant(MAIN, ("fed.example.org", "10.0.0.1", "::1")))
    assert set(extension(certificate, x509.ExtendedKeyUsage)) == {
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.SERVER_AUTH,
    }
    assert addresses_of(certificate) == ("fed.example.org", "10.0.0.1", "::1")


@pytest.mark.parametrize("grant", [Grant(NORTH), Grant(MAIN, ("localhost",))])
def test_what_is_issued_leads_to_the_root(issuer, grant):
    credential = parse_credential(issuer.chain_pem(certify(issuer, grant)), issuer.trust_pem)
    credential.check(NOW, Expectation(grant.identity.role, "demo"))
    assert credential.leaf.issuer == issuer.certificate.subject
    assert credential.issuers == (issuer.certificate,)
    assert credential.roots == (issuer.root_certificate,)


def test_authorities_name_their_federation_and_sign_only(issuer):
    assert issuer.federation == "demo"
    for certificate, depth in ((issuer.root_certificate, 1), (issuer.certificate, 0)):
        assert extension(certificate, x509.BasicConstraints) == x509.BasicConstraints(ca=True, path_length=depth)
        assert extension(certificate, x509.KeyUsage).key_cert_sign
        assert not extension(certificate, x509.KeyUsage).digital_signature


def test_nothing_but_the_key_is_taken_from_a_request(issuer):
    key = make_key()
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(MAIN.uri), x509.DNSName("localhost")]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    certificate = issue(issuer, greedy, Grant(NORTH), NOW)
    assert certificate.public_key() == key.public_key()
    assert identity_of(certificate) == NORTH
    assert addresses_of(certificate) == ()
    assert not extension(certificate, x509.BasicConstraints).ca
    assert list(extension(certificate, x509.ExtendedKeyUsage)) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_certificate_does_not_outlive_its_issuer_nor_the_issuer_its_root():
    root = create_root("demo", NOW, life=timedelta(days=30))
    issuer = create_issuer(root, NOW)
    assert issuer.certificate.not_valid_after_utc == NOW + timedelta(days=30)
    late = NOW + timedelta(days=28)
    assert certify(issuer, Grant(NORTH), late).not_valid_after_utc == NOW + timedelta(days=30)
    for attempt in (lambda now: certify(issuer, Grant(NORTH), now), lambda now: create_issuer(root, now)):
        with pytest.raises(IdentityError, match="expired 2026-12-01 12:00 UTC; renew the authority first"):
            attempt(NOW + timedelta(days=31))


def test_an_issuer_certifies_for_its_own_federation_only(issuer):
    with pytest.raises(IdentityError, match=r"issuer of federation 'demo' cannot certify silo 'north' of .* 'other'"):
        certify(issuer, Grant(Identity("other", Role.SILO, "north")))


@pytest.mark.parametrize(
    ("identity", "addresses", "life", "complaint"),
    [
        (MAIN, (), timedelta(days=1), "needs an address"),
        (NORTH, ("localhost",), timedelta(days=1), "is never dialled"),
        (NORTH, (), timedelta(0), "cannot live"),
        (MAIN, ("localhost:7443",), timedelta(days=1), "address 'localhost:7443' is neither"),
        (MAIN, ("spiffe://demo/silo/north",), timedelta(days=1), "is neither a lower-case host name nor an IP"),
        (MAIN, ("",), timedelta(days=1), "address '' is neither"),
    ],
)
def test_a_senseless_grant_is_refused(identity, addresses, life, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        Grant(identity, addresses, life)


def test_a_request_must_prove_its_key():
    request = make_request(make_key(), NORTH)
    assert identity_of_request(request) == NORTH.uri
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    der[der.index(b"north")] ^= 1
    with pytest.raises(IdentityError, match="not signed by the key it asks for"):
        proven_key(x509.load_der_x509_csr(bytes(der)))


def identity_of_request(request):
    names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)[0]


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)], ids=["P-384", "RSA"]
)
def test_only_p256_keys_are_certified(key):
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    with pytest.raises(IdentityError, match="not for a P-256 key"):
        proven_key(request)


def test_a_key_survives_its_text_form():
    key = make_key()
    assert parse_key(key_pem(key), "key.pem").private_numbers() == key.private_numbers()
