"""`mlx-distributed bench` with ranks that are processes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support import children, ends_within

from mlx_distributed.cli.distributed import main
from mlx_distributed.cli.meeting import guest
from mlx_distributed.comm.compress import CODECS

PROGRAM = Path(sys.executable).with_name("mlx-distributed")
KEYS = ["op", "backend", "wire", "num_ranks", "size_bytes", "median_s", "algbw_gb_per_s", "ratio_to_ring"]
MORE_KEYS = ["ratio_to_gloo", "ratio_to_sockets", "cpu_s_per_gb"]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, "bench", *arguments], capture_output=True, text=True, check=False)


def test_ours_beside_others() -> None:
    sizes, others = ["--sizes", "1KiB,5MiB", "--wire", "fp32,int8"], ["--against", "ring,gloo,sockets"]
    done = bench("allreduce", *sizes, *others, "--rounds", "2", "--json")
    assert done.returncode == 0, done
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    has_torch = importlib.util.find_spec("torch") is not None
    assert ("note: gloo is left out: " in done.stderr) != has_torch
    others = ["ring", *(["gloo"] if has_torch else []), "sockets"]
    sides = [("grpc", "fp32"), ("grpc", "int8"), *((name, "fp32") for name in others)]
    assert [(row["size_bytes"], row["backend"], row["wire"]) for row in rows] == [
        (size_bytes, *side) for size_bytes in (1 << 10, 5 << 20) for side in sides
    ]
    for row in rows:
        assert list(row) == KEYS + MORE_KEYS
        assert (row["op"], row["num_ranks"]) == ("allreduce", 2)
        assert row["algbw_gb_per_s"] == pytest.approx(row["size_bytes"] / row["median_s"] / 1e9)
        assert row["ratio_to_ring"] > 0
        assert row["backend"] != "ring" or row["ratio_to_ring"] == 1
        assert row["backend"] != "sockets" or row["ratio_to_sockets"] == 1
        assert (row["ratio_to_gloo"] is None) != has_torch
        assert row["cpu_s_per_gb"] > 0


def test_tls_beside_none() -> None:
    done = bench("latency", "--sizes", "4B", "--against", "none", "--rounds", "2", "--nproc", "3", "--tls", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["backend"] for line in done.stdout.splitlines()] == ["grpc", "grpc-tls"]


def test_links_as_table_and_picture(tmp_path: Path) -> None:
    done = bench("links", "--sizes", "64KiB", "--rounds", "2", "--picture", tmp_path / "links.svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{os.cpu_count()} cores, load " in done.stdout
    assert "\none way, 64 KiB, GB/s\nfrom \\ to         0         1\n        0         -  " in done.stdout
    assert ElementTree.parse(tmp_path / "links.svg").getroot().tag.endswith("svg")


@contextmanager
def measuring() -> Iterator[subprocess.Popen[str]]:
    """A benchmark on two ranks that has done its first size, and has seconds to go."""
    command = [PROGRAM, "bench", "allreduce", "--sizes", "4B,64MiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.split()[2:3] == ["ring"] for line in process.stdout)
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_ranks(number: signal.Signals) -> None:
    with measuring() as process:
        ranks = children(process.pid)
        process.send_signal(number)
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout, stderr) == (130, "", "")
    assert len(ranks) == 2
    assert all(ends_within(rank, 0.0) for rank in ranks)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_is_named(lost: int) -> None:
    with measuring() as process:
        ranks = children(process.pid)
        os.kill(ranks[lost], signal.SIGKILL)
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert f"error: worker {lost} was ended by SIGKILL\n" in stderr
    assert "Traceback" not in stderr
    assert all(ends_within(rank, 0.0) for rank in ranks)


@contextmanager
def over_machines(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], subprocess.Popen[str], str]]:
    """Rank 0, rank 1, and the join string that the first one has printed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [PROGRAM, "bench", *arguments, "--workers", "2", "--listen", "127.0.0.1:0"]
    with (
        subprocess.Popen(command, **pipes) as first,
        subprocess.Popen([PROGRAM, "bench", "join", "-"], **pipes) as second,
    ):
        try:
            assert first.stderr is not None
            text = first.stderr.readline().split()[-1]
            yield first, second, text
        finally:
            first.kill()
            second.kill()


