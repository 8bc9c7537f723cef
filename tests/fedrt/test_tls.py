"""Mutual TLS with real handshakes: who gets in, who does not, and what the operator is told."""

import asyncio
import contextlib
import os
import socket
import ssl
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509

from certs.authority import Grant, Issuer, create_issuer, create_root, issue
from certs.requests import make_key, make_request, write_key
from fedrt.certificates import Expectation
from fedrt.errors import IdentityError
from fedrt.identity import Identity, Role
from fedrt.tls import (
    IdentityFiles,
    channel_credentials,
    explain_handshake_failure,
    load_identity,
    peer_identity,
    server_credentials,
    utc_now,
)

NOW = utc_now()
LONG_AGO = NOW - timedelta(days=30)
LATER = NOW + timedelta(days=2)


@dataclass(frozen=True)
class Federation:
    """An authority in memory that writes identities to disk."""

    issuer: Issuer
    directory: Path

    @classmethod
    def create(cls, name, directory, now=LONG_AGO):
        return cls(create_issuer(create_root(name, now), now), directory)

    def member(self, role, name, now=NOW, addresses=(), into=None):
        identity = Identity(self.issuer.federation, role, name)
        files = IdentityFiles(self.directory / (into or f"{identity.federation}-{name}"))
        files.directory.mkdir(exist_ok=True)
        key = make_key()
        certificate = issue(self.issuer, make_request(key, identity), Grant(identity, addresses), now)
        write_key(files.key_path, key)
        files.certificate_path.write_bytes(self.issuer.chain_pem(certificate))
        files.trust_path.write_bytes(self.issuer.trust_pem)
        return files

    def coordinator(self, now=NOW, addresses=("localhost", "127.0.0.1"), into=None):
        return self.member(Role.COORDINATOR, "main", now, addresses, into)

    def silo(self, name="north", now=NOW):
        return self.member(Role.SILO, name, now)


@pytest.fixture
def demo(tmp_path):
    return Federation.create("demo", tmp_path)


@pytest.fixture
def other(tmp_path):
    return Federation.create("other", tmp_path)


class WhoAmI(grpc.GenericRpcHandler):
    """Answers every call with the caller's identity."""

    def service(self, handler_call_details):
        async def answer(request, rpc):
            return peer_identity(rpc.auth_context()).uri.encode()

        return grpc.unary_unary_rpc_method_handler(answer)


@contextlib.asynccontextmanager
async def serving(credentials):
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((WhoAmI(),))
    port = (
        server.add_secure_port("127.0.0.1:0", credentials) if credentials else server.add_insecure_port("127.0.0.1:0")
    )
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def ask(target, credentials, options=()):
    async with grpc.aio.secure_channel(target, credentials, options=options) as channel:
        answer = await channel.unary_unary("/test/WhoAmI")(b"", timeout=10)
    return answer.decode()


