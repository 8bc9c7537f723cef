"""Mutual TLS for gRPC from the three files of an identity: loading, checking, credentials, and failures in plain words.

Limits of grpcio (1.85), and what stands in for them:

* A client cannot see the server's certificate. That the server is a coordinator of our federation follows from three
  checks BoringSSL makes for us: it leads to our federation's root, allows serving (which the authority grants to
  coordinators only), and names the dialled address.
* The lowest TLS version cannot be set. Two fedrt sides always agree on TLS 1.3, whose downgrade protection a network
  attacker cannot get around; `peer_identity` refuses a peer that spoke anything older. To refuse it in the handshake
  already, start the process with GRPC_SSL_CIPHER_SUITES=ECDHE-RSA-AES256-GCM-SHA384: it leaves TLS 1.3 alone, and TLS
  1.2 has no cipher left that suits our P-256 certificates. Setting it after `import grpc` is too late.
* A client learns from the server's refusal of its certificate only "Socket closed": in TLS 1.3 the client has finished
  by then. `explain_handshake_failure` therefore looks at our own certificate.
"""

import logging
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc

from fedrt.certificates import Credential, Expectation, federation_of, parse_credential, parse_key, same_key
from fedrt.errors import IdentityError
from fedrt.identity import Identity, Role, identity_from_uris
from fedrt.statefile import storage_error

Clock = Callable[[], datetime]  # the present, in UTC

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IdentityFiles:
    """Where a member keeps its key, its certificate chain (own certificate first) and the roots it trusts."""

    directory: Path

    @property
    def key_path(self) -> Path:
        """The private key; never leaves the host."""
        return self.directory / "key.pem"

    @property
    def certificate_path(self) -> Path:
        """The certificate, then the issuer's."""
        return self.directory / "certificate.pem"

    @property
    def trust_path(self) -> Path:
        """The roots under which peers are believed."""
        return self.directory / "trust.pem"


@dataclass(frozen=True)
class IdentityPem:
    """The bytes of the three files."""

    key: bytes = field(repr=False)
    certificate: bytes
    trust: bytes


@dataclass(frozen=True)
class LoadedIdentity:
    """An identity whose files were found fit for use."""

    pem: IdentityPem
    credential: Credential

    @property
    def identity(self) -> Identity:
        """Who we are."""
        return self.credential.identity


def utc_now() -> datetime:
    """Return the present, in UTC."""
    return datetime.now(UTC)


def load_identity(files: IdentityFiles, now: datetime, expected: Expectation | None = None) -> LoadedIdentity:
    """Read and check the three files; raises IdentityError naming the file, what is wrong, and the next step.

    Checked are: presence, modes, key against certificate, role and federation as expected, validity at `now`, and that
    the chain leads to the roots.
    """
    pem = _read_pem(files)
    try:
        key = parse_key(pem.key, "key.pem")
        credential = parse_credential(pem.certificate, pem.trust)
        if not same_key(key, credential.leaf):
            raise IdentityError("'key.pem' does not belong to 'certificate.pem'; take both from the same enrollment")
        credential.check(now, expected or Expectation())
    except IdentityError as error:
        raise IdentityError(f"identity in '{files.directory}': {error}") from error
    return LoadedIdentity(pem, credential)


def server_credentials(
    files: IdentityFiles,
    federation: str | None = None,
    clock: Clock = utc_now,
    report: Callable[[str], None] = _log.warning,
) -> grpc.ServerCredentials:
    """Return credentials of a coordinator that admits only peers with a certificate under our roots.

    The files are read again before each handshake, so a renewed certificate or trust bundle is served without a
    restart. Files that are not fit for use, for example half-way through a renewal, are passed over and reported once.
    Raises IdentityError if the files are not fit for use at the start.
    """
    loaded = load_identity(files, clock(), Expectation(Role.COORDINATOR, federation))
    return grpc.dynamic_ssl_server_credentials(
        _server_configuration(loaded.pem),
        _Reload(files, loaded, clock, report),  # type: ignore[arg-type]  # the stubs forget that None means unchanged
        require_client_authentication=True,
    )


def channel_credentials(
    files: IdentityFiles, expected: Expectation | None = None, clock: Clock = utc_now
) -> grpc.ChannelCredentials:
    """Return credentials with which we dial a coordinator; raises IdentityError if the files are not fit for use.

    They keep the certificate of now: after a renewal make new credentials and a new channel.
    """
    pem = load_identity(files, clock(), expected).pem
    return grpc.ssl_channel_credentials(pem.trust, pem.key, pem.certificate)


