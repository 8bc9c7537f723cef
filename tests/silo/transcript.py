"""Golden transcripts of the ledger: a script says what happens to a silo, and the file shows all that it decided.

A line that starts in the first column is a command; the indented lines below it are the log. The driver here does what
the agent must do: it performs every effect in order, keeps the ledger as JSON only, and loses all but the spool and the
vault in a crash.
"""

import shlex
from pathlib import Path

from pydantic import TypeAdapter

from fedrt.task import RefusalReason, Verdict
from silo.ledger import (
    CancelArrived,
    DrainOrdered,
    Forget,
    Hold,
    HoldState,
    Ledger,
    LedgerEffect,
    LedgerEvent,
    Offered,
    OutcomeStored,
    Promote,
    Reply,
    Send,
    SessionDown,
    SessionUp,
    Start,
    StoreCancelled,
    TensorsArrived,
    VerdictArrived,
    held_tasks,
    step,
)

LEDGER: TypeAdapter[Ledger] = TypeAdapter(Ledger)


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
    """One silo: its ledger, its disk, and whether it has a session."""

    def __init__(self) -> None:
        self.document = LEDGER.dump_json(Ledger())
        self.experiments: dict[str, str] = {}  # of tasks
        self.spool: dict[str, str] = {}  # what a result holds, by task
        self.vault: dict[str, list[str]] = {}  # the tasks whose private tensors were promoted, by experiment
        self.connected = False
        self.log: list[str] = []

    def run(self, line: str) -> list[str]:
        """Carry out one command and return its log."""
        command, *words = shlex.split(line)
        self.log = []
        getattr(self, command)(*words)
        return [*self.log, self.standing()]

    @property
    def ledger(self) -> Ledger:
        return LEDGER.validate_json(self.document)

    # Commands

    def connect(self, *options: str) -> None:
        """`connect obsolete=t1,t2`: Hello names what is held, and Welcome what is not wanted of it."""
        obsolete = [task_id for option in options for task_id in option.removeprefix("obsolete=").split(",")]
        held = " ".join(f"{task.task_id}:{task.state.value}" for task in held_tasks(self.ledger))
        self.log.append(f"Hello, held {'are ' + held if held else 'is nothing'}")
        self.connected = True
        self.tell(SessionUp(tuple(obsolete)))

    def disconnect(self) -> None:
        self.connected = False
        self.tell(SessionDown())

    def offer(self, task_id: str, experiment_id: str, *options: str) -> None:
        """`offer t1 e1 tensors`, or `offer t1 e1 policy "no work at night"`, if the policy forbids it."""
        self.experiments[task_id] = experiment_id
        reason, message = options if len(options) == 2 else (None, "")
        refusal = RefusalReason(reason) if reason else None
        self.tell(Offered(task_id, experiment_id, "tensors" in options, refusal, message))

    def tensors(self, task_id: str) -> None:
        self.tell(TensorsArrived(task_id))

    def spoilt(self, task_id: str) -> None:
        """The tensors of an offer arrived with a wrong digest."""
        self.store(task_id, "failure")

    def done(self, task_id: str) -> None:
        """The worker is done; a task that was cancelled or forgotten meanwhile is none of its business."""
        if self.ledger.state(task_id) is HoldState.RUNNING:
            self.store(task_id, "success")

    def cancel(self, task_id: str) -> None:
        self.tell(CancelArrived(task_id))

    def verdict(self, task_id: str, verdict: str, *options: str) -> None:
        """`verdict t1 accepted crash`: the daemon dies between promoting the private tensors and emptying the spool."""
        if options == ("crash",):
            self.promote(task_id)
            self.crash()
        else:
            self.tell(VerdictArrived(task_id, Verdict(verdict)))

    def drain(self) -> None:
        self.tell(DrainOrdered())

    def crash(self, *stored: str) -> None:
        """The daemon dies, for `crash t1` as soon as the outcome of t1 is durable, and comes back."""
        self.spool.update(dict.fromkeys(stored, "success"))
        self.connected = False
        holds = tuple(Hold(task_id, self.experiments[task_id], HoldState.FINISHED) for task_id in self.spool)
        self.document = LEDGER.dump_json(Ledger(holds))
        self.log.append(f"in the spool: {' '.join(self.spool) or 'nothing'}")

    # The driver

    def tell(self, event: LedgerEvent) -> None:
        ledger, effects = step(self.ledger, event)
        self.document = LEDGER.dump_json(ledger)
        for effect in effects:
            self.perform(effect)

    def perform(self, effect: LedgerEffect) -> None:
        match effect:
            case Reply(task_id, refusal, message):
                answer = f"refused, {refusal.value}: {message!r}" if refusal else "accepted"
                self.log.append(f"Reply {task_id} {answer}")
            case Start(task_id):
                promoted = self.vault.get(self.experiments[task_id], ["nothing"])[-1]
                self.log.append(f"Start {task_id}, with the private tensors of {promoted}")
            case StoreCancelled(task_id):
                self.log.append(f"StoreCancelled {task_id}")
                self.store(task_id, "failure")
            case Send(task_id):
                held_back = "" if self.connected else ": there is no session"
                self.log.append(f"Send {task_id}, a {self.spool[task_id]}{held_back}")
            case Promote(task_id):
                self.promote(task_id)
                del self.spool[task_id]
            case Forget(task_id):
                self.log.append(f"Forget {task_id}")
                self.spool.pop(task_id, None)

    def store(self, task_id: str, outcome: str) -> None:
        self.spool[task_id] = outcome
        self.tell(OutcomeStored(task_id))

    def promote(self, task_id: str) -> None:
        self.log.append(f"Promote {task_id}")
        promoted = self.vault.setdefault(self.experiments[task_id], [])
        if self.spool[task_id] == "success" and promoted[-1:] != [task_id]:
            promoted.append(task_id)

    def standing(self) -> str:
        """The ledger as one line."""
        ledger = self.ledger
        assert {hold.task_id for hold in ledger.holds if hold.state is HoldState.FINISHED} == set(self.spool)
        facts = [f"{hold.task_id} of {hold.experiment_id} {hold.state.name}" for hold in ledger.holds] or ["idle"]
        return f"= {', '.join(facts)}{'; draining' if ledger.draining else ''}"
