"""Who is who: whoever shows the wrong certificate, or none, gets nowhere and is told why."""

import asyncio
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from certs.authority import Grant, issue
from certs.custody import load_issuer
from certs.requests import make_key, make_request, write_key
from certs.throwaway import Plan, prepare
from fedrt.errors import ExitCode, IdentityError
from fedrt.identity import Identity, Role
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import admin_service_pb2_grpc
from tests.fakes.federation import Federation, free_port, make_spec
from tests.fakes.proxy import Proxy
from tests.fakes.raw_silo import RawSilo, credentials
from tests.fakes.workers import FakeWorker
from tests.integration.conftest import Logs
from tests.integration.following import State, Watch, connected, gone


def expired_identity(federation: Federation, name: str, place: Path) -> Path:
    """A certificate of our own authority that ran out yesterday."""
    issuer = load_issuer(federation.directory / "certs" / "authority")
    identity, key = Identity("test", Role.SILO, name), make_key()
    then = datetime.now(UTC) - timedelta(days=2)
    certificate = issue(issuer, make_request(key, identity), Grant(identity, life=timedelta(days=1)), then)
    place.mkdir(mode=0o700, exist_ok=True)
    write_key(place / "key.pem", key)
    for file, content in (("certificate.pem", issuer.chain_pem(certificate)), ("trust.pem", issuer.trust_pem)):
        (place / file).write_bytes(content)
        (place / file).chmod(0o600)
    return place


def stranger(directory: Path, name: str = "north") -> Path:
    """The identity of a silo of another federation that calls itself the same."""
    prepare(directory / "stranger", Plan("test", (name,)), datetime.now(UTC))
    return directory / "stranger" / "silos" / name


async def assert_serves(federation: Federation) -> None:
    """The coordinator still does what it is for."""
    await federation.create("still-serving", make_spec(1, ("west",)))
    federation.start_silo("west", FakeWorker())
    assert (await federation.finish("still-serving"))[0].state == State.STATE_SUCCEEDED


async def test_01_without_a_certificate_nobody_gets_in(federation: Federation) -> None:
    federation.start_coordinator()
    trust = (federation.directory / "certs/coordinator/trust.pem").read_bytes()
    nameless = RawSilo(federation.port, federation.directory, grpc.ssl_channel_credentials(trust), is_welcome=False)
    async with federation.admin(), nameless as raw:
        code, _ = await raw.status()
    assert code is grpc.StatusCode.UNAVAILABLE
    await assert_serves(federation)


@pytest.mark.parametrize("kind", ["another federation", "expired"])
async def test_02_a_certificate_that_is_not_valid_here_does_not_pass_the_handshake(
    federation: Federation, kind: str
) -> None:
    federation.start_coordinator()
    ours = federation.directory / "certs/coordinator/trust.pem"
    if kind == "expired":
        shown = credentials(expired_identity(federation, "north", federation.directory / "old"))
    else:
        shown = credentials(stranger(federation.directory), trust=ours)
    async with federation.admin(), RawSilo(federation.port, federation.directory, shown, is_welcome=False) as raw:
        code, _ = await raw.status()
    assert code is grpc.StatusCode.UNAVAILABLE
    await assert_serves(federation)


@pytest.mark.parametrize("role", ["operators/alice", "coordinator"])
async def test_03_only_silos_open_sessions(federation: Federation, role: str) -> None:
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs" / role) as raw:
        code, details = await raw.status()
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert details.endswith("of federation 'test' may not call '/fedrt.v1.SessionService/OpenSession'")
    await assert_serves(federation)


async def test_04_only_operators_reach_the_admin_service_over_the_network(federation: Federation) -> None:
    port = free_port()
    yaml = federation.coordinator_yaml()
    yaml.write_text(yaml.read_text().replace("}'}", "").replace("listen: {", f"listen: {{admin: '127.0.0.1:{port}', "))
    text = yaml.read_text()
    assert f"admin: '127.0.0.1:{port}'" in text
    federation.coordinator_yaml = lambda extra="": yaml  # type: ignore[method-assign]
    federation.start_coordinator()

    async def list_with(identity: str) -> pb.ListExperimentsResponse:
        shown = credentials(federation.directory / "certs" / identity)
        async with grpc.aio.secure_channel(f"localhost:{port}", shown) as channel:
            stub = admin_service_pb2_grpc.AdminServiceStub(channel)
            return await stub.ListExperiments(pb.ListExperimentsRequest(), wait_for_ready=True, timeout=10)

    await federation.create("seen", make_spec(1, ("west",)))
    assert [found.experiment_id for found in (await list_with("operators/alice")).experiments] == ["seen"]
    for identity in ("silos/north", "coordinator"):
        with pytest.raises(grpc.aio.AioRpcError, match="may not call '/fedrt") as no:
            await list_with(identity)
        assert no.value.code() is grpc.StatusCode.PERMISSION_DENIED
    async with RawSilo(port, federation.directory / "certs/silos/north") as raw:  # sessions are not served here
        assert (await raw.status())[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_05_the_session_listener_does_not_serve_operators(federation: Federation) -> None:
    federation.start_coordinator()
    shown = credentials(federation.directory / "certs/operators/alice")
    async with federation.admin(), grpc.aio.secure_channel(f"localhost:{federation.port}", shown) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListExperiments(pb.ListExperimentsRequest())
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("identity", "complaint"),
    [
        ("operators/alice", "the role 'silo' is needed"),
        ("coordinator", "the role 'silo' is needed"),
        ("silos/nowhere", "is missing; obtain an identity from the federation operator"),
        ("expired", "certificate of silo 'north' expired"),
    ],
)
async def test_06_a_silo_with_an_unfit_identity_ends_at_once_and_says_why(
    federation: Federation, identity: str, complaint: str
) -> None:
    place = federation.directory / "certs" / identity
    if identity == "expired":
        expired_identity(federation, "north", place)
    worker = FakeWorker()
    silo = federation.start_silo("north", worker, identity=place)
    federation.running.pop("north")
    with pytest.raises(IdentityError, match=complaint) as refused:
        await asyncio.wait_for(silo.task, 10)
    assert refused.value.exit_code is ExitCode.IDENTITY_REFUSED
    assert worker.orders == []


