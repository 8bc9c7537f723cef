"""How `fedrtctl` and the demo show experiments on a terminal (rich), and as plain lines where there is none."""

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedrt.ctl_json import iso_time
from fedrt.ctl_progress import ClosedRound, WatchState, closed_round, state_name
from fedrt.experiment_file import experiment_file
from fedrt.spec import ExperimentSpec
from fedrt.task import TaskKind
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import experiment_pb2 as experiment_pb
from fedrt.wire_values import experiment_spec_from_pb, time_from_pb
from fedrt.yaml_text import dump_mapping

LEVELS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 10
SPARK_SPAN = 0.1  # smallest span of values that fills the height of the bars
NOTHING = "–"
_COLOURS = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan", "pending": "yellow"}
_TASKS = {TaskKind.INITIALIZE: "initial tensors", TaskKind.TRAIN: "training", TaskKind.EVALUATE: "evaluation"}


def watch_view(state: WatchState, now: float, reference: Mapping[str, float] | None = None) -> RenderableType:
    """A running experiment; `reference` holds accuracies to compare with, by silo: those of zero-shot CLIP, say."""
    return Group(_headline(state), _progress(state, now), Padding(_silo_table(state, reference), (1, 0, 0, 1)))


def event_line(event: pb.Event) -> str:
    """An event on one line, for logs and pipes; empty for one that says nothing new."""
    match event.WhichOneof("kind"):
        case "round_closed":
            return round_line(closed_round(event.round_closed))
        case "experiment_changed":
            experiment = event.experiment_changed.experiment
            message = f": {printable(experiment.status_message)}" if experiment.status_message else ""
            return f"{state_name(experiment.state)}{message}"
        case "silo_set_aside":
            aside = event.silo_set_aside
            return f"{aside.silo_id} is set aside until round {aside.until_round_number}: {printable(aside.message)}"
        case _:
            return ""


def round_line(closed: ClosedRound) -> str:
    """A round on one line: the mean and, in brackets, each silo."""
    head = f"round {closed.number} {_TASKS[closed.kind]}"
    if not closed.succeeded:
        reasons = "; ".join(f"{silo}: {printable(why)}" for silo, why in sorted(closed.absent.items()))
        return f"{head} failed after {closed.duration:.1f} s ({reasons})"
    parts = [
        f"{name} {mean:.3f} (" + ", ".join(_per_silo(closed, name)) + ")"
        for name, mean in sorted(closed.metrics.items())
        if not name.endswith(_FINER)
    ]
    absent = f"; without {', '.join(sorted(closed.absent))}" if closed.absent else ""
    return f"{head}: {', '.join([*parts, f'{closed.duration:.1f} s'])}{absent}"


def experiments_table(experiments: Iterable[experiment_pb.Experiment]) -> Table:
    """A row per experiment."""
    table = _table("experiment", "state", "method", "round", "created (UTC)", "message")
    for experiment in experiments:
        spec = experiment_spec_from_pb(experiment.spec)
        table.add_row(
            experiment.experiment_id,
            _state_text(state_name(experiment.state)),
            spec.local.method_name,
            f"{experiment.round_number}/{spec.rounds.count}",
            _minute(time_from_pb(experiment.create_time)),
            Text(printable(experiment.status_message)),
        )
    return table


def silos_table(silos: Iterable[experiment_pb.Silo]) -> Table:
    """A row per silo."""
    table = _table("silo", "link", "last seen (UTC)", "version", "device", "methods", "works at")
    for silo in silos:
        table.add_row(
            silo.silo_id,
            _connection_text(silo.connected, silo.state == experiment_pb.Silo.STATE_DRAINING),
            _minute(time_from_pb(silo.last_seen_time)),
            *(Text(printable(text)) for text in (silo.software_version, silo.device, ", ".join(silo.methods))),
            ", ".join(silo.open_task_ids) or NOTHING,
        )
    return table


def experiment_view(experiment: experiment_pb.Experiment, rounds: Sequence[ClosedRound]) -> RenderableType:
    """An experiment in full: how it stands, what it is, and what became of these rounds."""
    spec = experiment_spec_from_pb(experiment.spec)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("state", _state_text(state_name(experiment.state)))
    if experiment.status_message:
        facts.add_row("message", Text(printable(experiment.status_message)))
    facts.add_row("round", f"{experiment.round_number} of {spec.rounds.count}")
    facts.add_row("created", _minute(time_from_pb(experiment.create_time)) + " UTC")
    if experiment.HasField("end_time"):
        facts.add_row("ended", _minute(time_from_pb(experiment.end_time)) + " UTC")
    yaml = Padding(Text(effective_experiment(experiment.experiment_id, spec).rstrip()), (1, 0, 1, 2))
    return Group(facts, yaml, rounds_table(rounds) if rounds else Text("no round has ended yet"))


def rounds_table(rounds: Sequence[ClosedRound]) -> Table:
    """A row per round and silo, with every metric that any of them has, but for the finer ones of an evaluation."""
    metrics = sorted({name for closed in rounds for name in closed.metrics if not name.endswith(_FINER)})
    table = _table("round", "task", "silo", "examples", *metrics, "seconds", "bytes sent")
    for closed in rounds:
        cells = [str(closed.number), _TASKS[closed.kind]]
        for silo, part in sorted(closed.silos.items()):
            values = [_number(part.metrics.get(name)) for name in metrics]
            sent = f"{part.byte_count:,}" if part.byte_count else NOTHING
            table.add_row(*cells, silo, str(part.example_count), *values, f"{part.work_duration:.2f}", sent)
            cells = ["", ""]
        for silo, why in sorted(closed.absent.items()):
            table.add_row(*cells, silo, Text(printable(why), style="yellow"))
            cells = ["", ""]
        if not closed.succeeded:
            table.add_row(*cells, Text("failed", style="red"))
    return table


