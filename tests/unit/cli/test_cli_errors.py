from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_distributed.cli.errors import describe, run
from mlx_distributed.errors import CommError, ConfigError, DataError, TrainingError


def fail(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("no such key"), 2),
        (DataError("no such file"), 2),
        (TrainingError("not finite"), 1),
        (CommError("barrier", 2, 0, 3.0, "did not answer"), 1),
    ],
)
def test_an_error_is_a_paragraph_and_a_status(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert describe(fail(error), debug=False) == (status, str(error))
    assert capsys.readouterr() == ("", "")
    assert run(fail(error), debug=False) == status
    assert capsys.readouterr() == ("", f"error: {error}\n")
    assert run(fail(error), debug=True) == status
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith(f"\nerror: {error}\n")


def test_the_status_of_the_body_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe(lambda: 7, debug=False) == (7, None)
    assert run(lambda: 7, debug=False) == 7
    assert capsys.readouterr() == ("", "")


def test_text_of_others_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fail(DataError("the hub says \x1b]0;mine\x07\nand more")), debug=False) == 2
    assert capsys.readouterr().err == "error: the hub says ?]0;mine?\nand more\n"


def test_an_interrupt_has_no_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fail(KeyboardInterrupt()), debug=False) == 130
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0, debug=False)


def test_a_closed_pipe_ends_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert run(lambda: print("for nobody") or 0, debug=False) == 1
