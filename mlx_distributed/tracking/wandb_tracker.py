"""Weights & Biases. The only file that imports wandb, and only when it is used: the import takes more than a second.

What is said here of wandb was measured with 0.31.0.
"""

from __future__ import annotations

import json
import queue
import re
import secrets
import string
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distributed.config import WandbConfig
from mlx_distributed.config.dump import yaml_of

_Job = Callable[[Any], None]


class WandbTracker:
    """One W&B run. Whatever goes wrong there, training goes on.

    wandb is called in a thread of its own: even `log_artifact` waits 20 s for a server that has gone, and meanwhile
    other workers might give this one up. The first fault is reported in one line and ends the thread: W&B is then off.

    When a run is resumed offline, wandb begins a new folder and counts its own steps from 0, so the x axis is our
    `step`. Steps that are done again after a kill appear twice. The stop button of the web page acts like Ctrl-C.

    Home folders are sent as `~`, and nothing of what wandb finds out about the program and its arguments is.

    Args:
        config: what to report to. Mode `online` gives way to the environment variable WANDB_MODE.
        run_id: from `new_wandb_id`, kept with the run, so that a resumed run goes on under the same id.
        resolved_config: shown as the configuration of the run.
        folder: wandb keeps its files in `folder/wandb`.
        notify: takes a line for people, where the run is found or what went wrong; called from the thread.
        timeout_s: how long the server may take to answer, at the start and at the end.
        worker: name of a worker that is not rank 0. Its run is one of its own in the group, and has nothing but what
            wandb measures of the machine by itself.
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
        worker: str | None = None,
    ) -> None:
        self._config, self._run_id, self._resolved_config = config, run_id, _without_home(resolved_config)
        self._folder, self._notify, self._timeout_s, self._worker = folder, notify, timeout_s, worker
        self._all_sent = True
        self._jobs: queue.SimpleQueue[_Job | int] = queue.SimpleQueue()  # the last one is the exit status
        self._thread = threading.Thread(target=self._work, name="wandb-tracker", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        row = {"step": step, **metrics}
        self._tell(lambda run: run.log(row))

    def samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Sends a table, `eval/samples`."""
        if records:
            self._tell(lambda run: self._send_samples(run, records, step))

    def message(self, text: str) -> None:
        """Not sent."""

    def rewind(self, step: int) -> None:
        """What was said stays, and is said twice then."""

    def inputs(self, data: Mapping[str, Any]) -> None:
        """Sends the artifacts `data` and `<run id>-config`, which the run then uses."""
        data, config = _without_home(data), self._resolved_config
        name = f"{self._run_id}-config"
        self._tell(lambda run: self._send_input(run, "data", "dataset", data, "data.json", json.dumps(data, indent=2)))
        self._tell(lambda run: self._send_input(run, name, "config", {}, "config.yaml", yaml_of(config)))

    def checkpoint(self, folder: Path, step: int, aliases: Sequence[str]) -> None:
        """Sends the folder as a version of the artifact `<run id>-checkpoint`, where the configuration asks for it."""
        if self._config.log_checkpoints:
            self._tell(lambda run: self._send_model(run, "checkpoint", folder, {"step": step}, aliases))

    def final(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the folder as a version of the artifact `<run id>-final`, where the configuration asks for it."""
        if self._config.log_final:
            aliases = ["latest", "final", f"step-{step}"]
            self._tell(lambda run: self._send_model(run, "final", folder, {"step": step, **metrics}, aliases))

    def finish(self, exit_status: int) -> None:
        """Waits until everything is sent, but no longer than twice `timeout_s`."""
        self._put(exit_status)
        self._thread.join(2 * self._timeout_s)
        if self._thread.is_alive():
            self._notify(f"warning: W&B has not taken everything in time; `wandb sync` sends {self._folder / 'wandb'}")

    def _tell(self, job: _Job) -> None:
        if self._worker is None:
            self._put(job)

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
            x_disable_meta=True,
            init_timeout=self._timeout_s,
            finish_timeout=self._timeout_s,
        )
        if config.mode != "online":
            settings.mode = config.mode
        # Set for the process, not for the run alone: otherwise wandb would ask on the terminal for a key, while the
        # other workers wait, and would send telemetry in offline mode too.
        wandb.setup(settings)
        main, worker = self._worker is None, self._worker
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            id=self._run_id if main else f"{self._run_id}-{worker}",
            name=config.name if main else f"{config.name or self._run_id} {worker}",
            group=config.group or (self._run_id if config.system_metrics else None),
            job_type=config.job_type if main else "worker",
            notes=config.notes if main else None,
            tags=config.tags,
            resume="allow",
            reinit="create_new",
            config=self._resolved_config,
            dir=str(self._folder),
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        if run.offline:
            self._notify(f"W&B is offline; `wandb sync {Path(run.dir).parent}` sends this run")
        elif not run.disabled:
            self._notify(f"W&B: {run.url}")
        return run

    def _send_samples(self, run: Any, records: Sequence[Mapping[str, Any]], step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(records[0]), data=[list(record.values()) for record in records])
        run.log({"step": step, "eval/samples": table})

    def _send_input(
        self, run: Any, name: str, kind: str, metadata: Mapping[str, Any], file_name: str, text: str
    ) -> None:
        import wandb

        def send() -> None:
            artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata))
            with artifact.new_file(file_name, encoding="utf-8") as file:
                file.write(text)
            # What `use_artifact` does, but that waits for the server, and raises where the run is offline.
            run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

        self._send(file_name, send)

    def _send_model(
        self, run: Any, name: str, folder: Path, metadata: Mapping[str, float], aliases: Sequence[str]
    ) -> None:
        import wandb

        def send() -> None:
            # Named by the id: of two runs with one name, each would take `best` and `latest` from the other.
            artifact = wandb.Artifact(f"{self._run_id}-{name}", type="model", metadata=dict(metadata))
            artifact.add_dir(str(folder), skip_cache=True)  # copies, as the folder may be deleted before it is sent
            run.log_artifact(artifact, aliases=list(aliases))  # not waited for: offline, that raises

        self._send(folder, send)

    def _send(self, what: Path | str, send: Callable[[], None]) -> None:
        """Send an artifact. What speaks against it costs that one, and is told of once."""
        import wandb

        try:
            send()
        # No room for a copy, the folder is deleted already, or the project has one of that name and another type.
        except (OSError, ValueError, wandb.Error) as error:
            if self._all_sent:
                self._notify(f"warning: {what} is not sent to W&B ({error})")
            self._all_sent = False


def new_wandb_id() -> str:
    """Eight lower-case letters and digits, as wandb makes them itself."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


def _without_home(value: Any) -> Any:
    """Plain values, with `~` for a home folder at the beginning of any text: it has the name of a person."""
    if isinstance(value, Mapping):
        return {key: _without_home(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_without_home(child) for child in value]
    if not isinstance(value, str):
        return value
    mine = re.escape(str(Path("~").expanduser()))  # The configuration may come from another machine, and name others.
    return re.sub(rf"^({mine}|/home/[^/]+|/Users/[^/]+)(?=/|$)", "~", value)


def _stop_service() -> None:
    import wandb

    wandb.teardown()
