"""Experiments: golden transcripts, stages, and random histories that crash anywhere."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from coordinator import rounds
from coordinator.experiments import (
    CancelOrdered,
    CloseRound,
    Experiment,
    ExperimentState,
    SilosChanged,
    Stage,
    create,
    next_stage,
    offers_on_connect,
    resume,
    step,
    task_id_of,
    task_seed,
)
from coordinator.rounds import (
    Aggregate,
    Aggregated,
    AskState,
    Cancel,
    Offer,
    Refused,
    ResultFailed,
    ResultStored,
    RoundPhase,
    Settle,
    Tick,
    Withdrawn,
)
from coordinator.selection import Population
from fedrt.errors import SpecError
from fedrt.spec import OnTooFew
from fedrt.task import RefusalReason, TaskKind, Verdict
from tests.coordinator.transcript import replay
from tests.samples import FROM_NOISE, FROM_WORDS, experiment_spec

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("*.txt"))
EXPERIMENT: TypeAdapter[Experiment] = TypeAdapter(Experiment)
EVERYBODY = frozenset({"north", "south", "west"})
ALL_THERE = Population(EVERYBODY, EVERYBODY)
NOBODY_THERE = Population(EVERYBODY, frozenset())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_transcript(path, rewrite_golden):
    now = replay(path)
    if rewrite_golden:
        path.write_text(now)
    assert now == path.read_text()


def test_there_are_golden_transcripts():
    assert len(GOLDEN) >= 10


# Stages


def naive_stages(count, every, needs_clip):
    stages = [(TaskKind.INITIALIZE, 0)] if needs_clip else []
    if every or not count:
        stages.append((TaskKind.EVALUATE, 0))
    for number in range(1, count + 1):
        stages.append((TaskKind.TRAIN, number))
        if number == count or (every and number % every == 0):
            stages.append((TaskKind.EVALUATE, number))
    return stages


@given(st.integers(0, 8), st.integers(0, 9), st.booleans())
def test_stages_follow_each_other_as_in_a_plain_list(count, every, needs_clip):
    spec = experiment_spec(count, every, FROM_WORDS if needs_clip else FROM_NOISE)
    stages, stage = [], create("e1", spec, "", 0.0).stage
    while stage is not None:
        stages.append((stage.kind, stage.number))
        stage = next_stage(spec, stage)
    assert stages == naive_stages(count, every, needs_clip)


def test_words_that_a_private_tensor_starts_from_need_no_stage():
    """Every silo computes its own private tensors, in the round in which it first takes part."""
    spec = experiment_spec(2, 0, FROM_WORDS)
    private = dataclasses.replace(spec, local=dataclasses.replace(spec.local, method_name="coop"))
    assert create("e1", spec, "", 0.0).stage == Stage(TaskKind.INITIALIZE, 0)
    assert create("e1", private, "", 0.0).stage == Stage(TaskKind.TRAIN, 1)


def test_a_stage_after_a_retry_starts_with_the_first_attempt():
    assert next_stage(experiment_spec(2), Stage(TaskKind.TRAIN, 1, attempt=2)) == Stage(TaskKind.EVALUATE, 1)


def test_an_experiment_with_an_unknown_method_is_not_created():
    spec = experiment_spec()
    unknown = dataclasses.replace(spec, local=dataclasses.replace(spec.local, method_name="fedxyz"))
    with pytest.raises(SpecError, match="'fedxyz' is not installed"):
        create("e1", unknown, "", 0.0)


# Beginning, waiting and ending


def begun(now=0.0, **limits):
    experiment, effects = step(
        create("e1", experiment_spec(every=0, **limits), "", now), SilosChanged(), ALL_THERE, now
    )
    return experiment, effects


def test_a_round_begins_the_moment_the_previous_one_is_committed():
    experiment, _ = begun(count=2, min_results=1)
    for name in sorted(EVERYBODY):
        experiment, _ = step(experiment, ResultStored(f"e1/1/train/{name}"), ALL_THERE, 1.0)
    experiment, effects = step(experiment, Aggregated(), ALL_THERE, 2.0)
    assert isinstance(effects[0], CloseRound)
    assert effects[1:] == tuple(Offer(name, f"e1/2/train/{name}") for name in sorted(EVERYBODY))
    assert (experiment.round.begin_time, experiment.round.deadline) == (2.0, 102.0)


def test_an_experiment_says_whom_it_waits_for():
    pending, effects = step(create("e1", experiment_spec(), "", 0.0), SilosChanged(), NOBODY_THERE, 0.0)
    assert effects == ()
    assert pending.state is ExperimentState.PENDING
    said = "waiting for silos: 0 of 3 needed are connected; not connected: north, south, west"
    assert pending.message.startswith(said)
    running, _ = step(pending, SilosChanged(), ALL_THERE, 1.0)
    assert (running.state, running.message) == (ExperimentState.RUNNING, "")


def test_silos_that_come_and_go_do_not_touch_a_round_that_has_begun():
    experiment, _ = begun()
    assert step(experiment, SilosChanged(), NOBODY_THERE, 1.0) == (experiment, ())


def test_events_between_rounds_change_nothing():
    waiting = create("e1", experiment_spec(), "", 0.0)
    for event in (Aggregated(), ResultStored("e1/1/train/north"), Refused("x", RefusalReason.BUSY, "")):
        assert step(waiting, event, ALL_THERE, 1.0) == (waiting, ())


def test_an_evaluation_that_waited_long_enough_begins_with_whoever_is_there():
    waiting = create("e1", experiment_spec(), "", 0.0)
    one = Population(frozenset(ALL_THERE.known), frozenset({min(ALL_THERE.known)}))
    limit = waiting.spec.rounds.time_limit
    assert waiting.stage.kind is TaskKind.EVALUATE
    early, _ = step(waiting, Tick(), one, limit - 1)
    assert early.round is None
    begun_late, _ = step(early, Tick(), one, limit)
    assert [ask.silo_id for ask in begun_late.round.asks] == [min(ALL_THERE.known)]


def test_a_result_of_another_round_is_a_mistake_of_the_driver_and_changes_nothing():
    experiment, _ = begun()
    with pytest.raises(ValueError, match="task 'e1/7/train/north' does not belong to round 1"):
        step(experiment, ResultStored("e1/7/train/north"), ALL_THERE, 1.0)


def test_a_waiting_experiment_can_be_cancelled():
    cancelled, effects = step(create("e1", experiment_spec(), "", 0.0), CancelOrdered(), NOBODY_THERE, 3.0)
    assert effects == ()
    assert (cancelled.state, cancelled.end_time) == (ExperimentState.CANCELLED, 3.0)
    assert cancelled.message == "cancelled by an operator"


def test_an_experiment_cancelled_while_aggregating_closes_its_round_as_failed():
    experiment, _ = begun(min_results=1)
    for name in EVERYBODY:
        experiment, _ = step(experiment, ResultStored(f"e1/1/train/{name}"), ALL_THERE, 1.0)
    cancelled, (close,) = step(experiment, CancelOrdered(), ALL_THERE, 2.0)
    assert not close.round.succeeded
    assert step(cancelled, Aggregated(), ALL_THERE, 3.0) == (cancelled, ())


def test_an_experiment_that_fails_on_too_few_does_not_retry():
    experiment, _ = begun(on_too_few=OnTooFew.FAIL, retries=5)
    doomed, _ = step(experiment, ResultFailed("e1/1/train/north", "broken"), ALL_THERE, 1.0)
    failed, _ = step(doomed, Tick(), ALL_THERE, 1.0 + rounds.LOST_GRACE)
    assert failed.state is ExperimentState.FAILED
    assert failed.message.startswith("round 1 (train) got 0 of the 3 results it needs: north: broken")


def test_a_retry_keeps_the_results_that_are_here_and_asks_only_the_others():
    """Or a silo's private tensors would advance twice in one round."""
    experiment, _ = begun(on_too_few=OnTooFew.RETRY, retries=1)
    assert not experiment.spec.rounds.min_results
    for event in (ResultStored("e1/1/train/north"), ResultStored("e1/1/train/west")):
        experiment, _ = step(experiment, event, ALL_THERE, 1.0)
    gone = Population(ALL_THERE.known, frozenset({"south"}))
    again, effects = step(experiment, ResultFailed("e1/1/train/south", "out of memory"), gone, 2.0)
    assert [effect for effect in effects if isinstance(effect, Offer)] == [Offer("south", "e1/1/train-1/south")]
    assert {ask.task_id: ask.state.value for ask in again.round.asks} == {
        "e1/1/train/north": "returned",
        "e1/1/train/west": "returned",
        "e1/1/train-1/south": "offered",
    }
    done, effects = step(again, ResultStored("e1/1/train-1/south"), gone, 3.0)
    assert effects[-1] == Aggregate(("e1/1/train/north", "e1/1/train/west", "e1/1/train-1/south"))
    assert done.round.attempt == 1


