"""`StepInfo`: what a step did, for whoever is told of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepInfo:
    """What a step did. Equal on every rank but for the times and the bytes."""

    step: int
    """Steps committed so far, this one included."""
    loss: float
    """Nats per label token, over all label tokens of the step."""
    num_tokens: int
    """Label tokens of the step, over all workers."""
    learning_rate: float
    grad_norm: float
    """Before clipping; of updates that workers make by themselves the largest."""
    step_s: float
    comm_s: float
    """From the first gradient that left to the last that came."""
    comm_exposed_s: float
    """Of it, what computation did not hide: what the step waited for."""
    sent_bytes: int
    """By this rank."""
    stop_requested: bool
    """Some rank wants to stop after this step."""
    skipped: str | None = None
    """Why the step left the parameters as they were."""
    num_steps: int = 1
    """Steps that this is said of, the last of which is `step`."""
    data_s: float = 0.0
    """What this rank has waited for rows since the step that was told of before."""
