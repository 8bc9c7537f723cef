"""What a sequence of events adds up to, and how it is shown."""

from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from fedrt.ctl_json import event_json
from fedrt.ctl_progress import Plan, WatchState, closed_round, plan_of
from fedrt.ctl_view import event_line, printable, round_line, rounds_table, span_text, spark, watch_view
from fedrt.task import TaskKind
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import experiment_pb2 as experiment_pb
from fedrt.wire_values import KIND, duration_to_pb, time_to_pb
from tests.samples import experiment_spec

PLAN = Plan("e1", "promptfl", 2, round_count=2, every=1, silos=("north", "south"))
TRAIN, EVALUATE = TaskKind.TRAIN, TaskKind.EVALUATE


def changed(
    number: int, time: float, state: str, kind: TaskKind, round_number: int, message: str = "", name: str = "e1"
) -> pb.Event:
    experiment = experiment_pb.Experiment(
        experiment_id=name,
        state=experiment_pb.Experiment.State.Value(f"STATE_{state.upper()}"),
        round_number=round_number,
        current_task_kind=KIND.to(kind),
        status_message=message,
    )
    if state in ("succeeded", "failed", "cancelled"):
        experiment.end_time.CopyFrom(time_to_pb(time))
    event = pb.Event(event_number=number, event_time=time_to_pb(time))
    event.experiment_changed.experiment.CopyFrom(experiment)
    return event


def closed(
    number: int, kind: TaskKind, round_number: int, duration: float, values: dict[str, float], **fields: object
) -> pb.Event:
    event = pb.Event(event_number=number, event_time=time_to_pb(0.0))
    metric = "loss" if kind is TRAIN else "accuracy"
    parts = [
        pb.Contribution(silo_id=silo, example_count=10, metrics={metric: value}, payload_byte_count=64)
        for silo, value in values.items()
    ]
    event.round_closed.CopyFrom(
        pb.RoundClosed(
            experiment_id="e1",
            round_number=round_number,
            task_kind=KIND.to(kind),
            contributions=parts,
            metrics={metric: sum(values.values()) / len(values)} if values else {},
            succeeded=bool(fields.get("succeeded", True)),
            absences=[pb.Absence(silo_id=silo, message=why) for silo, why in fields.get("absent", {}).items()],  # type: ignore[attr-defined]
            duration=duration_to_pb(duration),
        )
    )
    return event


def silo(name: str, connected: bool = True, draining: bool = False, tasks: tuple[str, ...] = ()) -> experiment_pb.Silo:
    state = experiment_pb.Silo.STATE_DRAINING if draining else experiment_pb.Silo.STATE_ACTIVE
    return experiment_pb.Silo(silo_id=name, connected=connected, state=state, open_task_ids=tasks)


RUN = (
    changed(1, 100.0, "pending", EVALUATE, 0),
    changed(2, 101.0, "running", EVALUATE, 0),
    closed(3, EVALUATE, 0, 0.5, {"north": 0.2, "south": 0.4}),
    changed(4, 102.0, "running", TRAIN, 1),
    closed(5, TRAIN, 1, 4.0, {"north": 1.0, "south": 3.0}),
    changed(6, 106.0, "running", EVALUATE, 1),
    closed(7, EVALUATE, 1, 0.5, {"north": 0.5, "south": 0.6}),
    changed(8, 107.0, "running", TRAIN, 2),
    closed(9, TRAIN, 2, 2.0, {"north": 0.5, "south": 0.7}),
    changed(10, 109.0, "running", EVALUATE, 2),
    closed(11, EVALUATE, 2, 0.3, {"north": 0.8, "south": 0.7}),
    changed(12, 110.0, "succeeded", EVALUATE, 2),
)


def after(count: int, plan: Plan = PLAN) -> WatchState:
    state = WatchState(plan)
    for event in RUN[:count]:
        state = state.step(event)
    return state


def text_of(shown: RenderableType, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown)
    return console.export_text()


