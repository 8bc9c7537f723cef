"""The wire: every frame survives serialisation, and what cannot be read becomes an error with an owner."""

import contextlib
import re
import tracemalloc
from dataclasses import replace

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fedrt.errors import FailureReason, PayloadError, SpecError
from fedrt.session.frames import (
    HeldState,
    HeldTask,
    TaskOffer,
    TaskProgress,
    TaskReply,
    TaskResult,
    UnreadableAck,
    UnreadableOffer,
    UnreadableResult,
)
from fedrt.spec import EvaluationSplit, LocalEvaluationSpec, TrainingSpec
from fedrt.task import Failure, RefusalReason, Result, Success, TaskKind
from fedrt.v1 import experiment_pb2 as experiment_pb
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import task_pb2 as task_pb
from fedrt.v1 import tensor_pb2 as tensor_pb
from fedrt.wire import (
    duration_from_pb,
    duration_to_pb,
    local_spec_from_pb,
    local_spec_to_pb,
    manifest_from_pb,
    manifest_to_pb,
    request_from_pb,
    request_to_pb,
    response_from_pb,
    response_to_pb,
    time_from_pb,
    time_to_pb,
)
from fedrt.wire_values import experiment_spec_from_pb, experiment_spec_to_pb
from tests import strategies as fedrt_st
from tests.samples import experiment_spec, local_spec, payload, task

Request = session_pb.OpenSessionRequest
Response = session_pb.OpenSessionResponse
UNKNOWN = 77  # a number that no enum of this version has


@given(fedrt_st.silo_frames)
def test_every_frame_of_a_silo_survives(frame):
    assert request_from_pb(Request.FromString(request_to_pb(frame).SerializeToString())) == frame


@given(fedrt_st.coordinator_frames)
def test_every_frame_of_the_coordinator_survives(frame):
    assert response_from_pb(Response.FromString(response_to_pb(frame).SerializeToString())) == frame


@given(fedrt_st.local_specs, fedrt_st.digests)
def test_every_local_spec_survives(spec, schema):
    message = task_pb.LocalSpec.FromString(local_spec_to_pb(spec, schema).SerializeToString())
    assert local_spec_from_pb(message) == spec
    assert message.method.schema_sha256 == schema


@given(fedrt_st.experiment_specs, fedrt_st.digests)
def test_every_specification_of_an_experiment_survives(spec, schema):
    data = experiment_spec_to_pb(spec, schema).SerializeToString()
    assert experiment_spec_from_pb(experiment_pb.ExperimentSpec.FromString(data)) == spec


@given(fedrt_st.manifests())
def test_every_manifest_survives(manifest):
    assert (
        manifest_from_pb(tensor_pb.PayloadManifest.FromString(manifest_to_pb(manifest).SerializeToString())) == manifest
    )


@given(st.floats(0, 1e9))
def test_a_duration_is_right_to_the_nanosecond_and_does_not_drift(seconds):
    once = duration_from_pb(duration_to_pb(seconds))
    assert once == pytest.approx(seconds, abs=2e-9, rel=1e-15)
    assert duration_from_pb(duration_to_pb(once)) == once


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 1.1, 1.9, 59.9, 0.999999999, 1799.999])
def test_a_duration_of_whole_nanoseconds_crosses_unchanged(seconds):
    assert duration_from_pb(duration_to_pb(seconds)) == seconds


@pytest.mark.parametrize("seconds", [0.9999999999, 1.9999999999, 1e9 - 1e-7])
def test_the_nanoseconds_of_a_duration_stay_below_a_second(seconds):
    assert 0 <= duration_to_pb(seconds).nanos < 1_000_000_000


@given(st.floats(0, 4e9))
def test_a_time_is_right_to_a_microsecond(seconds):
    assert time_from_pb(time_to_pb(seconds)) == pytest.approx(seconds, abs=1e-6)


class TestFramesOfALaterVersion:
    """Whatever a later version adds to a message, an unknown field is all that this one sees."""

    LATER = b"\xfa\x01\x03abc"  # field 31, three bytes

    def test_an_unknown_frame_is_none(self):
        assert request_from_pb(Request.FromString(self.LATER)) is None
        assert response_from_pb(Response.FromString(self.LATER)) is None

    def test_an_empty_message_is_none(self):
        assert request_from_pb(Request()) is None
        assert response_from_pb(Response()) is None

    def test_an_unknown_field_beside_a_known_frame_is_ignored(self):
        data = request_to_pb(TaskProgress("t", 1, 2)).SerializeToString()
        assert request_from_pb(Request.FromString(data + self.LATER)) == TaskProgress("t", 1, 2)


