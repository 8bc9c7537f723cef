"""Golden transcripts: a script drives one experiment, and the file shows all that the coordinator decided.

A line that starts in the first column is a command; the indented lines below it are the log. The driver here does what
the real one must do: it keeps the state as JSON only, so that every line also shows that nothing else is remembered.
"""

import shlex
from pathlib import Path

from pydantic import TypeAdapter

from coordinator import experiments, rounds
from coordinator.conduct import SetAside
from coordinator.experiments import CancelOrdered, CloseRound, Experiment, ExperimentEvent, SilosChanged
from coordinator.rounds import (
    Aggregate,
    Aggregated,
    Cancel,
    Offer,
    Refused,
    ResultFailed,
    ResultStored,
    Round,
    Settle,
    Tick,
)
from coordinator.selection import Population
from fedrt.spec import OnTooFew
from fedrt.task import RefusalReason, Verdict
from tests.samples import FROM_NOISE, FROM_WORDS, experiment_spec

EXPERIMENT: TypeAdapter[Experiment] = TypeAdapter(Experiment)


def replay(path: Path) -> str:
    """The file again, with the log as it is now."""
    script = [line for line in path.read_text().splitlines() if line and not line.startswith(" ")]
    transcript = Transcript()
    lines: list[str] = []
    for line in script:
        lines.append(line)
        if not line.startswith("#"):
            lines += [f"  {entry}" for entry in transcript.run(line)]
    return "\n".join(lines) + "\n"


class Transcript:
    """One experiment, its silos and a clock that only the script moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.known: set[str] = set()
        self.available: set[str] = set()
        self.document = b""

    def run(self, line: str) -> list[str]:
        """Carry out one command and return its log."""
        command, *words = shlex.split(line)
        if command == "at":
            self.now = float(words[0])
            command, *words = words[1:]
        return list(getattr(self, command)(*words))

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENT.validate_json(self.document)

    @experiment.setter
    def experiment(self, value: Experiment) -> None:
        self.document = EXPERIMENT.dump_json(value)

    # Commands

    def create(self, *options: str) -> list[str]:
        values = dict(option.split("=") for option in options)
        numbers = {key: int(values.pop(key)) for key in tuple(values) if values[key].isdigit()}
        count, every, start = numbers.pop("count", 1), numbers.pop("every", 1), values.pop("start", "noise")
        limits: dict[str, object] = {**numbers}
        if "on_too_few" in values:
            limits["on_too_few"] = OnTooFew(values.pop("on_too_few"))
        if "silos" in values:
            limits["silos"] = tuple(values.pop("silos").split(","))
        assert not values, f"unknown options {values}"
        spec = experiment_spec(count, every, FROM_WORDS if start == "words" else FROM_NOISE, **limits)
        self.experiment = experiments.create("e1", spec, "ab" * 32, self.now)
        return [standing_of(self.experiment)]

    def connect(self, *silos: str) -> list[str]:
        """`connect north` or `connect north held=TASK`."""
        names = [word for word in silos if "=" not in word]
        held = frozenset(word.removeprefix("held=") for word in silos if "=" in word)
        self.known.update(names)
        self.available.update(names)
        offers = [told(offer) for name in names for offer in experiments.offers_on_connect(self.experiment, name, held)]
        return offers + self.step(SilosChanged())

    def disconnect(self, *silos: str) -> list[str]:
        self.available.difference_update(silos)
        return self.step(SilosChanged())

    drain = disconnect

    def result(self, who: str) -> list[str]:
        return self.settle(ResultStored(self.task_of(who)))

    def fail(self, who: str, message: str) -> list[str]:
        return self.settle(ResultFailed(self.task_of(who), message))

    def invalid(self, who: str, message: str) -> list[str]:
        return self.settle(ResultFailed(self.task_of(who), message, Verdict.INVALID))

    def refuse(self, who: str, reason: str, message: str = "") -> list[str]:
        return self.step(Refused(self.task_of(who), RefusalReason(reason), message))

    def tick(self) -> list[str]:
        return self.step(Tick())

    def aggregated(self) -> list[str]:
        return self.step(Aggregated())

    def cancel(self) -> list[str]:
        return self.step(CancelOrdered())

    def restart(self) -> list[str]:
        """The coordinator comes back: nobody is connected, and the effects of the stored state are performed again."""
        self.available.clear()
        self.experiment = experiments.resume(self.experiment, self.now)
        round_ = self.experiment.round
        effects = rounds.resume(round_) if round_ else ()
        return [*map(told, effects), standing_of(self.experiment)]

    # What the commands share

    def task_of(self, who: str) -> str:
        """A task id as it is, or the task of a silo in the current round."""
        round_ = self.experiment.round
        if "/" in who or round_ is None:
            return who
        return next(ask.task_id for ask in round_.asks if ask.silo_id == who)

    def settle(self, event: ResultStored | ResultFailed) -> list[str]:
        round_ = self.experiment.round
        if round_ is None or round_.ask(event.task_id) is None:
            return ["(not of this round: the driver answers from its records)"]
        return self.step(event)

    def step(self, event: ExperimentEvent) -> list[str]:
        population = Population(frozenset(self.known), frozenset(self.available))
        self.experiment, effects = experiments.step(self.experiment, event, population, self.now)
        return [*map(told, effects), standing_of(self.experiment)]


def told(effect: rounds.RoundEffect | CloseRound | SetAside) -> str:
    """An effect as one line."""
    match effect:
        case Offer(_, task_id):
            return f"Offer {task_id}"
        case Settle(_, task_id, verdict, message):
            return f"Settle {task_id} {verdict.name}{quoted(message)}"
        case Cancel(_, task_id, message):
            return f"Cancel {task_id}{quoted(message)}"
        case Aggregate(task_ids):
            return f"Aggregate ({', '.join(task_ids)})"
        case CloseRound(round_):
            absent = "".join(f"; {silo} absent: {why}" for silo, why in rounds.absentees(round_))
            return f"CloseRound {place(round_)} {'succeeded' if round_.succeeded else 'failed'}{absent}"
        case SetAside(silo_id, until_round, message):
            return f"SetAside {silo_id} until round {until_round}{quoted(message)}"


def standing_of(experiment: Experiment) -> str:
    """The experiment's state as one line."""
    text = f"= {experiment.state.name}"
    if experiment.round is not None:
        asks = " ".join(f"{ask.silo_id}:{ask.state.value}" for ask in experiment.round.asks)
        text += f", {place(experiment.round)} {experiment.round.phase.name} {asks}"
        if (tick := rounds.next_tick(experiment.round)) is not None:
            text += f", tick at {tick:g}"
    elif not experiment.state.has_ended:
        text += f", {experiment.stage.kind.value} {experiment.stage.number} is next"
    return text + quoted(experiment.message)


def place(round_: Round) -> str:
    retry = f" (attempt {round_.attempt})" if round_.attempt else ""
    return f"{round_.kind.value} {round_.number}{retry}"


def quoted(message: str) -> str:
    return f': "{message}"' if message else ""
