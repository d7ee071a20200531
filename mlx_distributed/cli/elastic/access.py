"""How the coordinator of a run is reached: kept in its folder, so that it comes back as the same one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_distributed.cli.elastic.invitation import Invitation, new_token
from mlx_distributed.cli.machine.interfaces import resolve
from mlx_distributed.cli.machine.machine import this_machine
from mlx_distributed.cli.output_dir import ACCESS, ACCESS_ASIDE
from mlx_distributed.config import Config
from mlx_distributed.elastic.membership import Contact
from mlx_distributed.errors import ConfigError

if TYPE_CHECKING:
    from mlx_distributed.comm.tls import Identity  # imports a library that a run without TLS need not wait for


@dataclass(frozen=True)
class Access:
    """Address and secrets of a coordinator."""

    run_id: str
    address: str
    """Where it listens; before it does, where it is to, with port 0 for a free one."""
    token: str = field(repr=False)
    key: str | None = field(default=None, repr=False)
    """PEM of the private key of the run, None where nothing is encrypted."""
    certificate: str | None = None
    """PEM."""
    num_steps: int | None = None
    config_digest: str | None = None
    """These two where a coordinator without workers of its own has found them out."""
    found_for: str | None = None
    """Digest of what they were found out for."""

    @property
    def contact(self) -> Contact:
        return Contact(self.address, self.token, self.certificate)

    @property
    def identity(self) -> Identity | None:
        """Of the run."""
        if self.key is None or self.certificate is None:
            return None
        from mlx_distributed.comm.tls import Identity

        return Identity(self.key, self.certificate)

    @property
    def invitation(self) -> Invitation | None:
        """For other machines; None where the run is for this one alone."""
        identity = self.identity
        return Invitation(self.address, self.token, identity.fingerprint) if identity else None

    def write(self, output_dir: Path) -> None:
        """Keep it in the folder of the run, where only the user who owns it can read it."""
        aside = output_dir / ACCESS_ASIDE
        aside.unlink(missing_ok=True)  # One that is there would keep its mode.
        with open(aside, "w", encoding="utf-8", opener=_private) as file:  # Path.open takes no opener
            json.dump(asdict(self), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(output_dir / ACCESS)

    @classmethod
    def read(cls, output_dir: Path) -> Access | None:
        """What was kept in a folder, None where nothing was.

        Raises:
            ConfigError: it cannot be read.
        """
        path = output_dir / ACCESS
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError):
            raise ConfigError(
                f"{path} is damaged; remove it and start the coordinator again, which makes a new one: workers on "
                "other machines then have to join anew"
            ) from None


def prepare_access(config: Config, run_id: str) -> Access:
    """Of a coordinator that is about to start: what was kept, as workers elsewhere may be waiting for it, or new.

    Raises:
        ConfigError: what was kept cannot be read, or there is no such interface here as `elastic.listen` names.
    """
    listen = config.elastic.listen
    if listen is None:
        return Access(run_id, "127.0.0.1:0", new_token())
    listen = resolve(listen, this_machine().interfaces())
    kept = Access.read(config.output_dir)
    if kept is not None and kept.run_id == run_id and _is_valid(kept):
        host, _, port = listen.rpartition(":")
        same = port == "0" and kept.address.rpartition(":")[0] == host
        return kept if same else replace(kept, address=listen)
    from mlx_distributed.comm.tls import Identity

    identity = Identity.create(datetime.now(UTC))
    return Access(run_id, listen, new_token(), identity.key, identity.certificate)


def _is_valid(access: Access) -> bool:
    """Whether there is a certificate that can still be shown."""
    if access.certificate is None:
        return False
    from cryptography import x509

    return datetime.now(UTC) < x509.load_pem_x509_certificate(access.certificate.encode()).not_valid_after_utc


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
