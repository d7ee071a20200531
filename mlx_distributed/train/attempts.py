"""What an elastic run commits one by one: to be begun here, or taken as others have taken it.

A step of a replicated or of a sharded optimizer, or, where workers train by themselves, a round of steps.
"""

from __future__ import annotations

from mlx_distributed.comm.base import Communicator, LocalComm
from mlx_distributed.comm.buckets import Arrays
from mlx_distributed.train import mirrors, rounds, sharded_attempt
from mlx_distributed.train.attempt import Attempt
from mlx_distributed.train.phases import Phases
from mlx_distributed.train.rounds import RoundAttempt
from mlx_distributed.train.sharded_attempt import ShardedAttempt
from mlx_distributed.train.state import TrainState
from mlx_distributed.train.tally import Tally

AnyAttempt = Attempt | RoundAttempt


def enter(phases: Phases, state: TrainState, comm: Communicator) -> None:
    """Make a state ready for steps in a group whose members have all taken the same ones.

    Raises:
        CommError: a peer was lost; the state can enter another group.
        TrainingError: what only some ranks had is lost.
    """
    if state.parts:
        mirrors.spread(state, phases.layout(state), comm)


def num_taken(phases: Phases, step: int) -> int:
    """How many commits have led to a state after so many steps: as many, but where rounds of steps are committed."""
    return rounds.num_taken(phases, step) if phases.config.parallel.sync == "diloco" else step


def num_steps(phases: Phases, step: int) -> int:
    """How many steps are committed at once with a step, which is the last of them."""
    return rounds.num_steps(phases, step) if phases.config.parallel.sync == "diloco" else 1


def begin(phases: Phases, state: TrainState) -> AnyAttempt:
    """The next step, or round of steps."""
    if state.inner is not None:
        return RoundAttempt(phases, state)
    return ShardedAttempt(phases, state) if state.parts else Attempt(phases, state)


def empty_sums(phases: Phases, state: TrainState, number: int) -> Arrays:
    """Arrays of the names, dtypes and shapes of the sums of a commit, counted from 0."""
    if state.inner is not None:
        return rounds.empty_sums(phases, state, number)
    sums = state.parameters | Tally.empty(len(phases.plan.microbatches(number))).part((0, 0))
    return sums | sharded_attempt.mark(skipped=False) if state.parts else sums


def replay(phases: Phases, state: TrainState, sums: Arrays) -> None:
    """Take the next step, or round, given the sums with which others have taken it; `sums` is emptied."""
    if state.inner is not None:
        rounds.replay(phases, state, sums)
    elif state.parts:
        sharded_attempt.replay(state, sums)
    else:
        phases.commit(state, state.step, phases.reduced(state, phases.work(state.step), sums), LocalComm())