async def test_07_a_silo_whose_configured_federation_is_another_ends(federation: Federation) -> None:
    silo = federation.start_silo("north", FakeWorker(), "federation: elsewhere\n")
    federation.running.pop("north")
    with pytest.raises(IdentityError, match="the configured federation is 'elsewhere'"):
        await asyncio.wait_for(silo.task, 10)


async def test_08_a_coordinator_with_an_unfit_identity_ends_before_it_listens(federation: Federation) -> None:
    shutil.rmtree(federation.directory / "certs/coordinator")
    shutil.copytree(federation.directory / "certs/silos/north", federation.directory / "certs/coordinator")
    coordinator = federation.start_coordinator()
    federation.running.pop("coordinator")
    with pytest.raises(IdentityError, match="the role 'coordinator' is needed"):
        await asyncio.wait_for(coordinator.task, 10)
    assert not (federation.directory / "coordinator").exists()


async def test_09_a_silo_of_another_federation_keeps_dialling_and_says_what_is_wrong(
    federation: Federation, logs: Logs
) -> None:
    federation.start_coordinator()
    async with federation.admin():
        pass
    silo = federation.start_silo("stranger", FakeWorker(), identity=stranger(federation.directory))
    async with asyncio.timeout(40):
        while len([entry for entry in logs if entry["event"] == "session lost"]) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not silo.task.done()
    lost = next(entry for entry in logs if entry["event"] == "session lost")
    assert lost["log_level"] == "warning"
    assert "the coordinator's certificate is not from federation 'test', whose root is in" in lost["reason"]
    assert "check the coordinator address, or take the trust.pem of its federation" in lost["reason"]
    await assert_serves(federation)


async def test_10_a_silo_whose_coordinator_is_down_keeps_dialling_and_works_once_it_is_up(
    federation: Federation, logs: Logs
) -> None:
    federation.start_silo("west", FakeWorker())
    async with asyncio.timeout(40):
        while len([entry for entry in logs if entry["event"] == "session lost"]) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    lost = next(entry for entry in logs if entry["event"] == "session lost")
    assert "nothing listens at the coordinator's address (connection refused)" in lost["reason"]
    federation.start_coordinator()
    await federation.create("patient", make_spec(1, ("west",)))
    assert (await federation.finish("patient"))[0].state == State.STATE_SUCCEEDED


async def test_11_a_certificate_that_expires_while_offline_ends_the_silo_at_the_next_dial(
    federation: Federation,
) -> None:
    federation.start_coordinator()
    async with Proxy(federation.port).started() as proxy:
        federation.dial_port = proxy.port
        silo = federation.start_silo("north", FakeWorker())
        watch = Watch(federation)
        await watch.until(connected("north"))
        federation.running.pop("north")
        expired_identity(federation, "north", federation.directory / "certs/silos/north")
        proxy.cut()
        await watch.until(gone("north"))
        with pytest.raises(IdentityError, match=r"certificate of silo 'north' expired.*ask the federation operator"):
            await asyncio.wait_for(silo.task, 10)


async def test_12_a_silo_refused_by_the_coordinator_ends(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.listeners.Authorization.__init__", _only_operators)
    federation.start_coordinator()
    silo = federation.start_silo("north", FakeWorker())
    federation.running.pop("north")
    with pytest.raises(IdentityError, match="refused this silo: silo 'north' of federation 'test' may not call") as e:
        await asyncio.wait_for(silo.task, 10)
    assert e.value.exit_code is ExitCode.IDENTITY_REFUSED


def _only_operators(self: object, federation: str) -> None:
    self._federation = federation
    self._callers = {"/fedrt.v1.": frozenset({Role.OPERATOR})}
