"""Keys, born where they are used, and the requests that ask an authority to certify them."""

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedrt.errors import IdentityError
from fedrt.identity import Identity
from fedrt.statefile import write_atomic


def make_key() -> ec.EllipticCurvePrivateKey:
    """Return a fresh P-256 key, the only kind this federation uses."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the key as unencrypted PKCS #8."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write the key, readable by us only (0600); raises StorageError."""
    write_atomic(path, key_pem(key), mode=0o600)


def make_request(key: ec.EllipticCurvePrivateKey, identity: Identity) -> x509.CertificateSigningRequest:
    """Return a request for `identity`, signed with the key as proof that we hold it.

    The identity in it is a wish that helps whoever reads the request; the authority decides what it certifies.
    """
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]), critical=False)
        .sign(key, hashes.SHA256())
    )


def proven_key(request: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    """Return the public key of a request whose sender has shown to hold the private one; raises IdentityError."""
    try:
        valid, key = request.is_signature_valid, request.public_key()
    except (InvalidSignature, ValueError) as error:
        raise IdentityError(f"the certificate request is damaged ({error}); make a new one") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("the certificate request is not for a P-256 key; make it with this version of fedrt")
    if not valid:
        raise IdentityError("the certificate request is not signed by the key it asks for; make a new one")
    return key