def test_a_failed_aggregation_is_not_tried_again():
    experiment, _ = begun(on_too_few=OnTooFew.RETRY, retries=5)
    for silo in ("north", "south", "west"):
        experiment, _ = step(experiment, ResultStored(f"e1/1/train/{silo}"), ALL_THERE, 1.0)
    failed, _ = step(experiment, Withdrawn("aggregation failed: KeyError: 'x'"), ALL_THERE, 2.0)
    assert failed.state is ExperimentState.FAILED
    assert failed.message == "round 1 (train): aggregation failed: KeyError: 'x'"


def first_asked(experiment):
    return {ask.silo_id for ask in experiment.round.asks}


def test_a_retry_does_not_insist_on_the_silo_that_failed_to_initialize():
    """Or one silo whose policy refuses would end an experiment that all others can run."""
    for seed in range(10):
        spec = experiment_spec(hyperparameters=FROM_WORDS, seed=seed, on_too_few=OnTooFew.RETRY, retries=1)
        first, _ = step(create("e1", spec, "", 0.0), SilosChanged(), ALL_THERE, 0.0)
        (ask,) = first.round.asks
        second, _ = step(first, Refused(ask.task_id, RefusalReason.POLICY, "no"), ALL_THERE, 1.0)
        assert first_asked(second) != first_asked(first)