async def refusal(target, credentials, options=()):
    """Return the details of the failure that a client sees."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(target, credentials, options)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return caught.value.details()


def credentials_as_of(files, moment):
    """Credentials that pass our own checks, as if the clock showed `moment`."""
    return channel_credentials(files, clock=lambda: moment)


def served_serial(port, files):
    """Shake hands once and return the serial number of the certificate that the server showed."""
    context = ssl.create_default_context(cafile=str(files.trust_path))
    context.load_cert_chain(files.certificate_path, files.key_path)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as connection,
        context.wrap_socket(connection, server_hostname="127.0.0.1") as session,
    ):
        return x509.load_der_x509_certificate(session.getpeercert(binary_form=True)).serial_number


def serial(files):
    return load_identity(files, NOW).credential.leaf.serial_number


# --- handshakes ---------------------------------------------------------------------------------------------------


async def test_the_right_certificate_is_accepted_and_names_its_owner(demo):
    async with serving(server_credentials(demo.coordinator(), federation="demo")) as port:
        assert await ask(f"127.0.0.1:{port}", channel_credentials(demo.silo())) == "spiffe://demo/silo/north"
        alice = demo.member(Role.OPERATOR, "alice")
        assert await ask(f"localhost:{port}", channel_credentials(alice)) == "spiffe://demo/operator/alice"


async def test_no_certificate_is_refused(demo):
    silo = demo.silo()
    async with serving(server_credentials(demo.coordinator())) as port:
        details = await refusal(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(silo.trust_path.read_bytes()))
    silo.certificate_path.unlink()
    message = explain_handshake_failure(silo, details, NOW)
    assert message.startswith("the coordinator would not talk to us: ")
    assert "certificate.pem' is missing; obtain an identity" in message


async def test_plaintext_is_refused(demo):
    async with (
        serving(server_credentials(demo.coordinator())) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/test/WhoAmI")(b"", timeout=10)


async def test_a_silo_of_another_federation_does_not_trust_the_coordinator(demo, other):
    stranger = other.silo()
    async with serving(server_credentials(demo.coordinator())) as port:
        details = await refusal(f"127.0.0.1:{port}", channel_credentials(stranger))
    message = explain_handshake_failure(stranger, details, NOW)
    assert "the coordinator's certificate is not from federation 'other'" in message
    assert str(stranger.trust_path) in message


async def test_a_certificate_of_another_federation_is_refused_by_the_coordinator(demo, other):
    stranger = other.silo()
    credentials = grpc.ssl_channel_credentials(
        demo.issuer.trust_pem, stranger.key_path.read_bytes(), stranger.certificate_path.read_bytes()
    )
    async with serving(server_credentials(demo.coordinator())) as port:
        details = await refusal(f"127.0.0.1:{port}", credentials)
    message = explain_handshake_failure(stranger, details, NOW)
    assert "may not accept our certificate, for silo 'north' of federation 'other'" in message


@pytest.mark.parametrize(
    ("issued", "complaint"),
    [
        (LONG_AGO, "certificate of silo 'north' expired "),
        (LATER, "certificate of silo 'north' is not valid before "),
    ],
)
async def test_a_certificate_out_of_its_time_is_refused(demo, issued, complaint):
    silo = demo.silo(now=issued)
    with pytest.raises(IdentityError, match=complaint):
        channel_credentials(silo)
    async with serving(server_credentials(demo.coordinator())) as port:
        details = await refusal(f"127.0.0.1:{port}", credentials_as_of(silo, issued + timedelta(hours=1)))
    message = explain_handshake_failure(silo, details, NOW)
    assert message.startswith("the coordinator would not talk to us: ")
    assert complaint in message


@pytest.mark.parametrize(("issued", "complaint"), [(LONG_AGO, "has expired"), (LATER, "is not valid yet")])
async def test_a_coordinator_certificate_out_of_its_time_is_refused(demo, issued, complaint):
    coordinator = demo.coordinator(now=issued)
    silo = demo.silo()
    async with serving(server_credentials(coordinator, clock=lambda: issued + timedelta(hours=1))) as port:
        details = await refusal(f"127.0.0.1:{port}", channel_credentials(silo))
    assert f"the coordinator's certificate {complaint}" in explain_handshake_failure(silo, details, NOW)


async def test_the_coordinator_must_have_the_dialled_name(demo):
    silo = demo.silo()
    async with serving(server_credentials(demo.coordinator(addresses=("fed.example.org",)))) as port:
        details = await refusal(f"127.0.0.1:{port}", channel_credentials(silo))
    assert "does not name the address we dial" in explain_handshake_failure(silo, details, NOW)


async def test_a_silo_cannot_pose_as_the_coordinator(demo):
    impostor, silo = demo.silo("impostor"), demo.silo()
    with pytest.raises(IdentityError, match=r"is for silo 'impostor' .* the role 'coordinator' is needed"):
        server_credentials(impostor)
    credentials = grpc.ssl_server_credentials(
        [(impostor.key_path.read_bytes(), impostor.certificate_path.read_bytes())], demo.issuer.trust_pem, True
    )
    async with serving(credentials) as port:
        details = await refusal(f"127.0.0.1:{port}", channel_credentials(silo))
    assert "is not a coordinator: its certificate does not allow serving" in explain_handshake_failure(
        silo, details, NOW
    )


async def test_failures_before_tls_are_told_apart(demo):
    silo = demo.silo()
    credentials = channel_credentials(silo)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening
        details = await refusal(f"127.0.0.1:{unused.getsockname()[1]}", credentials)
    assert explain_handshake_failure(silo, details, NOW).startswith("nothing listens at the coordinator's address")
    details = await refusal("no-such-host.invalid:7443", credentials)
    assert "cannot be resolved" in explain_handshake_failure(silo, details, NOW)
    async with serving(None) as port:
        details = await refusal(f"127.0.0.1:{port}", credentials)
    assert "does not speak TLS" in explain_handshake_failure(silo, details, NOW)
    assert explain_handshake_failure(silo, "gremlins", NOW) == "the coordinator cannot be reached: gremlins"
    assert "does not answer" in explain_handshake_failure(silo, "connect: Connection timed out (110)", NOW)


async def test_a_renewed_certificate_is_served_without_a_restart(demo):
    coordinator, silo = demo.coordinator(), demo.silo()
    async with serving(server_credentials(coordinator)) as port:
        first = serial(coordinator)
        assert await asyncio.to_thread(served_serial, port, silo) == first
        demo.coordinator()
        assert serial(coordinator) != first
        assert await asyncio.to_thread(served_serial, port, silo) == serial(coordinator)
        assert await ask(f"127.0.0.1:{port}", channel_credentials(silo)) == "spiffe://demo/silo/north"


async def test_unfit_files_do_not_replace_the_certificate_in_use(demo, other):
    coordinator, silo = demo.coordinator(), demo.silo()
    reports = []
    async with serving(server_credentials(coordinator, report=reports.append)) as port:
        first = serial(coordinator)
        write_key(coordinator.key_path, make_key())  # half a renewal
        for _ in range(2):
            assert await asyncio.to_thread(served_serial, port, silo) == first
        assert len(reports) == 1
        assert "keeping the certificate in use" in reports[0]
        assert "does not belong to 'certificate.pem'" in reports[0]
        other.coordinator(into=coordinator.directory)  # a whole identity, but of another federation
        assert await asyncio.to_thread(served_serial, port, silo) == first
        assert "the configured federation is 'demo'" in reports[1]
        demo.coordinator()
        assert await asyncio.to_thread(served_serial, port, silo) == serial(coordinator)


def test_tls_1_2_can_be_refused_in_the_handshake(demo):
    """The environment variable named in the module's docstring does what it says."""
    coordinator, silo = demo.coordinator(), demo.silo()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER_PROGRAM, str(coordinator.directory)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"GRPC_SSL_CIPHER_SUITES": "ECDHE-RSA-AES256-GCM-SHA384"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with server:
        port = int(server.stdout.readline())
        context = ssl.create_default_context(cafile=str(silo.trust_path))
        context.load_cert_chain(silo.certificate_path, silo.key_path)
        context.set_alpn_protocols(["h2"])
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
            pytest.raises((ssl.SSLError, ConnectionError)),
        ):
            context.wrap_socket(connection, server_hostname="127.0.0.1")
        assert served_serial(port, silo) == serial(coordinator)  # TLS 1.3
        server.stdin.close()