def test_a_whole_run() -> None:
    state = after(len(RUN))
    assert (state.state, state.succeeded, state.has_ended) == ("succeeded", True, True)
    assert state.series(EVALUATE, "accuracy", "north") == ((0, 0.2), (1, 0.5), (2, 0.8))
    assert state.series(TRAIN, "loss") == ((1, 2.0), (2, 0.6))
    assert state.series(TRAIN, "accuracy") == ()
    assert state.elapsed(now=999.0) == 10.0
    assert state.event_number == 12


def test_events_read_again_change_nothing() -> None:
    state = after(7)
    for event in RUN[:7]:
        assert state.step(event) is state


def test_events_of_other_experiments_are_passed_over() -> None:
    state = after(2).step(changed(3, 200.0, "failed", TRAIN, 9, name="e2"))
    assert (state.state, state.number, state.event_number) == ("running", 0, 3)


def test_an_event_of_an_unknown_kind_is_passed_over() -> None:
    state = after(2).step(pb.Event(event_number=3))
    assert replace(state, event_number=2) == after(2)


def test_time_left_is_not_guessed_before_a_round_has_finished() -> None:
    assert after(4).time_left(now=103.0) is None


def test_time_left_counts_what_remains_less_what_has_passed() -> None:
    state = after(5)  # one training round of 4 s and one evaluation of 0.5 s remain, and an evaluation has just begun
    assert state.time_left(now=102.0) == pytest.approx(4.0 + 2 * 0.5)
    state = after(8)  # the second training round has begun at 107
    assert state.time_left(now=108.0) == pytest.approx(4.0 + 0.5 - 1.0)
    assert state.time_left(now=200.0) == pytest.approx(0.5)
    assert after(12).time_left(now=200.0) == 0.0


def test_the_first_round_does_not_count_once_there_is_another() -> None:
    plan = replace(PLAN, round_count=4)
    assert after(11, plan).time_left(now=0.0) == pytest.approx(2 * 2.0 + 2 * 0.4)


def test_an_evaluation_never_measured_is_taken_to_last_as_long_as_training() -> None:
    state = WatchState(replace(PLAN, every=0)).step(changed(1, 0.0, "running", TRAIN, 1))
    state = state.step(closed(2, TRAIN, 1, 4.0, {"north": 1.0})).step(changed(3, 4.0, "running", TRAIN, 2))
    assert state.time_left(now=4.0) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("count", "every", "due"),
    [(0, 1, {0}), (0, 0, {0}), (3, 0, {3}), (3, 1, {0, 1, 2, 3}), (5, 2, {0, 2, 4, 5}), (2, 9, {0, 2})],
)
def test_evaluations_due(count: int, every: int, due: set[int]) -> None:
    assert replace(PLAN, round_count=count, every=every).evaluations == due


def test_plan_of_a_specification() -> None:
    spec = experiment_spec(count=3, every=2, silos=("north",))
    assert plan_of("e1", spec) == Plan("e1", "promptfl", 1, 3, 2, ("north",))


def test_what_silos_do() -> None:
    busy, elsewhere = ("e1/1/train/north",), ("e2/1/train/south",)
    state = after(4).with_silos([silo("north", tasks=busy), silo("south", tasks=elsewhere)])
    assert (state.doing("north"), state.doing("south"), state.doing("west")) == ("trains", "other work", "not seen")
    state = state.with_silos([silo("north"), silo("south", draining=True)])
    assert (state.doing("north"), state.doing("south")) == ("waits", "stopping")
    assert after(12).with_silos([silo("north", tasks=busy)]).doing("north") == "idle"


def test_members_are_those_of_the_plan_or_whoever_is_there() -> None:
    open_plan = replace(PLAN, silos=())
    assert after(3).members == ("north", "south")
    assert after(3, open_plan).with_silos([silo("west", connected=False)]).members == ("north", "south", "west")


