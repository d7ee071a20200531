"""Weights & Biases. The only file that imports wandb, and only when it is used: the import takes more than a second.

What is said here of wandb was measured with 0.31.0.
"""

from __future__ import annotations

import queue
import secrets
import string
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distributed.config import WandbConfig

_Job = Callable[[Any], None]


class WandbTracker:
    """One W&B run. Whatever goes wrong there, training goes on.

    wandb is called in a thread of its own: even `log_artifact` waits 20 s for a server that has gone, and meanwhile
    other workers might give this one up. The first fault is reported in one line and ends the thread: W&B is then off.

    When a run is resumed offline, wandb begins a new folder and counts its own steps from 0, so the x axis is our
    `step`. Steps that are done again after a kill appear twice. The stop button of the web page acts like Ctrl-C.

    Args:
        config: what to report to. Mode `online` gives way to the environment variable WANDB_MODE.
        run_id: from `new_wandb_id`, kept with the run, so that a resumed run goes on under the same id.
        resolved_config: shown as the configuration of the run.
        folder: wandb keeps its files in `folder/wandb`.
        notify: takes a line for people, where the run is found or what went wrong; called from the thread.
        timeout_s: how long the server may take to answer, at the start and at the end.
    """

    def __init__(
        self,
        config: WandbConfig,
        run_id: str,
        resolved_config: Mapping[str, Any],
        folder: Path,
        *,
        notify: Callable[[str], None],
        timeout_s: float = 60.0,
    ) -> None:
        self._config, self._run_id, self._resolved_config = config, run_id, resolved_config
        self._folder, self._notify, self._timeout_s = folder, notify, timeout_s
        self._jobs: queue.SimpleQueue[_Job | int] = queue.SimpleQueue()  # the last one is the exit status
        self._thread = threading.Thread(target=self._work, name="wandb-tracker", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        row = {"step": step, **metrics}
        self._put(lambda run: run.log(row))

    def message(self, text: str) -> None:
        """Not sent."""

    def rewind(self, step: int) -> None:
        """What was said stays, and is said twice then."""

    def checkpoint(self, folder: Path, step: int, aliases: Sequence[str]) -> None:
        """Sends the folder as a version of the artifact `<run id>-checkpoint`, where the configuration asks for it."""
        if self._config.log_checkpoints:
            self._put(lambda run: self._send_checkpoint(run, folder, step, list(aliases)))

    def finish(self, exit_status: int) -> None:
        """Waits until everything is sent, but no longer than twice `timeout_s`."""
        self._put(exit_status)
        self._thread.join(2 * self._timeout_s)
        if self._thread.is_alive():
            self._notify(f"warning: W&B has not taken everything in time; `wandb sync` sends {self._folder / 'wandb'}")

    def _put(self, job: _Job | int) -> None:
        if self._thread.is_alive():
            self._jobs.put(job)

    def _work(self) -> None:
        faults: list[BaseException] = []
        for stage in (self._record, _stop_service):
            try:
                stage()
            # Anything may come out of wandb, even the SystemExit with which it reports that its service process has
            # crashed, and nothing of it is worth a training run.
            except (Exception, SystemExit) as error:  # noqa: BLE001
                faults.append(error)
        if faults:
            reason = " ".join(f"{type(faults[0]).__name__}: {faults[0]}".split()).removesuffix(":")
            self._notify(f"warning: W&B is off; training goes on and metrics.jsonl has everything ({reason})")

    def _record(self) -> None:
        run = self._open()
        while not isinstance(job := self._jobs.get(), int):
            job(run)
        run.finish(exit_code=job)

    def _open(self) -> Any:
        import wandb

        config = self._config
        # Where wandb cannot make the folder, it goes to the temporary one without a word.
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            init_timeout=self._timeout_s,
            finish_timeout=self._timeout_s,
        )
        if config.mode != "online":
            settings.mode = config.mode
        # Set for the process, not for the run alone: otherwise wandb would ask on the terminal for a key, while the
        # other workers wait, and would send telemetry in offline mode too.
        wandb.setup(settings)
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name,
            group=config.group,
            tags=config.tags,
            id=self._run_id,
            resume="allow",
            reinit="create_new",
            config=dict(self._resolved_config),
            dir=str(self._folder),
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        if run.offline:
            self._notify(f"W&B is offline; `wandb sync {Path(run.dir).parent}` sends this run")
        elif not run.disabled:
            self._notify(f"W&B: {run.url}")
        return run

    def _send_checkpoint(self, run: Any, folder: Path, step: int, aliases: list[str]) -> None:
        import wandb

        # Named by the id: of two runs with one name, each would take `best` and `latest` from the other.
        artifact = wandb.Artifact(f"{self._run_id}-checkpoint", type="model", metadata={"step": step})
        try:
            artifact.add_dir(str(folder), skip_cache=True)  # copies, as the folder may be deleted before it is sent
        except (OSError, ValueError) as error:  # no room for the copy, or the folder is deleted already
            self._notify(f"warning: {folder} is not sent to W&B ({error})")
        else:
            run.log_artifact(artifact, aliases=aliases)  # not waited for: offline, that raises


def new_wandb_id() -> str:
    """Eight lower-case letters and digits, as wandb makes them itself."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _stop_service() -> None:
    import wandb

    wandb.teardown()