def test_one_rank_on_each_of_several_machines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--sizes", "4B,64KiB", "--wire", "fp32,int8", "--against", "ring", "--rounds", "2", "--json"]
    with over_machines("latency", *options) as (first, second, text):
        with monkeypatch.context() as other:
            other.setattr(guest, "__version__", "9.9.9")
            assert main(["bench", "join", text]) == 2
            assert "is of mlx-distributed " in capsys.readouterr().err
        out, err = second.communicate(f"{text}\n")
        assert (second.returncode, out, err) == (0, "rank 1 of 2; rank 0 shows the figures\n", "")
        out, err = first.communicate()
    assert first.returncode == 0, err
    assert "error" not in err
    rows = [json.loads(line) for line in out.splitlines()]
    sides = [("grpc-tls", "fp32"), ("grpc-tls", "int8"), ("ring", "fp32")]
    assert [(row["size_bytes"], row["backend"], row["wire"]) for row in rows] == [
        (size_bytes, *side) for size_bytes in (4, 64 << 10) for side in sides
    ]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_is_lost_is_named(lost: int) -> None:
    with over_machines("allreduce", "--sizes", "4B,64MiB") as (*commands, text):
        assert commands[1].stdin is not None
        commands[1].stdin.write(f"{text}\n")
        commands[1].stdin.close()
        commands[1].stdin = None
        assert commands[0].stdout is not None
        assert any("grpc-tls" in line for line in commands[0].stdout)
        commands[lost].kill()
        commands[lost].wait()
        _, err = commands[1 - lost].communicate()
        assert commands[1 - lost].returncode == 1
        assert f"rank {lost}" in err.splitlines()[-1]
        assert err.count("error: ") == 1


def test_a_reader_that_has_gone_away_ends_it() -> None:
    command = [PROGRAM, "bench", "allreduce", "--sizes", "4B,64MiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("python ")
        process.stdout.close()
        assert process.wait() == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["allreduce", "--nproc", "1"], "--nproc 1: a single rank has nobody to send to; use 2 or more"),
        (["latency", "--sizes", "3B"], "--sizes 3B: float32 values of 4 bytes are sent"),
        (["links", "--picture", "links.png"], "--picture links.png: the picture is an SVG; name it links.svg"),
        (["links", "--picture", "gone/links.svg"], "--picture gone/links.svg: cannot be written"),
        (["links", "--workers", "3"], "--workers needs --listen: "),
        (["links", "--listen", "10.0.0.7:4000"], "--listen needs --workers: "),
        (["links", "--workers", "1", "--listen", "10.0.0.7:4000"], "--workers 1: a single rank has nobody"),
        (["links", "--workers", "2", "--listen", "0.0.0.0:4000"], "--listen 0.0.0.0:4000: must be a host and a port"),
        (["links", "--workers", "2", "--listen", "a:4000", "--nproc", "2"], "--nproc 2 cannot stand beside --workers"),
        (
            ["latency", "--workers", "2", "--listen", "127.0.0.1:4000", "--against", "gloo"],
            "--against gloo: unknown; there are ring",
        ),
        (["join", "mlxd1abc"], "this join string is damaged"),
    ],
)
def test_nonsense_starts_nothing(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"error: {words}")
    assert err.count("\n") == 1


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["bench"], ["bench", "links"]):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--help"])
        assert ended.value.code == 0
        assert "\n  mlx-distributed bench links --nproc 3 --picture links.svg\n" in capsys.readouterr().out


def test_help_names_every_wire_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "allreduce", "--help"])
    assert f"{', '.join(CODECS)} (default" in " ".join(capsys.readouterr().out.split())