def test_a_restart_gives_what_is_waited_for_its_time_again():
    experiment, _ = begun(on_too_few=OnTooFew.RETRY)
    later = resume(experiment, 5000.0)
    assert later.round.deadline == 5100.0
    assert replace(later, stage_time=experiment.stage_time, round=experiment.round) == experiment
    doomed, _ = step(experiment, ResultFailed("e1/1/train/north", "broken"), ALL_THERE, 1.0)
    assert resume(doomed, 5000.0).round.lost_time == 5000.0
    waiting = create("e1", experiment_spec(), "", 0.0)
    assert resume(waiting, 5000.0) == replace(waiting, stage_time=5000.0)
    assert resume(experiment, -86_400.0).round.deadline == -86_300.0
    busy, _ = step(experiment, Refused("e1/1/train/north", RefusalReason.BUSY, "later"), ALL_THERE, 1.0)
    assert rounds.next_tick(resume(busy, 86_400.0).round) == 86_500.0


def test_failures_are_answered_with_ever_longer_pauses():
    experiment, _ = begun(on_too_few=OnTooFew.RETRY, retries=9, silos=("north", "south"))
    now, pauses = 0.0, []
    experiment, _ = step(experiment, ResultStored("e1/1/train/north"), ALL_THERE, now)
    for _ in range(9):
        (ask,) = (ask for ask in experiment.round.asks if ask.silo_id == "south")
        experiment, effects = step(experiment, ResultFailed(ask.task_id, "no disk"), ALL_THERE, now)
        (ask,) = (ask for ask in experiment.round.asks if ask.silo_id == "south")
        assert (Offer("south", ask.task_id) in effects) == (ask.reoffer_time is None)
        pauses.append(0.0 if ask.reoffer_time is None else ask.reoffer_time - now)
        now += pauses[-1]
        experiment, _ = step(experiment, Tick(), ALL_THERE, now)
    assert pauses == [0.0, 10.0, 30.0, 60.0, 120.0, 300.0, 300.0, 300.0, 300.0]


