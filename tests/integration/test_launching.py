"""`mlx-distributed launch` over a real sshd on the loopback interface, where each host is a name of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import MLX_TRAIN, Command, children, digest, ends_within, epochs, free_ports
from test_elastic_cli import HELPERS, HOST, finish, left, run_file, started, taken

from mlx_distributed.cli.distributed import main
from mlx_distributed.cli.elastic.invitation import Invitation

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
SSHD_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
AcceptEnv *
"""
SSH_CONFIG = """\
Host away
  Port 1
Host *
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known
  SendEnv PLAN_* PYTHONPATH HF_* MLX_* OPENBLAS_* COVERAGE_*
"""
SMALL = shlex.join([sys.executable, str(HELPERS / "small_command.py"), "attended"])
__all__ = ["run_file"]


class Ssh(NamedTuple):
    """A way into this machine, under any name but `away`."""

    client: str
    """Command with its options."""
    daemon: int
    """Process id of sshd, of which connections are children."""


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("needs sshd and ssh, of OpenSSH")
    folder, port = tmp_path_factory.mktemp("sshd"), free_ports(1)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder, port=port))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder, port=port))
    if os.geteuid() == 0 and sys.platform == "linux":
        Path("/run/sshd").mkdir(exist_ok=True)  # Where Debian's sshd confines itself; its init script makes it.
    daemon = [SSHD, "-D", "-e", "-f", folder / "sshd_config"]
    if problem := subprocess.run([*daemon, "-t"], capture_output=True, text=True).stderr:
        pytest.skip(f"sshd cannot be started here: {problem}")
    with subprocess.Popen(daemon, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "listening" in process.stderr.readline()
            yield Ssh(shlex.join(["ssh", "-F", str(folder / "ssh_config")]), process.pid)
        finally:
            process.terminate()


def arguments(config: Path, ssh: Ssh, hosts: str, program: str = SMALL) -> list[str | Path]:
    home = config.parent / "home"
    home.mkdir(exist_ok=True)
    return ["--config", config, "--ssh", ssh.client, "--hosts", hosts, "--remote-command", program, "--cwd", str(home)]


def command_lines() -> str:
    """What anybody on this machine can read of all processes."""
    if listed := list(Path("/proc").glob("[0-9]*/cmdline")):
        lines = []
        for path in listed:
            with contextlib.suppress(OSError):  # It has ended.
                lines.append(path.read_text(errors="replace"))
        return "\n".join(lines)
    return subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True, check=True).stdout


def commands(output_dir: Path, count: int) -> list[int]:
    """Process ids of the commands on hosts, as soon as so many of them have a worker in the run."""
    while not (formed := epochs(output_dir)) or len(formed[-1]) <= count:
        time.sleep(0.01)
    return [int(name.split("-")[-2]) for name in formed[-1] if name != f"{HOST}-0"]


def test_hosts_train_and_the_weights_have_the_same_bits(
    config: Path, undisturbed: Path, ssh: Ssh, tmp_path: Path
) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    common = arguments(config, ssh, "localhost,a,b,c,away", str(MLX_TRAIN))
    with Command(
        "mlx-distributed", "launch", *common, "--cwd", str(home), "--output-dir", out, "elastic.min_workers=4"
    ) as run:
        text = run.join_string()
        run.read_until("step 2/")
        seen = command_lines()
        pids = commands(out, 3)
        done = run.wait()
    assert done.status == 0, done
    assert done.error.startswith("away: ssh cannot connect ("), done
    assert "Connection refused" in done.error
    assert len(epochs(out)[-1]) == 4
    assert digest(out) == digest(undisturbed)
    assert "--attended" in seen
    assert text not in seen
    assert Invitation.decode(text).token not in seen
    assert len(pids) == 3
    assert all(ends_within(pid, 5.0) for pid in pids)
    for host in "abc":
        assert f"{host}: joins\n" in done.stdout
        (folder,) = (home / "runs").glob(f"joined-*-{host}")
        assert left(folder) == {"run.json", "logs"}


def test_ctrl_c_ends_all(run_file: Path, ssh: Ssh, tmp_path: Path) -> None:
    plans = {"PLAN_0": "wait for 9"}
    with started("launch", *arguments(run_file, ssh, "a,b"), **plans) as command:
        pids = commands(tmp_path / "out", 2)
        command.process.send_signal(signal.SIGINT)
        done = command.wait()
    assert (done.status, done.stderr) == (130, ""), done
    assert len(pids) == 2
    assert all(ends_within(pid, 5.0) for pid in pids)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("no-such-program", "a: the login shell there does not find 'no-such-program' ("),
        (f"env PLAN_0=refuse {SMALL}", "a: these rows are of no use\n"),
    ],
)
def test_a_host_that_cannot_train_says_why(run_file: Path, ssh: Ssh, program: str, words: str) -> None:
    done = finish("launch", *arguments(run_file, ssh, "a", program), "--nproc", "0")
    assert done.status == 1
    first, last = done.stderr.splitlines()
    assert f"{first}\n".startswith(f"error: {words}"), done
    assert last == "error: none of the hosts can train"


