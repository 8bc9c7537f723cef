"""Who may dial when, when the host is ready, and what becomes of silos that are refused."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from fedrt.errors import IdentityError, StorageError
from silo.host import crew
from silo.host.crew import Crew
from tests.silo.host.hosted import Told, names


@dataclass
class FakeLink:
    on_connected: Callable[[], None] = lambda: None
    on_disconnected: Callable[[str], None] = lambda why: None


@dataclass
class FakeSilo:
    """Dials when it runs; the test says what comes of it."""

    link: FakeLink = field(default_factory=FakeLink)
    dials: bool = False
    outcome: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def run(self, stopping: asyncio.Event) -> None:
        self.dials = True
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait({stop, self.outcome}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if self.outcome.done():
            self.outcome.result()


class Trial:
    def __init__(self, count: int) -> None:
        self.silos = {name: FakeSilo() for name in names(count)}
        self.told = Told()
        self.task = asyncio.create_task(Crew(self.silos, self.told, "here:1").run())  # type: ignore[arg-type]

    @property
    def dialling(self) -> int:
        return sum(silo.dials for silo in self.silos.values())

    def connect(self, *numbers: int) -> None:
        for number in numbers:
            self.silos[f"silo-{number:02d}"].link.on_connected()

    def lose(self, number: int, why: str) -> None:
        self.silos[f"silo-{number:02d}"].link.on_disconnected(why)

    def refuse(self, number: int, why: str = "revoked") -> None:
        self.silos[f"silo-{number:02d}"].outcome.set_exception(IdentityError(why))

    async def end(self) -> None:
        self.told.stopping.set()
        await asyncio.wait_for(self.task, 5)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "DIALLING", 2)
    monkeypatch.setattr(crew, "DIAL_LIMIT", 60.0)


async def test_a_few_dial_at_a_time(two_lines: None) -> None:
    trial = Trial(5)
    await settle()
    assert trial.dialling == 2
    trial.connect(2)
    await settle()
    assert trial.dialling == 3
    trial.connect(2)  # a session that opens again makes no room
    await settle()
    assert trial.dialling == 3
    trial.refuse(1)  # one that ends does
    await settle()
    assert trial.dialling == 4
    await trial.end()


async def test_one_that_hears_nothing_gives_way(two_lines: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "DIAL_LIMIT", 0.02)
    trial = Trial(5)
    async with asyncio.timeout(5):
        while trial.dialling < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await trial.end()
    assert not trial.told.is_ready.is_set()


async def test_it_is_ready_when_all_sessions_have_been_open() -> None:
    trial = Trial(3)
    await settle()
    trial.connect(1, 3, 1)
    assert trial.told.statuses == ["1 of 3 silos connected", "2 of 3 silos connected"]
    trial.connect(2, 2)
    assert trial.told.statuses[2:] == ["ready: 3 of 3 silos connected to here:1"]
    await trial.end()


async def test_the_status_says_which_session_is_lost_and_when_it_is_back() -> None:
    trial = Trial(2)
    await settle()
    trial.connect(1)
    trial.lose(1, "the coordinator does not answer")
    assert (
        trial.told.statuses[-1]
        == "0 of 2 silos connected; 'silo-01' has just been lost: the coordinator does not answer"
    )
    trial.lose(1, "still not")
    trial.connect(2)
    assert trial.told.statuses[2:] == ["ready: 1 of 2 silos connected to here:1"]
    trial.connect(1)
    assert trial.told.statuses[3:] == ["2 of 2 silos connected to here:1"]
    await trial.end()


async def test_a_refused_silo_keeps_the_others_neither_from_being_ready_nor_from_serving() -> None:
    trial = Trial(3)
    await settle()
    trial.connect(1, 2)
    trial.refuse(3)
    await settle()
    assert trial.told.statuses[-1] == "ready: 2 of 3 silos connected to here:1, 1 refused"
    trial.refuse(1)
    await settle()
    assert trial.told.statuses[-1] == "1 of 3 silos connected to here:1, 2 refused"
    assert not trial.task.done()
    await trial.end()


async def test_it_ends_when_all_are_refused_with_the_first_reason() -> None:
    trial = Trial(2)
    await settle()
    trial.refuse(2, "revoked by alice")
    await settle()
    trial.refuse(1, "something else")
    with pytest.raises(
        IdentityError, match="all 2 virtual silos were refused, the first one, 'silo-02': revoked by al"
    ):
        await asyncio.wait_for(trial.task, 5)
    assert not trial.told.is_ready.is_set()


async def test_whatever_else_ends_a_silo_ends_all() -> None:
    trial = Trial(2)
    await settle()
    trial.silos["silo-01"].outcome.set_exception(StorageError("the disk is gone"))
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(trial.task, 5)
    assert [str(error) for error in caught.value.exceptions] == ["the disk is gone"]


async def test_those_that_have_not_dialled_yet_do_not_hold_up_the_end(two_lines: None) -> None:
    trial = Trial(5)
    await settle()
    await trial.end()
    assert trial.dialling == 2
