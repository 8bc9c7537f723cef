"""Experiments, silos and events to and from the messages of the admin service."""

from coordinator.experiments import Experiment
from coordinator.records import (
    Event,
    ExperimentChanged,
    NumberedEvent,
    RoundClosed,
    SiloChanged,
    SiloRecord,
    SiloSetAside,
)
from fedrt.v1 import admin_service_pb2 as admin_pb
from fedrt.v1 import experiment_pb2 as experiment_pb
from fedrt.wire_values import KIND, duration_to_pb, experiment_spec_to_pb, time_to_pb

_State = experiment_pb.Experiment.State


def experiment_to_pb(experiment: Experiment) -> experiment_pb.Experiment:
    """The message of an experiment, its specification included."""
    message = experiment_pb.Experiment(
        experiment_id=experiment.experiment_id,
        spec=experiment_spec_to_pb(experiment.spec, bytes.fromhex(experiment.schema_sha256)),
        state=_State.Value(f"STATE_{experiment.state.name}"),
        round_number=experiment.stage.number,
        status_message=experiment.message,
        create_time=time_to_pb(experiment.create_time),
        current_task_kind=KIND.to(experiment.stage.kind),
    )
    if experiment.end_time is not None:
        message.end_time.CopyFrom(time_to_pb(experiment.end_time))
    return message


def silo_to_pb(silo: SiloRecord, open_task_ids: list[str]) -> experiment_pb.Silo:
    """The message of a silo."""
    state = experiment_pb.Silo.STATE_DRAINING if silo.draining else experiment_pb.Silo.STATE_ACTIVE
    return experiment_pb.Silo(
        silo_id=silo.silo_id,
        state=state,
        connected=silo.connected,
        last_seen_time=time_to_pb(silo.last_seen_time),
        open_task_ids=open_task_ids,
        software_version=silo.software_version,
        device=silo.device,
        methods=silo.methods,
    )


def event_to_pb(numbered: NumberedEvent) -> admin_pb.Event:
    """The message of an event."""
    message = admin_pb.Event(event_number=numbered.number, event_time=time_to_pb(numbered.time))
    _fill(message, numbered.event)
    return message


def _fill(message: admin_pb.Event, event: Event) -> None:
    match event:
        case ExperimentChanged():
            experiment = message.experiment_changed.experiment
            experiment.experiment_id = event.experiment_id
            experiment.state = _State.Value(f"STATE_{event.state.upper()}")
            experiment.round_number = event.round_number
            experiment.current_task_kind = KIND.to(event.kind)
            experiment.status_message = event.message
            if event.end_time is not None:
                experiment.end_time.CopyFrom(time_to_pb(event.end_time))
        case RoundClosed():
            message.round_closed.CopyFrom(_round_to_pb(event))
        case SiloChanged(silo):
            message.silo_changed.silo.CopyFrom(silo_to_pb(silo, []))
        case SiloSetAside():
            aside = message.silo_set_aside
            aside.experiment_id, aside.silo_id = event.experiment_id, event.silo_id
            aside.until_round_number, aside.message = event.until_round, event.message


def _round_to_pb(event: RoundClosed) -> admin_pb.RoundClosed:
    return admin_pb.RoundClosed(
        experiment_id=event.experiment_id,
        round_number=event.round_number,
        task_kind=KIND.to(event.kind),
        contributions=[
            admin_pb.Contribution(
                silo_id=part.silo_id,
                example_count=part.example_count,
                metrics=part.metrics,
                work_duration=duration_to_pb(part.work_duration),
                payload_byte_count=part.byte_count,
            )
            for part in event.contributions
        ],
        absences=[admin_pb.Absence(silo_id=silo_id, message=message) for silo_id, message in event.absences],
        metrics=event.metrics,
        succeeded=event.succeeded,
        duration=duration_to_pb(event.duration),
    )