def test_this_machine_may_only_coordinate(run_file: Path, ssh: Ssh, tmp_path: Path) -> None:
    common = arguments(run_file, ssh, "a,b")
    done = finish("launch", *common, "--nproc", "0", "--debug", "elastic.listen=127.0.0.1:0", PLAN_0="wait for 2")
    assert (done.status, done.stderr) == (0, ""), done
    assert taken(tmp_path / "out") == [1, 2, 3, 4]
    assert f"{HOST}-0" not in epochs(tmp_path / "out")[-1]


def test_a_lost_connection_ends_no_worker(run_file: Path, ssh: Ssh, tmp_path: Path) -> None:
    with started("launch", *arguments(run_file, ssh, "a"), PLAN_0="wait for 3") as command:
        text = command.join_string()
        (pid,) = commands(tmp_path / "out", 1)
        (connection,) = children(ssh.daemon)
        os.kill(connection, signal.SIGKILL)
        third = finish("join", text, tmp_path / "third", "1", PLAN_0="wait for 3")
        done = command.wait()
    assert (third.status, done.status) == (0, 0), (third, done)
    assert done.error.startswith("a: the connection was lost (")
    assert taken(tmp_path / "out") == [1, 2, 3, 4]
    assert ends_within(pid, 5.0)


def test_nobody_is_left_where_launcher_and_coordinator_are_gone(run_file: Path, ssh: Ssh, tmp_path: Path) -> None:
    common = arguments(run_file, ssh, "a")
    with started("launch", *common, "elastic.coordinator_grace_s=0.2", PLAN_0="wait for 9") as command:
        (pid,) = commands(tmp_path / "out", 1)
        command.process.kill()
        assert ends_within(pid, 20.0)


def test_a_pipeline_begins_when_all_hosts_are_there(config: Path, ssh: Ssh, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    stages = ["parallel.pipeline.num_stages=2", "train.max_steps=3", f"model.path={config.parent / 'untied'}"]
    program = ["--remote-command", str(MLX_TRAIN), "--cwd", str(home)]
    folders = [tmp_path / name for name in ("out", "alone", "refused")]
    launch = ["mlx-distributed", "launch", "--config", config, "--ssh", ssh.client, *program]
    with (
        Command(*launch, "--hosts", "a", "--output-dir", folders[0], *stages) as run,
        Command(*launch, "--hosts", "a,b,away", "--output-dir", folders[2], *stages) as refused,
        Command("mlx-train", "--config", config, *stages[1:], "--output-dir", folders[1]) as alone,
    ):
        text = run.join_string()
        seen = command_lines()
        endings = [command.wait() for command in (run, refused, alone)]
    assert [done.status for done in endings] == [0, 1, 0], endings
    assert digest(folders[0]) == digest(folders[1])
    assert text not in seen
    assert "a: joins\n" in endings[0].stdout
    (joined,) = (home / "runs").glob(f"joined-{json.loads((folders[0] / 'run.json').read_text())['run_id'][:8]}-a")
    assert left(joined) == {"run.json", "logs"}
    first, *_, last = endings[1].stderr.splitlines()
    assert first.startswith("error: away: ssh cannot connect (")
    assert first.endswith("the run cannot begin without it")
    assert last == "error: a host cannot take part, and the run cannot begin without it"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["parallel.pipeline.num_stages=2", "--nproc", "0"], "--nproc 0: rank 0 of a run that is not elastic is on"),
        (["parallel.num_workers=4"], "parallel.num_workers=4 leaves 3 for 2 hosts, which bring as many each; use 3"),
        (["parallel.num_workers=2"], "parallel.num_workers=2 leaves 1 for 2 hosts, which bring as many each; use 3"),
        (["parallel.pipeline.num_stages=2"], "parallel.num_workers=3: must be a multiple of"),
        (["parallel.num_workers=[x"], "parallel.num_workers=[x"),
    ],
)
def test_a_group_that_cannot_be_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    own = ["--hosts", "a,b", "--ssh", "ssh", "--output-dir", str(tmp_path / "out")]
    assert main(["launch", "--config", str(config), *own, "parallel.listen=127.0.0.1:0", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