def test_a_silo_that_is_away_excuses_an_attempt_but_not_one_in_which_another_failed():
    """Or a silo that always fails would be asked without end while another one is away."""
    experiment, _ = begun(on_too_few=OnTooFew.RETRY, retries=1, silos=("north", "south"))
    only_south = Population(ALL_THERE.known, frozenset({"south"}))
    for number in range(1, 4):
        experiment, _ = step(experiment, Tick(), only_south, 100.0 * number)
        assert (experiment.round.attempt, experiment.stage.retries) == (number, 0)
    for number in (4, 5):
        task_id = next(ask.task_id for ask in experiment.round.asks if ask.silo_id == "south")
        now = 300.0 + 10 * number
        experiment, _ = step(experiment, ResultFailed(task_id, "broken"), only_south, now)
        experiment, _ = step(experiment, Tick(), only_south, now + rounds.LOST_GRACE)
    assert experiment.state is ExperimentState.FAILED


def test_a_silo_that_is_late_and_then_gives_up_uses_up_one_retry():
    """It stops work at its own time limit, which it counts from the moment the offer arrived: just after ours."""
    experiment, _ = begun(on_too_few=OnTooFew.RETRY, retries=2, silos=("north", "south"))
    experiment, _ = step(experiment, ResultStored("e1/1/train/north"), ALL_THERE, 1.0)
    now = 0.0
    for number in (1, 2, 3):
        (ask,) = (ask for ask in experiment.round.asks if ask.silo_id == "south")
        now = experiment.round.deadline
        experiment, _ = step(experiment, Tick(), ALL_THERE, now)
        if number <= 2:
            assert experiment.stage.retries == number
            experiment, _ = step(experiment, ResultFailed(ask.task_id, "too long"), ALL_THERE, now + 0.1)
            assert experiment.stage.retries == number
            experiment, _ = step(experiment, Tick(), ALL_THERE, now + 20.0)
    assert experiment.state is ExperimentState.FAILED


def test_the_failure_of_a_silo_that_was_late_is_forgiven_once():
    """Nor does it excuse the failure of another."""
    experiment, _ = begun(on_too_few=OnTooFew.RETRY, retries=5, silos=("north", "south"))
    late, _ = step(experiment, Tick(), ALL_THERE, 100.0)
    assert (late.stage.retries, late.stage.late) == (1, frozenset({"north", "south"}))
    failed, _ = step(late, ResultFailed("e1/1/train/south", "too long"), ALL_THERE, 101.0)
    failed, _ = step(failed, Tick(), ALL_THERE, 101.0 + rounds.LOST_GRACE)
    assert (failed.stage.retries, failed.stage.late) == (1, frozenset())
    again, _ = step(failed, ResultFailed("e1/1/train/north", "too long"), ALL_THERE, 104.0)
    again, _ = step(again, Tick(), ALL_THERE, 104.0 + rounds.LOST_GRACE)
    assert again.stage.retries == 2
    only_south = Population(ALL_THERE.known, frozenset({"south"}))
    away, _ = step(experiment, Tick(), only_south, 100.0)
    assert (away.stage.retries, away.stage.late) == (0, frozenset())


PAIR = Population(frozenset({"north", "south"}), frozenset({"north", "south"}))


def test_a_retry_does_not_wait_for_a_silo_that_came_and_left_meanwhile():
    """Or what others are at would be cancelled, and thrown away when it comes."""
    spec = experiment_spec(every=0, on_too_few=OnTooFew.RETRY, retries=1)
    experiment, _ = step(create("e1", spec, "", 0.0), SilosChanged(), PAIR, 0.0)
    experiment, _ = step(experiment, ResultStored("e1/1/train/north"), PAIR, 1.0)
    visited = Population(EVERYBODY, PAIR.available)
    again, effects = step(experiment, Tick(), visited, 100.0)
    assert {ask.task_id: ask.state.value for ask in again.round.asks} == {
        "e1/1/train/north": "returned",
        "e1/1/train/south": "offered",
    }
    assert not any(isinstance(effect, Cancel) for effect in effects)
    assert again.round.absent == (("west", "not connected"),)
    assert step(again, ResultStored("e1/1/train/south"), visited, 101.0)[0].round.phase is RoundPhase.AGGREGATING