def peer_identity(auth_context: Mapping[str, Sequence[bytes]]) -> Identity:
    """Return whom grpc verified at the other end, from `rpc.auth_context()`.

    Raises IdentityError if the peer showed no certificate, if that names no identity or several, or if the connection
    is older than TLS 1.3.
    """
    names = auth_context.get("x509_subject_alternative_name", ())
    if list(auth_context.get("transport_security_type", ())) != [b"ssl"]:
        raise IdentityError("the peer did not connect over TLS; use the identity issued by the federation")
    if any(version != b"TLSv1.3" for version in auth_context.get("ssl_tls_version", ())):
        raise IdentityError("the peer speaks a TLS version older than 1.3; update its software")
    return identity_from_uris([name.decode("utf-8", "backslashreplace") for name in names])


def explain_handshake_failure(files: IdentityFiles, details: str, now: datetime) -> str:
    """Turn the details of a client's UNAVAILABLE into what went wrong and what to do next; never raises."""
    lowered = details.lower()
    for symptoms, sentence in _CONNECTION_FAILURES + _COORDINATOR_REFUSALS:
        if any(symptom in lowered for symptom in symptoms):
            return sentence
    try:
        credential = load_identity(files, now).credential
    except IdentityError as error:
        return f"the coordinator would not talk to us: {error}"
    federation = ", ".join(repr(federation_of(root)) for root in credential.roots)
    if "certificate_verify_failed" in lowered:
        return (
            f"the coordinator's certificate is not from federation {federation}, whose root is in "
            f"'{files.trust_path}'; check the coordinator address, or take the trust.pem of its federation"
        )
    if any(symptom in lowered for symptom in _CLOSED):
        return (
            f"the coordinator closed the connection: it may not accept our certificate, for {credential.identity}, "
            "because it serves another federation or is shutting down; its log says which"
        )
    return f"the coordinator cannot be reached: {details}"


_CONNECTION_FAILURES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("connection refused",),
        "nothing listens at the coordinator's address (connection refused); check that the coordinator runs and that "
        "host and port are right",
    ),
    (
        ("errors resolving", "dns resolution failed", "name not found", "domain name not found"),
        "the name of the coordinator's host cannot be resolved; check its spelling and this host's DNS",
    ),
    (
        (
            "timed out",
            "timeout",
            "no route to host",
            "unreachable",
            "deadline exceeded",
            "tcp handshaker shutdown",  # gRPC's limit of an attempt has passed: before TCP,
            "endpoint closing",  # and during the handshake
        ),
        "the coordinator does not answer; check the network, and that a firewall lets us dial its port",
    ),
    (
        ("wrong_version_number",),
        "what listens at the coordinator's address does not speak TLS; check the port",
    ),
)
_COORDINATOR_REFUSALS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("hostname verification", "not in peer certificate"),
        "the coordinator's certificate does not name the address we dial; dial a name it lists, or have its operator "
        "issue it with this address",
    ),
    (
        ("certificate has expired",),
        "the coordinator's certificate has expired; its operator must renew it (if it has not, our clock is ahead)",
    ),
    (
        ("certificate is not yet valid",),
        "the coordinator's certificate is not valid yet; compare the clocks of both hosts",
    ),
    (
        ("unsupported certificate purpose",),
        "what listens at the coordinator's address is not a coordinator: its certificate does not allow serving; "
        "check the address, and tell the federation operator",
    ),
)
_CLOSED = ("socket closed", "connection reset", "handshake", "broken pipe")


class _Reload:
    """Called by grpc, on threads of its own, before each handshake; None leaves the configuration as it is."""

    def __init__(
        self, files: IdentityFiles, loaded: LoadedIdentity, clock: Clock, report: Callable[[str], None]
    ) -> None:
        self._files = files
        self._expected = Expectation(Role.COORDINATOR, loaded.identity.federation)
        self._clock = clock
        self._report = report
        self._served = loaded.pem
        self._complaint = ""

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            if _read_pem(self._files) == self._served:
                return None
            pem = load_identity(self._files, self._clock(), self._expected).pem
        except IdentityError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                self._report(f"keeping the certificate in use: {error}")
            return None
        self._served, self._complaint = pem, ""
        return _server_configuration(pem)


def _server_configuration(pem: IdentityPem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], pem.trust)


def _read_pem(files: IdentityFiles) -> IdentityPem:
    return IdentityPem(
        key=_read(files.key_path, forbidden=0o077),
        certificate=_read(files.certificate_path, forbidden=0o022),
        trust=_read(files.trust_path, forbidden=0o022),
    )


def _read(path: Path, forbidden: int) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & forbidden:
                secret = "read" if forbidden & 0o044 else "changed"
                raise IdentityError(f"'{path}' can be {secret} by others (mode {mode:04o}); run: chmod 600 '{path}'")
            return file.read()
    except FileNotFoundError:
        raise IdentityError(
            f"'{path}' is missing; obtain an identity from the federation operator, or correct the configured directory"
        ) from None
    except OSError as error:
        raise IdentityError(str(storage_error("read", path, error))) from error
