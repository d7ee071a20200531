from __future__ import annotations

import os
import subprocess

from support import MLX_TRAIN

from mlx_distributed.cli.elastic.attended import READY, read_line


def test_one_line_is_read_and_the_rest_left() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as rest:
        os.write(write, b"mlxd1abc\n\nand")
        os.close(write)
        assert [read_line(read), read_line(read)] == ["mlxd1abc", ""]
        assert rest.read() == b"and"
    read, write = os.pipe()
    os.close(write)
    with os.fdopen(read):
        assert read_line(read) == ""


def test_the_join_string_may_come_over_standard_input() -> None:
    for arguments, out in (["--join", "-"], ""), (["--join", "-", "--attended"], f"{READY}\n"):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([MLX_TRAIN, *arguments], **pipes, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdin.write("mlxd1abc\n")
            process.stdin.flush()  # And stays open: somebody is there.
            assert process.stdout.read() == out
            assert process.stderr.read().startswith("error: this join string is damaged")
        assert process.returncode == 2