def test_a_retry_needs_the_silo_that_failed_also_while_it_is_away():
    experiment, _ = begun(on_too_few=OnTooFew.RETRY, retries=1)
    for silo in ("north", "west"):
        experiment, _ = step(experiment, ResultStored(f"e1/1/train/{silo}"), ALL_THERE, 1.0)
    nobody = Population(EVERYBODY, frozenset())
    again, _ = step(experiment, ResultFailed("e1/1/train/south", "broken"), nobody, 2.0)
    assert again.round.needed == 3
    assert rounds.open_tasks(again.round) == {"e1/1/train-1/south"}


def test_a_silo_that_was_away_and_fails_when_it_is_back_fails_like_any_other():
    experiment, _ = begun(on_too_few=OnTooFew.RETRY, retries=2, min_results=3)
    experiment, _ = step(experiment, ResultFailed("e1/1/train/north", "broken"), ALL_THERE, 1.0)
    without_south = Population(EVERYBODY, frozenset({"north", "west"}))
    again, _ = step(experiment, Tick(), without_south, 1.0 + rounds.LOST_GRACE)
    again, _ = step(again, ResultStored("e1/1/train-1/north"), without_south, 5.0)
    late, _ = step(again, Tick(), without_south, again.round.deadline)
    assert (late.stage.retries, late.stage.late) == (1, frozenset())
    failed, effects = step(late, ResultFailed("e1/1/train/south", "no disk"), ALL_THERE, 300.0)
    assert not any(isinstance(effect, CloseRound) for effect in effects)
    failed, effects = step(failed, Tick(), ALL_THERE, 300.0 + rounds.LOST_GRACE)
    (close,) = (effect for effect in effects if isinstance(effect, CloseRound))
    assert ("south", "no disk") in rounds.absentees(close.round)
    assert {conduct.silo_id: conduct.failures for conduct in failed.conducts}["south"] == 1
    assert failed.stage.retries == 2


def test_a_failure_charges_no_silo_that_was_away():
    experiment, _ = begun(on_too_few=OnTooFew.RETRY, retries=2)
    experiment, _ = step(experiment, Tick(), Population(EVERYBODY, frozenset({"north"})), 100.0)
    failed, _ = step(experiment, ResultFailed("e1/1/train/north", "broken"), NOBODY_THERE, 199.0)
    failed, _ = step(failed, Tick(), NOBODY_THERE, 200.0)
    assert (failed.stage.retries, failed.stage.failed, failed.stage.late) == (1, frozenset({"north"}), frozenset())


def test_a_retry_asks_no_more_silos_than_the_experiment_wants():
    """Whomever the draw names: those whose work is kept count."""
    for seed in range(20):
        spec = experiment_spec(every=0, seed=seed, max_silos=2, on_too_few=OnTooFew.RETRY, retries=1)
        first, _ = step(create("e1", spec, "", 0.0), SilosChanged(), ALL_THERE, 0.0)
        one, other = (ask.task_id for ask in first.round.asks)
        first, _ = step(first, ResultStored(one), ALL_THERE, 1.0)
        second, _ = step(first, ResultFailed(other, "broken"), ALL_THERE, 2.0)
        assert [ask.state for ask in second.round.asks] == [AskState.RETURNED, AskState.OFFERED]


