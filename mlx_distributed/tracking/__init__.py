"""What a run tells the outside: metrics.jsonl, lines or a progress bar on the console, Weights & Biases.

A tracker knows nothing of ranks; rank 0 is simply the only one that opens any.
"""

from mlx_distributed.tracking.console import ConsoleTracker
from mlx_distributed.tracking.jsonl import JsonlTracker
from mlx_distributed.tracking.tracker import Tracker, Trackers, open_tracker, open_worker_tracker
from mlx_distributed.tracking.wandb_tracker import WandbTracker, new_wandb_id

__all__ = [
    "ConsoleTracker",
    "JsonlTracker",
    "Tracker",
    "Trackers",
    "WandbTracker",
    "new_wandb_id",
    "open_tracker",
    "open_worker_tracker",
]
