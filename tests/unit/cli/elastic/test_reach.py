"""Finding the coordinator of a join string, or somebody else in its place, over real TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mlx_distributed.cli.elastic.invitation import Invitation
from mlx_distributed.cli.elastic.reach import reach
from mlx_distributed.comm.tls import Identity
from mlx_distributed.errors import ConfigError, TrainingError

TOKEN = "0f" * 16
NOW = datetime.now(UTC)


@contextlib.contextmanager
def listening(folder: Path, identity: Identity | None) -> Iterator[str]:
    """Somebody who takes one connection, with TLS or saying something else; the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                if identity is None:
                    connection.sendall(b"SSH-2.0-of another kind\r\n" * 20)
                    connection.recv(1 << 16)
                    return
                (folder / "both.pem").write_text(identity.key + identity.certificate)
                context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                context.load_cert_chain(folder / "both.pem")
                with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as encrypted:
                    encrypted.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_the_coordinator_is_known_by_its_certificate(tmp_path: Path) -> None:
    identity = Identity.create(NOW)
    with listening(tmp_path, identity) as address:
        reached = reach(Invitation(address, TOKEN, identity.fingerprint))
    assert reached.local_host == "127.0.0.1"
    assert (reached.contact.address, reached.contact.token) == (address, TOKEN)
    assert replace(identity, certificate=str(reached.contact.certificate)).fingerprint == identity.fingerprint
    assert TOKEN not in repr(reached)


def test_another_certificate_is_refused(tmp_path: Path) -> None:
    with listening(tmp_path, Identity.create(NOW)) as address, pytest.raises(ConfigError, match="another certificate"):
        reach(Invitation(address, TOKEN, Identity.create(NOW).fingerprint))


@pytest.mark.parametrize("made", [NOW - timedelta(days=200), NOW + timedelta(days=200)])
def test_a_certificate_of_another_time_is_refused(tmp_path: Path, made: datetime) -> None:
    identity = Identity.create(made)
    with listening(tmp_path, identity) as address, pytest.raises(ConfigError, match=r"is valid from .* set the clock"):
        reach(Invitation(address, TOKEN, identity.fingerprint))


def test_what_does_not_speak_tls_is_refused(tmp_path: Path) -> None:
    with listening(tmp_path, None) as address, pytest.raises(ConfigError, match="does not speak TLS"):
        reach(Invitation(address, TOKEN, "00" * 32))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "no-such-host.invalid:1"])
def test_where_nobody_answers(address: str) -> None:
    with pytest.raises(TrainingError, match="no coordinator answers at"):
        reach(Invitation(address, TOKEN, "00" * 32))


def test_a_group_has_no_coordinator() -> None:
    with pytest.raises(ConfigError, match="is of a group without a coordinator, whose first machine shows"):
        reach(Invitation("127.0.0.1:1", TOKEN, "a1" * 32, "group"))