def test_a_silo_whose_open_task_is_kept_is_not_set_aside_in_that_round():
    """It would be asked and named as absent at once."""
    four = Population(EVERYBODY | {"east"}, EVERYBODY | {"east"})
    rules = {"on_too_few": OnTooFew.RETRY, "retries": 1, "min_results": 2, "set_aside_after": 1}
    experiment, _ = step(create("e1", experiment_spec(every=0, **rules), "", 0.0), SilosChanged(), four, 0.0)
    experiment, _ = step(experiment, ResultStored("e1/1/train/north"), four, 1.0)
    experiment, _ = step(experiment, ResultFailed("e1/1/train/south", "broken"), four, 1.0)
    east_away = Population(four.known, EVERYBODY)
    again, _ = step(experiment, Tick(), east_away, 100.0)
    assert {conduct.silo_id for conduct in again.conducts if conduct.aside_until} == {"south", "west"}
    assert {ask.silo_id for ask in again.round.asks} == {"north", "east", "west"}
    assert [silo for silo, _ in again.round.absent] == ["south"]


@pytest.mark.parametrize("silos", [(), ("north", "south")])
def test_an_evaluation_that_is_tried_again_keeps_what_is_under_way_and_waits_for_nobody(silos):
    spec = experiment_spec(on_too_few=OnTooFew.RETRY, retries=1, silos=silos)
    experiment, _ = step(create("e1", spec, "", 0.0), SilosChanged(), PAIR, 0.0)
    experiment, _ = step(experiment, ResultFailed("e1/0/evaluate/south", "broken"), PAIR, 1.0)
    only_north = Population(PAIR.known, frozenset({"north"}))
    again, effects = step(experiment, Tick(), only_north, 100.0)
    assert [(ask.task_id, ask.state) for ask in again.round.asks] == [("e1/0/evaluate/north", AskState.OFFERED)]
    assert not any(isinstance(effect, Cancel) for effect in effects)
    assert again.round.absent == (("south", "not connected"),)


def test_an_initialization_that_nobody_answers_is_given_to_another_silo_and_cancelled():
    for seed in range(10):
        spec = experiment_spec(hyperparameters=FROM_WORDS, seed=seed, on_too_few=OnTooFew.RETRY, retries=1)
        first, _ = step(create("e1", spec, "", 0.0), SilosChanged(), ALL_THERE, 0.0)
        (ask,) = first.round.asks
        second, effects = step(first, Tick(), ALL_THERE, 100.0)
        assert any(isinstance(effect, Cancel) and effect.task_id == ask.task_id for effect in effects)
        assert second.round.ask(ask.task_id) is None


# Names and seeds of tasks


def test_task_ids_tell_experiments_stages_attempts_and_silos_apart():
    stages = [Stage(kind, number, attempt) for kind in TaskKind for number in (0, 1, 11) for attempt in (0, 1)]
    names = {task_id_of(name, stage, silo) for name in ("e1", "e11") for stage in stages for silo in ("a", "a-1")}
    assert len(names) == 2 * len(stages) * 2


def test_task_seeds_depend_on_seed_round_silo_and_kind_and_fit_63_bits():
    experiment, _ = begun()
    round_ = experiment.round
    other_run = dataclasses.replace(experiment, spec=experiment_spec(seed=2))
    seeds = [
        task_seed(experiment, round_, "north"),
        task_seed(experiment, round_, "south"),
        task_seed(experiment, dataclasses.replace(round_, number=2), "north"),
        task_seed(experiment, dataclasses.replace(round_, kind=TaskKind.EVALUATE), "north"),
        task_seed(other_run, round_, "north"),
    ]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_retry_and_a_second_experiment_of_the_same_spec_draw_the_same_seeds():
    experiment, _ = begun()
    renamed = dataclasses.replace(experiment, experiment_id="e2")
    again = dataclasses.replace(experiment.round, attempt=1, begin_time=99.0)
    assert task_seed(experiment, experiment.round, "north") == task_seed(renamed, again, "north")


# Offers on connect


def test_a_silo_is_offered_its_open_asks_less_what_it_holds():
    experiment, _ = begun()
    offer = Offer("north", "e1/1/train/north")
    assert offers_on_connect(experiment, "north", frozenset()) == (offer,)
    assert offers_on_connect(experiment, "north", frozenset({"e1/1/train/north"})) == ()
    assert offers_on_connect(experiment, "stranger", frozenset()) == ()
    returned, _ = step(experiment, ResultStored("e1/1/train/north"), ALL_THERE, 1.0)
    assert offers_on_connect(returned, "north", frozenset()) == ()