def test_view_fits_a_terminal_of_100_columns() -> None:
    state = after(8).with_silos([silo("north", tasks=("e1/2/train/north",)), silo("south", connected=False)])
    text = text_of(watch_view(state, now=108.0, reference={"north": 0.1, "south": 0.9}))
    assert "round 2 of 2, training" in text
    assert "1/2 rounds" in text
    assert "about 4 s left" in text
    north = next(line for line in text.splitlines() if "north" in line)
    assert all(part in north for part in ("● up", "trains", "1.000", "0.100", "0.500", "+0.400"))
    assert "○ down" in text
    assert "-0.300" in next(line for line in text.splitlines() if "south" in line)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("count", range(len(RUN) + 1))
@pytest.mark.parametrize("width", [40, 80, 100])
def test_view_of_every_state(count: int, width: int) -> None:
    text = text_of(watch_view(after(count), now=108.0), width)
    assert max(map(len, text.splitlines())) <= width


def test_view_of_an_evaluation_only() -> None:
    plan = replace(PLAN, round_count=0)
    assert "0/1 evaluations" in text_of(watch_view(after(2, plan), now=101.0))
    assert "1/1 evaluations" in text_of(watch_view(after(3, plan), now=101.0))


def test_view_says_why_an_experiment_waits_or_failed() -> None:
    state = WatchState(PLAN).step(changed(1, 1.0, "pending", EVALUATE, 0, "waiting for [north]"))
    assert "waiting for [north]" in text_of(watch_view(state, now=2.0))


def test_lines() -> None:
    assert event_line(RUN[0]) == "pending"
    assert event_line(RUN[4]) == "round 1 training: loss 2.000 (north 1.000, south 3.000), 4.0 s"
    failed = closed(1, TRAIN, 3, 1.0, {}, succeeded=False, absent={"west": "out of \x1b[31mmemory"})
    assert event_line(failed) == "round 3 training failed after 1.0 s (west: out of ?[31mmemory)"
    partly = closed(1, TRAIN, 3, 1.0, {"north": 0.5}, absent={"west": "late"})
    assert round_line(closed_round(partly.round_closed)).endswith("1.0 s; without west")
    assert event_line(pb.Event(event_number=1)) == ""


def test_rounds_table_shows_every_silo_and_absentee() -> None:
    rounds = [
        closed_round(closed(1, TRAIN, 3, 1.0, {"north": 0.5}, absent={"west": "no [result]"}).round_closed),
        closed_round(closed(2, EVALUATE, 3, 1.0, {"north": 0.25}).round_closed),
    ]
    text = text_of(rounds_table(rounds))
    assert "no [result]" in text
    assert "0.500" in text
    assert "0.250" in text


def test_json_of_events() -> None:
    assert event_json(RUN[4])["silos"]["north"] == {
        "examples": 10,
        "metrics": {"loss": 1.0},
        "work_seconds": 0.0,
        "payload_bytes": 64,
    }
    ended = event_json(RUN[-1])
    assert (ended["event"], ended["kind"], ended["state"]) == (12, "experiment_changed", "succeeded")
    assert ended["end_time"] == "1970-01-01T00:01:50.000+00:00"
    event = pb.Event(event_number=1)
    event.silo_changed.silo.CopyFrom(silo("north"))
    assert event_json(event)["silo"] == "north"
    assert event_json(pb.Event(event_number=1))["kind"] == "unknown"


def test_small_texts() -> None:
    assert [span_text(seconds) for seconds in (0.4, 59.4, 61, 7325)] == ["0 s", "59 s", "1:01 min", "2:02 h"]
    assert spark([]) == ""
    assert spark([0.5, 0.5]) == "▁▁"
    assert spark([0.0, 0.5, 1.0]) == "▁▅█"
    assert spark([number / 49 for number in range(50)]) == "▁▂▂▃▄▅▆▆▇█"
    assert printable("a\x1b[31m\nb") == "a?[31m?b"