@pytest.mark.parametrize("verdict", [task_pb.RESULT_VERDICT_UNSPECIFIED, UNKNOWN])
def test_a_verdict_that_means_nothing_to_us_is_unreadable_and_keeps_its_task_id(verdict):
    message = Response(result_ack=task_pb.ResultAck(task_id="t", verdict=verdict, message="m" * 5000))
    frame = response_from_pb(message)
    assert isinstance(frame, UnreadableAck)
    assert frame.task_id == "t"
    assert frame.message.startswith(f"Verdict number {verdict} is not known to this version; mmm")
    assert len(frame.message) == 2000


class TestSplitsAndSeed:
    """What was added to the part of an experiment that a silo needs."""

    def test_an_offer_of_an_older_coordinator_means_the_personal_split(self):
        message = local_spec_to_pb(local_spec())
        message.ClearField("evaluation")
        message.ClearField("seed")
        found = local_spec_from_pb(message)
        assert found.evaluation == LocalEvaluationSpec((EvaluationSplit.PERSONAL,), ())
        assert found.seed == 0

    def test_splits_keep_their_order_and_novel_classes_that_of_their_labels(self):
        splits = tuple(reversed(EvaluationSplit))
        spec = local_spec(evaluation=LocalEvaluationSpec(splits, ("zebra", "ant")), seed=2**63 - 1)
        message = local_spec_to_pb(spec)
        assert list(message.evaluation.novel_class_names) == ["zebra", "ant"]
        assert [task_pb.EvaluationSplit.Name(number) for number in message.evaluation.splits] == [
            f"EVALUATION_SPLIT_{name}" for name in ("DOMAIN", "NOVEL", "BASE", "PERSONAL")
        ]
        assert local_spec_from_pb(message) == spec

    def test_the_seed_of_the_experiment_is_that_of_its_silos(self):
        message = experiment_spec_to_pb(experiment_spec(seed=2**63 - 1))
        assert message.seed == message.local.seed == 2**63 - 1
        message.local.seed = 3
        message.seed = 2**63 - 2
        assert experiment_spec_from_pb(message).local.seed == 2**63 - 2

    def test_a_seed_of_64_bits_is_no_seed_of_an_experiment(self):
        message = experiment_spec_to_pb(experiment_spec())
        message.seed = 2**64 - 1
        with pytest.raises(SpecError, match="seed must be between 0 and"):
            experiment_spec_from_pb(message)


def test_a_training_of_a_version_without_views_has_none():
    message = local_spec_to_pb(replace(local_spec(), training=TrainingSpec(views=3)))
    assert local_spec_from_pb(message).training.views == 3
    message.training.ClearField("view_count")
    assert local_spec_from_pb(message) == local_spec()
    assert local_spec_to_pb(local_spec()) == message


def offer_message():
    manifest, _ = payload()
    return response_to_pb(TaskOffer(task("t1"), manifest))


OFFER_SPOILERS = {
    "unknown kind": lambda offer: setattr(offer, "kind", UNKNOWN),
    "no kind": lambda offer: offer.ClearField("kind"),
    "unknown schedule": lambda offer: setattr(offer.local.training, "schedule", UNKNOWN),
    "unknown precision": lambda offer: setattr(offer.local.training, "precision", UNKNOWN),
    "too many views": lambda offer: setattr(offer.local.training, "view_count", 10_001),
    "unknown optimizer": lambda offer: setattr(offer.local.training.optimizer, "algorithm", UNKNOWN),
    "unknown split": lambda offer: offer.local.evaluation.splits.append(UNKNOWN),
    "the same split twice": lambda offer: offer.local.evaluation.splits.extend([task_pb.EVALUATION_SPLIT_BASE] * 2),
    "novel split without names": lambda offer: offer.local.evaluation.splits.append(task_pb.EVALUATION_SPLIT_NOVEL),
    "novel names without the split": lambda offer: offer.local.evaluation.novel_class_names.append("fox"),
    "a novel class that is trained": lambda offer: offer.local.evaluation.MergeFrom(
        task_pb.LocalEvaluationSpec(splits=[task_pb.EVALUATION_SPLIT_NOVEL], novel_class_names=["cat"])
    ),
    "a seed of 64 bits": lambda offer: setattr(offer.local, "seed", 2**63),
    "unknown element type": lambda offer: setattr(offer.shared_tensors.tensors[0], "element_type", UNKNOWN),
    "no spec": lambda offer: offer.ClearField("local"),
    "no learning rate": lambda offer: offer.local.training.optimizer.ClearField("learning_rate"),
    "short weights digest": lambda offer: setattr(offer.local.model, "weights_sha256", b"short"),
    "hyper-parameters not JSON": lambda offer: setattr(offer.local.method, "hyperparameters_json", "{"),
    "deep hyper-parameters": lambda offer: setattr(offer.local.method, "hyperparameters_json", "[" * 100_000),
    "no experiment": lambda offer: offer.ClearField("experiment_id"),
    "wrong byte count": lambda offer: setattr(offer.shared_tensors, "byte_count", 3),
    "tensors to initialize": lambda offer: setattr(offer, "kind", task_pb.TASK_KIND_INITIALIZE),
}