def effective_experiment(experiment_id: str, spec: ExperimentSpec) -> str:
    """The experiment as YAML, every default filled in."""
    return dump_mapping(experiment_file(experiment_id, spec).model_dump(mode="json"))


def spark(values: Sequence[float]) -> str:
    """The values as bars between the least and the largest; of many, evenly chosen ones up to the latest."""
    if not values:
        return ""
    low, span = min(values), max(max(values) - min(values), SPARK_SPAN)
    if len(values) > SPARK_WIDTH:
        values = [values[index * (len(values) - 1) // (SPARK_WIDTH - 1)] for index in range(SPARK_WIDTH)]
    return "".join(LEVELS[round((value - low) / span * (len(LEVELS) - 1))] for value in values)


def span_text(seconds: float) -> str:
    """A span of time for people: "8 s", "3:05 min", "2:10 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"


def _headline(state: WatchState) -> Text:
    plan = state.plan
    text = Text.assemble(" ", (plan.experiment_id, "bold"), "  ", _state_text(state.state))
    text.append(f"  {plan.method}, {plan.class_count} classes", "dim")
    if not state.has_ended and state.state == "running":
        where = f"round {state.number} of {plan.round_count}, " if plan.round_count else ""
        text.append(f"  {where}{_TASKS[state.kind]}")
    if state.message:
        text.append(f"\n {printable(state.message)}", _COLOURS[state.state])
    return text


def _progress(state: WatchState, now: float) -> RenderableType:
    plan = state.plan
    done = len({closed.number for closed in state.finished(TaskKind.TRAIN)})
    total = plan.round_count
    if not total:  # only evaluates
        done, total = len({closed.number for closed in state.finished(TaskKind.EVALUATE)}), 1
    left = state.time_left(now)
    parts = [
        f"{done}/{total} rounds" if plan.round_count else f"{done}/{total} evaluations",
        span_text(state.elapsed(now)),
    ]
    if not state.has_ended:
        parts.append("time left unknown yet" if left is None else f"about {span_text(left)} left")
    grid = Table.grid(padding=(0, 1))
    grid.add_row("", ProgressBar(total=total, completed=done, width=36), "  ".join(parts))
    return grid


def _silo_table(state: WatchState, reference: Mapping[str, float] | None) -> Table:
    compared = ["zero-shot"] if reference else []
    table = _table("silo", "link", "does now", "images", "loss", *compared, "accuracy", "", "change")
    curves = {name: state.series(TaskKind.EVALUATE, "accuracy", name) for name in state.members}
    for name in state.members:
        standing = state.silos.get(name)
        connection = _connection_text(standing.connected, standing.draining) if standing else Text(NOTHING)
        curve = [value for _, value in curves[name]]
        before = (reference or {}).get(name, curve[0] if len(curve) > 1 else None)
        against = [_number(reference.get(name))] if reference else []
        cells = [_examples(state, name), _latest(state, TaskKind.TRAIN, "loss", name), *against, _last(curve)]
        table.add_row(name, connection, state.doing(name), *cells, spark(curve), _change(before, curve))
    means = [value for _, value in state.series(TaskKind.EVALUATE, "accuracy")]
    loss = _latest(state, TaskKind.TRAIN, "loss", None)
    table.add_row("mean", "", "", "", loss, *([""] if reference else []), _last(means), style="bold", end_section=True)
    return table


def _examples(state: WatchState, silo: str) -> str:
    for closed in reversed(state.rounds):
        if silo in closed.silos and closed.kind is TaskKind.TRAIN:
            return str(closed.silos[silo].example_count)
    return NOTHING


def _latest(state: WatchState, kind: TaskKind, metric: str, silo: str | None) -> str:
    """From training if there was any, else from evaluation."""
    series = state.series(kind, metric, silo) or state.series(TaskKind.EVALUATE, metric, silo)
    return _number(series[-1][1]) if series else NOTHING


def _last(values: Sequence[float]) -> str:
    return _number(values[-1]) if values else NOTHING


def _change(before: float | None, curve: Sequence[float]) -> Text:
    if before is None or not curve:
        return Text("")
    change = curve[-1] - before
    return Text(f"{change:+.3f}", "green" if change > 0 else "red" if change < 0 else "")


def _per_silo(closed: ClosedRound, metric: str) -> list[str]:
    having = [(name, part.metrics[metric]) for name, part in sorted(closed.silos.items()) if metric in part.metrics]
    return [f"{name} {value:.3f}" for name, value in having]


def printable(text: str) -> str:
    """The text without what could steer a terminal: it may come from a silo."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _minute(unix_seconds: float) -> str:
    return iso_time(unix_seconds)[:16].replace("T", " ")


def _state_text(state: str) -> Text:
    return Text(state, f"bold {_COLOURS.get(state, '')}")


def _connection_text(connected: bool, draining: bool) -> Text:
    if not connected:
        return Text("○ down", "red")
    return Text("◐ stops", "yellow") if draining else Text("● up", "green")


_FINER = ("auroc", "calibration_error", "macro_f1", "_loss")  # in `fedrtctl show --json` and in exports
_WRAPPED = {"message", "methods", "works at"}
_MIN_WIDTHS = {"link": 4, "does now": 9, "loss": 6, "accuracy": 8}  # so that the display stays still
_RIGHT = {"examples", "images", "loss", "accuracy", "zero-shot", "change", "seconds", "bytes sent", "round"}


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim", show_edge=False)
    for column in columns:
        align: JustifyMethod = "right" if column in _RIGHT else "left"
        table.add_column(column, justify=align, no_wrap=column not in _WRAPPED, min_width=_MIN_WIDTHS.get(column))
    return table
