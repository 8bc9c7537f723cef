"""Experiments, rounds, silos and events as JSON for scripts: keys and notation of the YAML files, times in ISO 8601."""

from datetime import UTC, datetime
from typing import Any

from fedrt.ctl_progress import ClosedRound, closed_round, state_name
from fedrt.experiment_file import experiment_file
from fedrt.task import TaskKind
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import experiment_pb2 as experiment_pb
from fedrt.wire_values import KIND, experiment_spec_from_pb, time_from_pb

Json = dict[str, Any]


def experiment_json(experiment: experiment_pb.Experiment) -> Json:
    """An experiment with its specification as the YAML file would have it."""
    spec = experiment_spec_from_pb(experiment.spec)
    return {
        **_standing(experiment),
        "method": spec.local.method_name,
        "round_count": spec.rounds.count,
        "create_time": iso_time(time_from_pb(experiment.create_time)),
        "spec": experiment_file(experiment.experiment_id, spec).model_dump(mode="json"),
    }


def round_json(closed: ClosedRound) -> Json:
    """A round that has ended."""
    return {
        "round": closed.number,
        "task": closed.kind.value,
        "succeeded": closed.succeeded,
        "duration_seconds": round(closed.duration, 3),
        "metrics": dict(closed.metrics),
        "silos": {
            name: {
                "examples": part.example_count,
                "metrics": dict(part.metrics),
                "work_seconds": round(part.work_duration, 3),
                "payload_bytes": part.byte_count,
            }
            for name, part in closed.silos.items()
        },
        "absent": dict(closed.absent),
    }


def silo_json(silo: experiment_pb.Silo) -> Json:
    """A silo."""
    return {
        "silo": silo.silo_id,
        "connected": silo.connected,
        "draining": silo.state == experiment_pb.Silo.STATE_DRAINING,
        "last_seen_time": iso_time(time_from_pb(silo.last_seen_time)),
        "software_version": silo.software_version,
        "device": silo.device,
        "methods": list(silo.methods),
        "open_tasks": list(silo.open_task_ids),
    }


def event_json(event: pb.Event) -> Json:
    """An event: `event` is its number, `kind` says which of the other keys there are."""
    kind = event.WhichOneof("kind") or "unknown"
    fields: Json = {"event": event.event_number, "time": iso_time(time_from_pb(event.event_time)), "kind": kind}
    match kind:
        case "experiment_changed":
            return fields | _standing(event.experiment_changed.experiment)
        case "round_closed":
            closed = event.round_closed
            return fields | {"experiment": closed.experiment_id} | round_json(closed_round(closed))
        case "silo_changed":
            return fields | silo_json(event.silo_changed.silo)
        case "silo_set_aside":
            aside = event.silo_set_aside
            where: Json = {"experiment": aside.experiment_id, "silo": aside.silo_id}
            return fields | where | {"until_round": aside.until_round_number, "message": aside.message}
        case _:
            return fields


def iso_time(unix_seconds: float) -> str:
    """UTC to the millisecond, such as "2026-11-20T09:15:00.250+00:00"."""
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat(timespec="milliseconds")


def _standing(experiment: experiment_pb.Experiment) -> Json:
    ended = experiment.HasField("end_time")
    return {
        "experiment": experiment.experiment_id,
        "state": state_name(experiment.state),
        "message": experiment.status_message,
        "round": experiment.round_number,
        "task": KIND.back(TaskKind, experiment.current_task_kind).value,
        "end_time": iso_time(time_from_pb(experiment.end_time)) if ended else None,
    }
