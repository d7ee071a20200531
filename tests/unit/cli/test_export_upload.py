"""`--upload` against a server on this machine that answers as the Hugging Face Hub does."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlx_distributed.cli.distributed import main
from mlx_distributed.testing import tiny_model


class Hub(ThreadingHTTPServer):
    """Knows one token, and keeps what it is sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.public = self.full = False
        self.asked: list[str] = []
        self.created: dict[str, object] = {}
        self.files: dict[str, bytes] = {}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"name": "me"} if "whoami" in self.path else {"id": "me/mine", "private": not self.server.public})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/create"):
            self.server.created = json.loads(body)
            self._answer({"url": "https://huggingface.co/me/mine"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif "/commit/" in self.path and not self.server.full:
            for record in map(json.loads, body.splitlines()):
                if record["key"] == "file":
                    self.server.files[record["value"]["path"]] = base64.b64decode(record["value"]["content"])
            self._answer({"commitUrl": "https://huggingface.co/me/mine/commit/1", "commitOid": "1", "success": True})
        else:
            self._answer({"error": "no room"}, 507 if "/commit/" in self.path else 200)

    def _answer(self, record: dict, status: int = 200) -> None:
        self.server.asked.append(self.path)
        if self.headers["Authorization"] != "Bearer right":
            record, status = {"error": "Invalid username or password."}, 401
        data = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The Hub that huggingface_hub talks to, with the right token in the environment."""
    with Hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "right")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def export(model: Path, *arguments: str) -> int:
    return main(["export", str(model), *arguments])


def test_everything_arrives(hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(model, "--upload", "me/mine", "--private") == 0
    assert f"uploaded: {constants.ENDPOINT}/me/mine" in capsys.readouterr().out
    assert hub.created["visibility"] == "private"
    exported = model.with_name("export")
    assert hub.files == {path.name: path.read_bytes() for path in exported.iterdir()}
    assert b"# me/mine\n" in hub.files["README.md"]


def test_nothing_is_sent_unasked(hub: Hub, model: Path) -> None:
    assert export(model) == 0
    assert hub.asked == []


@pytest.mark.parametrize(
    ("token", "name", "words"),
    [
        (None, "me/mine", "there are no credentials for the Hugging Face Hub on this machine; log in with"),
        ("wrong", "me/mine", "refuses you or cannot be reached (Invalid user token."),
        ("right", "mine", "--upload mine: give the name with its owner, as in user/mine"),
        ("right", "me/mine/yours", "--upload me/mine/yours: "),
    ],
)
def test_without_a_way_in_nothing_is_written(
    hub: Hub, model: Path, token: str | None, name: str, words: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    assert export(model, "--upload", name) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not model.with_name("export").exists()
    assert hub.files == {}


def test_without_a_hub_nothing_is_written(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        assert export(model, "--upload", "me/mine") == 2
        assert "refuses you or cannot be reached" in capsys.readouterr().err
        assert not model.with_name("export").exists()

    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        refused()
    with socket.socket() as taken:  # and listens to nobody
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        refused()


def test_what_cannot_be_uploaded_is_whole_here(hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.full = True
    assert export(model, "--upload", "me/mine") == 1
    exported = model.with_name("export")
    said = capsys.readouterr().err
    assert f"{exported} is whole, and could not be uploaded to me/mine" in said
    assert f"`hf upload me/mine {exported}`" in said
    assert (exported / "model.safetensors").exists()


def test_what_is_to_be_private_never_goes_where_it_is_public(
    hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.public = True
    assert export(model, "--upload", "me/mine", "--private") == 1
    assert "me/mine is there already and public, so nothing was uploaded" in capsys.readouterr().err
    assert hub.files == {}