SERVER_PROGRAM = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import grpc
from fedrt.tls import IdentityFiles, server_credentials
server = grpc.server(ThreadPoolExecutor(1))
print(server.add_secure_port("127.0.0.1:0", server_credentials(IdentityFiles(Path(sys.argv[1])))), flush=True)
server.start()
sys.stdin.read()
server.stop(0)
"""


# --- the peer -----------------------------------------------------------------------------------------------------

PEER = {
    "transport_security_type": [b"ssl"],
    "ssl_tls_version": [b"TLSv1.3"],
    "x509_subject_alternative_name": [b"localhost", b"spiffe://demo/coordinator/main"],
}


def test_the_peer_is_whom_its_certificate_names():
    assert peer_identity(PEER) == Identity("demo", Role.COORDINATOR, "main")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"transport_security_type": [b"local"]}, "did not connect over TLS"),
        ({"transport_security_type": []}, "did not connect over TLS"),
        ({"ssl_tls_version": [b"TLSv1.2"]}, "older than 1.3"),
        ({"x509_subject_alternative_name": []}, "names no 'spiffe://' identity"),
        ({"x509_subject_alternative_name": [b"\xff", b"spiffe://demo/silo/\xff"]}, "is not usable"),
        ({"x509_subject_alternative_name": [b"spiffe://demo/silo/a", b"spiffe://demo/silo/b"]}, "names 2 identities"),
    ],
)
def test_a_peer_without_a_clear_identity_is_refused(change, complaint):
    with pytest.raises(IdentityError, match=complaint):
        peer_identity(PEER | change)


# --- the files ----------------------------------------------------------------------------------------------------


def test_fit_files_load(demo):
    loaded = load_identity(demo.silo(), NOW, Expectation(Role.SILO, "demo"))
    assert loaded.identity == Identity("demo", Role.SILO, "north")
    assert "PRIVATE KEY" not in repr(loaded)


@pytest.mark.parametrize("name", ["key.pem", "certificate.pem", "trust.pem"])
@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n"])
def test_a_missing_or_damaged_file_is_named(demo, name, content):
    silo = demo.silo()
    path = silo.directory / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(IdentityError) as caught:
        load_identity(silo, NOW)
    assert name in str(caught.value)
    assert str(silo.directory) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "mode", "complaint"),
    [
        ("key.pem", 0o640, "can be read by others"),
        ("key.pem", 0o604, "can be read by others"),
        ("certificate.pem", 0o664, "can be changed by others"),
        ("trust.pem", 0o646, "can be changed by others"),
    ],
)
def test_file_modes_are_checked(demo, name, mode, complaint):
    silo = demo.silo()
    (silo.directory / name).chmod(mode)
    with pytest.raises(IdentityError, match=rf"{name}' {complaint} \(mode {mode:04o}\); run: chmod 600"):
        load_identity(silo, NOW)


def test_a_key_of_another_certificate_is_refused(demo):
    silo = demo.silo()
    write_key(silo.key_path, make_key())
    with pytest.raises(IdentityError, match=r"'key.pem' does not belong to 'certificate.pem'"):
        load_identity(silo, NOW)


def test_role_and_federation_must_be_the_expected_ones(demo):
    silo = demo.silo()
    with pytest.raises(IdentityError, match=r"is for silo 'north' .*, but the role 'operator' is needed"):
        load_identity(silo, NOW, Expectation(Role.OPERATOR))
    with pytest.raises(IdentityError, match="but the configured federation is 'skin'"):
        load_identity(silo, NOW, Expectation(Role.SILO, "skin"))


def test_a_chain_to_another_root_is_refused(demo, other):
    silo = demo.silo()
    silo.trust_path.write_bytes(other.issuer.trust_pem)
    with pytest.raises(IdentityError, match=r"does not lead to the root of federation 'other' in 'trust.pem'"):
        load_identity(silo, NOW)
    silo.trust_path.write_bytes(other.issuer.trust_pem + demo.issuer.trust_pem)  # while a root is replaced
    assert load_identity(silo, NOW).identity.name == "north"


def test_an_expired_root_beside_the_new_one_does_no_harm_and_alone_is_named(demo, tmp_path):
    old = create_issuer(create_root("demo", LONG_AGO, life=timedelta(days=8)), LONG_AGO)
    silo = demo.silo()
    silo.trust_path.write_bytes(old.trust_pem + demo.issuer.trust_pem)
    assert load_identity(silo, NOW).identity.name == "north"
    silo.trust_path.write_bytes(old.trust_pem)
    with pytest.raises(IdentityError, match="authority certificate 'CN=fedrt root,O=demo' expired"):
        load_identity(silo, NOW)


def test_the_message_of_an_expired_certificate_is_complete(demo):
    silo = demo.silo(now=LONG_AGO)
    with pytest.raises(IdentityError) as caught:
        load_identity(silo, NOW)
    end = LONG_AGO + timedelta(days=7)
    assert str(caught.value) == (
        f"identity in '{silo.directory}': certificate of silo 'north' expired {end:%Y-%m-%d %H:%M} UTC; "
        "ask the federation operator for a new certificate"
    )