@pytest.mark.parametrize("spoil", OFFER_SPOILERS.values(), ids=OFFER_SPOILERS)
def test_an_offer_that_means_nothing_to_us_is_unreadable_and_keeps_its_task_id(spoil):
    message = offer_message()
    spoil(message.task_offer)
    frame = response_from_pb(message)
    assert isinstance(frame, UnreadableOffer)
    assert frame.task_id == "t1"
    assert frame.message


def test_the_message_of_an_unreadable_offer_fits_the_refusal_that_quotes_it():
    message = offer_message()
    message.task_offer.local.class_names.append("c" * 5000)
    frame = response_from_pb(message)
    assert isinstance(frame, UnreadableOffer)
    assert TaskReply(frame.task_id, RefusalReason.METHOD_MISMATCH, frame.message)


def test_an_offer_without_a_usable_id_cannot_be_refused_and_is_an_error():
    message = offer_message()
    message.task_offer.task_id = "x" * 201
    with pytest.raises(PayloadError, match="an id has 201 characters"):
        response_from_pb(message)


def result_message():
    manifest, _ = payload()
    return request_to_pb(TaskResult(Result("t1", Success(3, {"loss": 0.5}, 1.0), manifest)))


def without_outcome(result):
    result.ClearField("outcome")


RESULT_SPOILERS = {
    "no outcome": without_outcome,
    "unknown element type": lambda result: setattr(result.success.shared_tensors.tensors[0], "element_type", UNKNOWN),
    "wrong byte count": lambda result: setattr(result.success.shared_tensors, "byte_count", 3),
    "too many metrics": lambda result: result.success.metrics.update({f"m{number}": 0.0 for number in range(257)}),
}


@pytest.mark.parametrize("spoil", RESULT_SPOILERS.values(), ids=RESULT_SPOILERS)
def test_a_result_that_contradicts_itself_is_unreadable_and_keeps_its_task_id(spoil):
    message = result_message()
    spoil(message.task_result)
    frame = request_from_pb(message)
    assert isinstance(frame, UnreadableResult)
    assert frame.task_id == "t1"
    assert frame.message


def refusal_of(reason):
    return Request(task_reply=task_pb.TaskReply(task_id="t", refusal=task_pb.TaskRefusal(reason=reason)))


def test_reasons_and_states_that_a_later_version_may_add_are_understood_as_the_nearest_known_one():
    assert request_from_pb(refusal_of(UNKNOWN)) == TaskReply("t", RefusalReason.POLICY)
    hello = session_pb.Hello(held_tasks=[session_pb.HeldTask(task_id="t", state=UNKNOWN)])
    assert request_from_pb(Request(hello=hello)).held_tasks == (HeldTask("t", HeldState.RUNNING),)
    failed = task_pb.TaskResult(task_id="t", failure=task_pb.TaskFailure(reason=UNKNOWN, message="new"))
    outcome = request_from_pb(Request(task_result=failed)).result.outcome
    assert outcome == Failure(FailureReason.INTERNAL, "new")


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (Request(task_reply=task_pb.TaskReply(task_id="t")), "a task reply holds no answer"),
        (Request(task_progress=task_pb.TaskProgress()), "an id has 0 characters"),
        (Request(hello=session_pb.Hello(methods=["m"] * 101)), "names in Hello has 101 items; allowed are 100"),
        (
            Request(hello=session_pb.Hello(resources=session_pb.Resources(device="d" * 129))),
            "a name in Hello has 129 characters; allowed are 128",
        ),
        (Request(payload_chunk=tensor_pb.PayloadChunk(payload_id="p")), "a chunk has 0 bytes"),
        (
            Request(payload_chunk=tensor_pb.PayloadChunk(payload_id="p", data=b"x" * (256 * 1024 + 1))),
            "a chunk has 262145 bytes",
        ),
        (Request(drain=session_pb.Drain(message="d" * 2001)), "a text has 2001 characters"),
    ],
)
def test_a_frame_of_a_silo_that_means_nothing_is_an_error(message, complaint):
    with pytest.raises(PayloadError, match=complaint):
        request_from_pb(message)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (Response(result_ack=task_pb.ResultAck(task_id="", verdict=UNKNOWN)), "an id has 0 characters"),
        (Response(task_cancel=task_pb.TaskCancel(task_id="a\nb")), "an id has 3 characters; .*, all printable"),
        (Response(welcome=session_pb.Welcome(session_id="s")), "heartbeat interval must be positive"),
        (
            Response(
                welcome=session_pb.Welcome(
                    session_id="s", heartbeat_interval=Duration(seconds=5), silence_limit=Duration(seconds=5)
                )
            ),
            "below the silence limit",
        ),
    ],
)
def test_a_frame_of_the_coordinator_that_means_nothing_is_an_error(message, complaint):
    with pytest.raises(PayloadError, match=complaint):
        response_from_pb(message)


