"""The course of the demo: set up, start, run two experiments, export, stop; every step is told on the console."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from fedrt.admin_client import LocalSocket, connect
from fedrt.ctl import Lines, LiveView
from fedrt.ctl_follow import follow
from fedrt.ctl_progress import WatchState
from fedrt.experiment_file import load_experiment
from fedrt.task import TaskKind
from silo.demo.departed import objections, read_departures
from silo.demo.directory import (
    FEDERATION,
    OPERATOR,
    Layout,
    free_port,
    write_daemon_files,
    write_experiment_files,
)
from silo.demo.hospitals import SILOS, SiloData, silo_data
from silo.demo.outcome import Outcome
from silo.demo.processes import DemoError, Processes, script
from silo.demo.recipes import Recipe
from silo.embedded import embedded_paths


class Course:
    """One demo. `run` ends with no process left."""

    def __init__(self, layout: Layout, recipe: Recipe, console: Console) -> None:
        self._layout = layout
        self._recipe = recipe
        self._console = console
        self._sockets = layout.sockets()
        self._socket = layout.admin_socket(self._sockets)
        self._seconds: dict[str, float] = {}

    async def run(self, on_processes: Callable[[Processes], None]) -> Outcome:
        """Do everything; `on_processes` is told what can be killed. Raises `DemoError` and other `FedrtError`."""
        began = time.monotonic()
        async with Processes(self._layout.logs, self._sockets) as processes:
            on_processes(processes)
            data = await processes.guarding(self._set_up(processes))
            self._seconds["set_up"] = time.monotonic() - began
            zeroshot = await processes.guarding(self._experiment(processes, "zeroshot", {}))
            reference = {silo: zeroshot.series(TaskKind.EVALUATE, "accuracy", silo)[-1][1] for silo in SILOS}
            promptfl = await processes.guarding(self._experiment(processes, "promptfl", reference))
            prompt_path = await processes.guarding(self._export(processes))
            async with self._step("stop", "the silos, then the coordinator"):
                await processes.stop()
        self._seconds["total"] = time.monotonic() - began
        departed = {silo: read_departures(self._layout.departures(silo)) for silo in SILOS}
        specs = load_experiment(self._layout.yaml("promptfl"))[1].local.tensors()
        return Outcome(
            recipe=self._recipe,
            data=data,
            zeroshot=zeroshot,
            promptfl=promptfl,
            departed=departed,
            objections={silo: objections(departed[silo], specs, _received(promptfl, silo)) for silo in SILOS},
            prompt_path=prompt_path,
            seconds=self._seconds,
        )

    async def _set_up(self, processes: Processes) -> dict[str, SiloData]:
        layout, recipe = self._layout, self._recipe
        silos = [argument for silo in SILOS for argument in ("--silo", silo)]
        async with self._step("certificates", f"a throw-away federation {FEDERATION!r}, valid for a week"):
            await processes.call(
                script("fedrt-certs"), "dev", "--directory", str(layout.certs), "--federation", FEDERATION,
                "--operator", OPERATOR, *silos,
            )  # fmt: skip
        port = free_port()
        write_daemon_files(layout, port, self._socket)
        write_experiment_files(layout, recipe, embedded_paths().weights_path)
        async with self._step("coordinator", f"127.0.0.1:{port}, mutual TLS"):
            await self._start(processes, "coordinator", "fedrt-coordinator")
            await processes.ready("coordinator")
        async with self._step("images", "as files, in a folder per hospital") as tell:
            data = silo_data(await self._draw(processes))
            tell(", ".join(f"{silo} {one.train_count}+{one.test_count} ({one.scanner})" for silo, one in data.items()))
        async with self._step("silos", "each loads its own CLIP and images") as tell:
            ids = [await self._start(processes, silo, "fedrt-silo") for silo in SILOS]
            await asyncio.gather(*(processes.ready(silo) for silo in SILOS))
            tell(f"{', '.join(SILOS)} are connected (processes {', '.join(map(str, ids))})")
        return data

    async def _start(self, processes: Processes, name: str, program: str) -> int:
        return await processes.start(name, script(program), "run", "--config", str(self._layout.yaml(name)))

    async def _draw(self, processes: Processes) -> str:
        recipe = self._recipe
        place, seed, images = str(self._layout.images), str(recipe.seed), str(recipe.images)
        return await processes.call(sys.executable, "-m", "silo.demo.hospitals", recipe.data, place, seed, images)

    async def _experiment(self, processes: Processes, name: str, reference: dict[str, float]) -> WatchState:
        """Submit an experiment as an operator does, and follow it to its end."""
        self._console.print()
        began = time.monotonic()
        path = self._layout.yaml(name)
        await processes.call(script("fedrtctl"), "--socket", str(self._socket), "create", str(path))
        self._console.print(
            f" [dim]$[/] fedrtctl --socket {_short(self._socket)} create {_short(path)}", soft_wrap=True
        )
        async with connect(LocalSocket(self._socket)) as client:
            if self._console.is_terminal:
                with Live(console=self._console, refresh_per_second=8) as live:
                    state = await follow(client, name, LiveView(live, reference))
            else:
                state = await follow(client, name, Lines(as_json=False))
        self._seconds[name] = time.monotonic() - began
        if not state.succeeded:
            raise DemoError(f"experiment {name!r} ended as {state.state}: {state.message}")
        return state

    async def _export(self, processes: Processes) -> Path:
        self._console.print()
        async with self._step("export", "the trained prompt, with fedrtctl export") as tell:
            place = str(self._layout.export)
            printed = await processes.call(
                script("fedrtctl"), "--socket", str(self._socket), "export", "promptfl", "--to", place
            )
            path = Path(printed.splitlines()[0])
            tell(str(_short(path)))
        return path

    @contextlib.asynccontextmanager
    async def _step(self, name: str, text: str) -> AsyncIterator[Callable[[str], None]]:
        """Show that a step is under way, and when it is done how long it took; the text may change meanwhile."""
        told = [text]
        began = time.monotonic()
        with self._console.status(f"[bold]{name}[/]  {text}", spinner="dots"):
            yield lambda better: told.__setitem__(0, better)
        seconds = f"{time.monotonic() - began:.1f} s"
        self._console.print(f" [green]✓[/] [bold]{name:<13}[/] {told[0]}  [dim]{seconds}[/]", highlight=False)


def _received(state: WatchState, silo: str) -> int:
    """The bytes of tensors that the coordinator says it received from a silo."""
    return sum(closed.silos[silo].byte_count for closed in state.rounds if silo in closed.silos)


def _short(path: Path) -> Path:
    """Relative to the working directory if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