def test_nothing_is_offered_on_connect_between_rounds_or_while_aggregating():
    assert offers_on_connect(create("e1", experiment_spec(), "", 0.0), "north", frozenset()) == ()
    experiment, _ = begun(min_results=1)
    for name in EVERYBODY:
        experiment, _ = step(experiment, ResultStored(f"e1/1/train/{name}"), ALL_THERE, 1.0)
    assert experiment.round.phase is RoundPhase.AGGREGATING
    assert offers_on_connect(experiment, "north", frozenset()) == ()


# Random histories

SILOS = ("a", "b", "c", "d")
RARE = ("fail", "invalid", "busy", "draining", "policy", "tick", "late", "disconnect", "cancel")
ACTIONS = (*RARE, *["result"] * 4, *["aggregated"] * 2, *["connect"] * 2)
histories = st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from(SILOS), st.integers(0, 30)), max_size=80)
specs = st.builds(
    experiment_spec,
    count=st.integers(0, 3),
    every=st.integers(0, 2),
    hyperparameters=st.sampled_from([FROM_NOISE, FROM_NOISE, FROM_WORDS]),
    min_results=st.none() | st.integers(1, 2),
    max_silos=st.none() | st.integers(2, 4),
    silos=st.sampled_from([(), ("a", "b"), SILOS]),
    on_too_few=st.sampled_from(OnTooFew),
    retries=st.integers(0, 2),
    set_aside_after=st.integers(0, 2),
    set_aside_rounds=st.integers(0, 2),
)
specs |= specs.filter(lambda spec: spec.rounds.max_silos is not None).map(
    lambda spec: replace(spec, rounds=replace(spec.rounds, over_selection=1))
)


class Run:
    """A driver that keeps the state as JSON only and checks, at every step, what must always hold."""

    def __init__(self, spec):
        self.experiment = create("e1", spec, "ab" * 32, 0.0)
        self.now, self.known, self.up = 0.0, set(), set()
        self.accepted, self.stored, self.aggregated, self.closed = [], set(), set(), []

    def act(self, action, silo, seconds):
        self.now += seconds
        task_id = f"e1/9/train/{silo}"
        if self.experiment.round is not None:
            ask = next((ask for ask in self.experiment.round.asks if ask.silo_id == silo), None)
            if ask is None and action in {"result", "fail", "invalid"}:
                return
            task_id = ask.task_id if ask else task_id
        match action:
            case "result":
                self.step(ResultStored(task_id))
            case "fail":
                self.step(ResultFailed(task_id, "broken"))
            case "invalid":
                self.step(ResultFailed(task_id, "wrong shape", Verdict.INVALID))
            case "busy" | "draining" | "policy":
                self.step(Refused(task_id, RefusalReason(action), "no"))
            case "tick":
                self.step(Tick())
            case "late":
                self.now += 100.0
                self.step(Tick())
            case "aggregated":
                self.step(Aggregated())
            case "cancel" if seconds == 0:
                self.step(CancelOrdered())
            case "connect":
                self.known.add(silo)
                self.up.add(silo)
                self.step(SilosChanged())
            case "disconnect":
                self.up.discard(silo)
                self.step(SilosChanged())

    def step(self, event):
        before, population = self.experiment, Population(frozenset(self.known), frozenset(self.up))
        after, effects = step(before, event, population, self.now)
        reloaded = EXPERIMENT.validate_json(EXPERIMENT.dump_json(before))
        assert reloaded == before
        assert step(reloaded, event, population, self.now) == (after, effects)
        self.experiment = EXPERIMENT.validate_json(EXPERIMENT.dump_json(after))
        assert self.experiment == after
        self.check(before, event, effects)

    def check(self, before, event, effects):
        after = self.experiment
        if before.state.has_ended:
            assert (after, effects) == (before, ())
        assert after.state.has_ended == (after.end_time is not None)
        assert not (after.state.has_ended and after.round)
        for effect in effects:
            match effect:
                case Settle(_, task_id, Verdict.ACCEPTED):
                    assert event.task_id == task_id
                    self.accepted.append(task_id)
                    if isinstance(event, ResultStored):
                        self.stored.add(task_id)
                case Aggregate(task_ids):
                    self.check_aggregate(after.round, task_ids)
                case Offer(silo_id, task_id):
                    ask = after.round.ask(task_id)
                    assert (ask.silo_id, ask.state) == (silo_id, AskState.OFFERED)
                case Cancel(_, task_id):
                    assert before.round.ask(task_id).state is AskState.OFFERED
                    assert after.round is None or task_id not in rounds.open_tasks(after.round)
                case CloseRound(round_):
                    assert round_.phase is RoundPhase.CLOSED
                    assert all(ask.state is not AskState.OFFERED for ask in round_.asks)
                    self.closed.append(round_)

    def check_aggregate(self, round_, task_ids):
        attempt = (round_.kind, round_.number, round_.attempt)
        assert attempt not in self.aggregated
        self.aggregated.add(attempt)
        assert round_.phase is RoundPhase.AGGREGATING
        assert round_.kind is not TaskKind.EVALUATE
        assert len(task_ids) >= round_.needed
        assert len({task_id.rpartition("/")[2] for task_id in task_ids}) == len(task_ids)  # each silo once
        assert set(task_ids) == {ask.task_id for ask in round_.asks} & self.stored
        assert rounds.resume(round_) == (Aggregate(task_ids),)

    def finish(self):
        """Everybody comes, answers and is aggregated until the experiment ends."""
        for silo in SILOS:
            self.act("connect", silo, 0)
        for _ in range(200):
            if self.experiment.state.has_ended:
                return
            for silo in SILOS:
                self.act("result", silo, 1)
            self.act("aggregated", "a", 1)
        raise AssertionError("the experiment never ended")