def test_a_long_message_of_a_cancellation_is_cut_instead_of_ending_the_session():
    frame = response_from_pb(Response(task_cancel=task_pb.TaskCancel(task_id="t", message="m" * 5000)))
    assert len(frame.message) == 2000


def test_a_manifest_of_a_million_tensors_is_refused_before_any_of_them_is_read():
    header = tensor_pb.TensorHeader(name="", element_type=UNKNOWN)
    message = tensor_pb.PayloadManifest(payload_id="p", tensors=[header] * 1_000_000)
    with pytest.raises(PayloadError, match="a manifest has 1000000 tensors; allowed are 1 to 1024"):
        manifest_from_pb(message)


def reads_or_complains(parse, decode, data):
    """Only errors with an owner may leave; None and frames are fine."""
    with contextlib.suppress(DecodeError, PayloadError, SpecError):
        decode(parse(data))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_unexpected(data):
    reads_or_complains(Request.FromString, request_from_pb, data)
    reads_or_complains(Response.FromString, response_from_pb, data)


@given(
    st.one_of(fedrt_st.silo_frames.map(request_to_pb), fedrt_st.coordinator_frames.map(response_to_pb)),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3)), min_size=1, max_size=4),
)
def test_damaged_frames_raise_nothing_unexpected(message, damages):
    data = bytearray(message.SerializeToString())
    for place, replacement in damages:
        start = place % (len(data) + 1)
        data[start : start + 2] = replacement
    reads_or_complains(Request.FromString, request_from_pb, bytes(data))
    reads_or_complains(Response.FromString, response_from_pb, bytes(data))


def test_every_kind_of_task_has_a_number_on_the_wire():
    for kind in TaskKind:
        frame = TaskOffer(task("t", kind), None)
        assert response_from_pb(response_to_pb(frame)) == frame


MANY = 300_000  # items of one or two bytes: more than a list may have, and no more than a message may have


def many_tasks():
    return Request(hello=session_pb.Hello(held_tasks=[session_pb.HeldTask()] * MANY))


def many_names(field):
    return Request(hello=session_pb.Hello(**{field: [""] * MANY}))


@pytest.mark.parametrize("message", [many_tasks(), many_names("methods"), many_names("capabilities")])
def test_a_long_list_is_refused_before_anything_is_made_of_its_items(message):
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match=f"has {MANY} items"):
            request_from_pb(message)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_the_extents_of_a_tensor_are_counted_before_they_are_read():
    message = result_message()
    message.task_result.success.shared_tensors.tensors[0].shape.extend([1] * MANY)
    frame = request_from_pb(message)
    assert isinstance(frame, UnreadableResult)
    assert re.search(r"a shape has \d+ items; allowed are 8", frame.message)


def test_a_metric_with_an_endless_name_makes_a_result_unreadable():
    message = result_message()
    message.task_result.success.metrics["m" * 129] = 1.0
    assert request_from_pb(message) == UnreadableResult("t1", "a metric name has 129 characters; allowed are 128", "p1")


def test_an_unreadable_result_keeps_no_endless_id():
    message = result_message()
    message.task_result.success.shared_tensors.payload_id = "p" * 201
    with pytest.raises(PayloadError, match="a payload id has 201 characters"):
        request_from_pb(message)


def test_a_chunk_does_not_name_an_endless_payload():
    with pytest.raises(PayloadError, match="a payload id has 201 characters"):
        request_from_pb(Request(payload_chunk=tensor_pb.PayloadChunk(payload_id="p" * 201, data=b"x")))
