from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from mlx_distributed.comm._pb import collective_pb2

ROOT = Path(__file__).parents[3]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_protos", ROOT / "scripts" / "generate_protos.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate_protos = load_script()


def read_stubs(folder: Path) -> dict[str, str]:
    return {
        path.name: path.read_text(encoding="utf-8") for path in (folder / generate_protos.PACKAGE).glob("*_pb2.py*")
    }


def test_the_committed_stubs_are_what_the_protos_give(tmp_path: Path) -> None:
    generate_protos.generate(tmp_path)
    assert read_stubs(ROOT) == read_stubs(tmp_path), "run: uv run python scripts/generate_protos.py"


def test_a_proto_that_cannot_be_compiled_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.proto").write_text("message {", encoding="utf-8")
    monkeypatch.setattr(generate_protos, "PROTOS", tmp_path)
    with pytest.raises(SystemExit) as caught:
        generate_protos.generate(tmp_path)
    assert caught.value.code == 1
    assert "bad.proto:1" in capfd.readouterr().err


def test_a_hello_comes_back_as_it_was() -> None:
    hello = collective_pb2.Hello(
        run_id="run", generation=2**63, rank=1, size=3, protocol_version=1, program_version="0.1.0"
    )
    assert collective_pb2.Hello.FromString(hello.SerializeToString()) == hello