@settings(max_examples=250)
@given(specs, histories)
def test_whatever_happens_an_experiment_keeps_its_rules(spec, history):
    run = Run(spec)
    for action, silo, seconds in history:
        run.act(action, silo, seconds)
    run.finish()

    assert len(run.accepted) == len(set(run.accepted))
    stages = naive_stages(spec.rounds.count, spec.evaluation.every, spec.local.method().context_init is not None)
    succeeded = [(round_.kind, round_.number) for round_ in run.closed if round_.succeeded]
    assert succeeded == stages[: len(succeeded)]
    assert (len(succeeded) == len(stages)) == (run.experiment.state is ExperimentState.SUCCEEDED)
    retries = spec.rounds.retries if spec.rounds.on_too_few is OnTooFew.RETRY else 0
    assert run.experiment.stage.retries <= retries
    trained = {(round_.kind, round_.number) for round_ in run.closed if round_.succeeded} - {
        stage for stage in stages if stage[0] is TaskKind.EVALUATE
    }
    assert trained <= {(kind, number) for kind, number, _ in run.aggregated}
    if run.experiment.state is ExperimentState.FAILED:
        assert run.experiment.stage.retries == retries
        assert "results it needs" in run.experiment.message


@given(st.permutations(["a", "b", "c", "d"]), st.sets(st.sampled_from(SILOS)), st.integers(1, 3))
def test_the_order_of_arrival_does_not_change_what_is_aggregated(order, failing, needed):
    found = []
    for silos in (SILOS, order):
        run = Run(experiment_spec(every=0, min_results=needed))
        for silo in SILOS:
            run.known.add(silo)
            run.up.add(silo)
        run.step(SilosChanged())
        for silo in silos:
            run.act("fail" if silo in failing else "result", silo, 0)
        round_ = run.experiment.round
        found.append((run.experiment.state, rounds.resume(round_) if round_ else None))
    assert found[0] == found[1]
    enough = len(SILOS) - len(failing) >= needed
    assert found[0][0] is (ExperimentState.RUNNING if enough else ExperimentState.FAILED)
