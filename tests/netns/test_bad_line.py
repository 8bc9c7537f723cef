"""Real daemons in two network namespaces, 100 ms apart, with 1 % loss and 10 Mbit/s: nothing changes a bit.

What happens is told by the coordinator's events, in their order; how long a thing takes is not asserted.
"""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedrt.v1 import admin_service_pb2 as pb
from tests.fakes.federation import Federation, make_spec
from tests.fakes.recording import digest
from tests.fakes.workers import FakeWorker
from tests.integration.following import EVALUATE, State, contributors
from tests.netns.bad_line import BadLine, until_dead

SILOS = ("north", "south")
LARGE = '{"context_count":64,"context_length":16}'  # 2 MiB
SMALL = '{"context_length":16}'  # 32 KiB
OUTAGE = 12.0  # seconds: more than two silence limits
PATIENCE = 200.0  # seconds until a test is given up


@pytest.fixture
def line(tmp_path: Path) -> Iterator[BadLine]:
    with BadLine(tmp_path).laid() as laid:
        yield laid


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path / "federation", SILOS)


@dataclass
class Story:
    """What the coordinator has told so far: one short word for each round, and who is connected."""

    federation: Federation
    words: list[str] = field(default_factory=list)
    present: set[str] = field(default_factory=set)
    number: int = 0

    async def until(self, holds: Callable[["Story"], bool]) -> None:
        """Follow the events until this holds."""
        if holds(self):
            return
        async with asyncio.timeout(PATIENCE):
            async for event in self.federation.events(after=self.number):
                self.number = event.event_number
                self._hear(event)
                if holds(self):
                    return

    def _hear(self, event: pb.Event) -> None:
        match event.WhichOneof("kind"):
            case "silo_changed":
                silo = event.silo_changed.silo
                (self.present.add if silo.connected else self.present.discard)(silo.silo_id)
            case "round_closed":
                closed = event.round_closed
                assert contributors(closed) == list(SILOS)
                kind = "evaluated" if closed.task_kind == EVALUATE else "trained"
                self.words.append(f"{kind} {closed.round_number}")


def everyone_here(story: Story) -> bool:
    return story.present == set(SILOS)


def nobody_here(story: Story) -> bool:
    return not story.present


def has_ended(story: Story) -> bool:
    return "evaluated 3" in story.words and everyone_here(story)


async def undisturbed(directory: Path, hyperparameters: str) -> str:
    """The digest of the same experiment on loopback, in this process."""
    near = Federation(directory, SILOS)
    async with near.started({name: FakeWorker() for name in SILOS}):
        await near.create("near", make_spec(3, SILOS, hyperparameters=hyperparameters))
        experiment, _ = await near.finish("near", PATIENCE)
        assert experiment.state == State.STATE_SUCCEEDED
        return digest(await near.export("near"))


async def begun(line: BadLine, federation: Federation, hyperparameters: str) -> Story:
    """An experiment of three rounds across the line, the second of which has begun."""
    line.start_federation(federation)
    story = Story(federation)
    await story.until(everyone_here)
    await federation.create("far", make_spec(3, SILOS, hyperparameters=hyperparameters))
    await story.until(lambda story: "trained 1" in story.words)
    return story


async def test_01_a_black_hole_in_the_middle_of_a_round_changes_no_bit(
    line: BadLine, federation: Federation, tmp_path: Path
) -> None:
    story = await begun(line, federation, LARGE)
    line.order("cut")  # the tensors of round 2 are on their way
    lasts = asyncio.create_task(asyncio.sleep(OUTAGE))
    expected = asyncio.create_task(undisturbed(tmp_path / "near", LARGE))
    await story.until(nobody_here)  # noticed while it lasts; nobody says goodbye in a black hole
    assert "evaluated 3" not in story.words  # the experiment waits for them
    await lasts
    line.order("mend")
    await story.until(has_ended)
    assert story.words == ["trained 1", "trained 2", "trained 3", "evaluated 3"]
    assert digest(await federation.export("far")) == await expected


async def test_02_a_link_that_is_down_at_one_end_only_is_noticed_at_the_other(
    line: BadLine, federation: Federation, tmp_path: Path
) -> None:
    story = await begun(line, federation, SMALL)
    line.order("down")  # the silos' end; the coordinator's own link stays up, and its connections stay open
    expected = asyncio.create_task(undisturbed(tmp_path / "near", SMALL))
    await story.until(nobody_here)
    line.order("up")
    await story.until(has_ended)
    assert story.words == ["trained 1", "trained 2", "trained 3", "evaluated 3"]
    assert digest(await federation.export("far")) == await expected


LAY = """
import subprocess, sys, time
command = [sys.executable, "-m", "tests.netns.line"]
line = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
word, *place = line.stdout.readline().split()
if word == "ready":
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    daemon = subprocess.Popen([sys.executable, "-m", "tests.netns.enter", place[0], place[2], *sleep])
    print(line.pid, daemon.pid, flush=True)
    time.sleep(1000)
"""


def test_03_nothing_is_left_when_the_test_is_killed() -> None:
    killed = subprocess.Popen([sys.executable, "-c", LAY], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in killed.stdout.readline().split()]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    if not pids:
        pytest.skip("no network namespaces with TUN devices here")
    until_dead(*pids)
