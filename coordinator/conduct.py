"""How each silo has done in the training rounds of an experiment, and who is left out for it: pure functions.

A silo is to blame for a failure, a refusal, an invalid result, and for none within the time limit although connected;
not for a lost connection, nor for a round that others made impossible or that had enough results without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coordinator.rounds import AskState, Round, absentees, to_blame
from fedrt.spec import RoundsSpec


@dataclass(frozen=True)
class Conduct:
    """One silo: its failures in a row, the first round that it may take part in again, and rounds held without it."""

    silo_id: str
    failures: int = 0
    failure: str = ""  # the last
    aside_until: int = 0
    missed: int = 0
    absence: str = ""  # why, the last time


@dataclass(frozen=True)
class SetAside:
    """Tell the operator that a silo is left out of the rounds before `until_round`."""

    silo_id: str
    until_round: int
    message: str


Conducts = tuple[Conduct, ...]


def judge(conducts: Conducts, round_: Round, rules: RoundsSpec) -> tuple[Conducts, list[SetAside]]:
    """The conducts after a training round has closed, by name, and who has to be set aside."""
    known = {conduct.silo_id: conduct for conduct in conducts}
    told: list[SetAside] = []
    for ask in round_.asks:
        conduct = known.get(ask.silo_id, Conduct(ask.silo_id))
        if ask.state is AskState.RETURNED:
            known[ask.silo_id] = replace(conduct, failures=0, failure="")
        elif to_blame(round_, ask):
            conduct = replace(conduct, failures=conduct.failures + 1, failure=ask.message)
            if _can_do_without(rules) and 0 < rules.set_aside_after <= conduct.failures and rules.set_aside_rounds:
                # One more failure after that sets it aside again.
                until = round_.number + 1 + rules.set_aside_rounds
                conduct = replace(conduct, failures=rules.set_aside_after - 1, aside_until=until)
                times = f"{rules.set_aside_after} times in a row" if rules.set_aside_after > 1 else "once"
                told.append(SetAside(ask.silo_id, until, f"it failed {times}, last: {ask.message}"))
            known[ask.silo_id] = conduct
    if round_.succeeded:
        for silo_id, why in absentees(round_):
            conduct = known.get(silo_id, Conduct(silo_id))
            known[silo_id] = replace(conduct, missed=conduct.missed + 1, absence=why)
    worth_keeping = (conduct for conduct in known.values() if conduct != Conduct(conduct.silo_id))
    return tuple(sorted(worth_keeping, key=lambda conduct: conduct.silo_id)), told


def aside(conducts: Conducts, round_number: int) -> Mapping[str, str]:
    """Who is left out of a round, if it can do without them, and why."""
    return {
        conduct.silo_id: f"set aside until round {conduct.aside_until} after repeated failures, last: {conduct.failure}"
        for conduct in conducts
        if round_number < conduct.aside_until
    }


def summary(conducts: Conducts, round_count: int) -> str:
    """Who was missing in rounds that counted, for the end of an experiment; empty if nobody was."""
    missing = [
        f"{conduct.silo_id} in {conduct.missed} of {round_count} (last: {conduct.absence})"
        for conduct in conducts
        if conduct.missed
    ]
    return f"missing in training rounds: {'; '.join(missing)}" if missing else ""


def _can_do_without(rules: RoundsSpec) -> bool:
    return rules.min_results is not None or rules.max_silos is not None
