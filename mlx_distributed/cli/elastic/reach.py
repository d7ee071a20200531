"""From a join string to whom it is from."""

from __future__ import annotations

import hashlib
import socket
import ssl
from datetime import UTC, datetime
from typing import NamedTuple

from cryptography import x509

from mlx_distributed.cli.elastic.invitation import Invitation, Kind
from mlx_distributed.elastic.membership import Contact
from mlx_distributed.errors import ConfigError, TrainingError

CONNECT_S = 10.0
_WHO: dict[Kind, str] = {"elastic": "coordinator", "group": "first machine of the group"}


class Reached(NamedTuple):
    """A coordinator that has shown the certificate that the join string names."""

    contact: Contact
    local_host: str
    """Address of the interface of this machine that reaches it."""


def reach(invitation: Invitation) -> Reached:
    """Find the coordinator of an invitation. The token is not sent: nobody has been asked for it yet.

    Raises:
        ConfigError: who answers is not the coordinator that the invitation is from, or that is of another kind of run.
        TrainingError: nobody answers.
    """
    if invitation.kind != "elastic":
        raise ConfigError(
            "this join string is of a group without a coordinator, whose first machine shows how far it is; it is for "
            "mlx-train --join or mlx-distributed bench join alone"
        )
    with dial(invitation) as line:
        certificate = ssl.DER_cert_to_PEM_cert(line.getpeercert(binary_form=True) or b"")
        return Reached(Contact(invitation.address, invitation.token, certificate), local_host(line))


def local_host(line: socket.socket) -> str:
    """Address of the interface of this machine that a connection goes by."""
    host = line.getsockname()[0].partition("%")[0]
    return f"[{host}]" if ":" in host else host


def dial(invitation: Invitation) -> ssl.SSLSocket:
    """Connect to whom an invitation is from, and see that it is.

    Raises:
        ConfigError: who answers is somebody else.
        TrainingError: nobody answers.
    """
    address, who = invitation.address, _WHO[invitation.kind]
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    # It has signed its certificate itself, for no address: the fingerprint says whose it is.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        plain = socket.create_connection((host.strip("[]"), int(port)), CONNECT_S)
        try:
            line = context.wrap_socket(plain)
        except BaseException:
            plain.close()
            raise
    except ssl.SSLError as error:
        raise ConfigError(
            f"what listens on {address} does not speak TLS ({error.reason}): it is not the {who} that the join string "
            "is from; use the string that the run has printed last"
        ) from None
    except OSError as error:
        raise TrainingError(
            f"no {who} answers at {address} ({error.strerror or error}); see whether the run is still on, and "
            "whether this machine reaches that one"
        ) from None
    try:
        der = line.getpeercert(binary_form=True) or b""
        if hashlib.sha256(der).hexdigest() != invitation.fingerprint:
            raise ConfigError(
                f"the {who} at {address} shows another certificate than the one in the join string: the string is of "
                "an earlier run and has expired, or somebody stands in between; use the one that the run has printed "
                "last"
            )
        _check_dates(ssl.DER_cert_to_PEM_cert(der), address)
    except BaseException:
        line.close()
        raise
    return line


def _check_dates(certificate: str, address: str) -> None:
    loaded = x509.load_pem_x509_certificate(certificate.encode())
    first, last, now = loaded.not_valid_before_utc, loaded.not_valid_after_utc, datetime.now(UTC)
    if not first <= now <= last:
        raise ConfigError(
            f"the join string for {address} is valid from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M}, and the "
            f"clock of this machine says {now:%Y-%m-%d %H:%M} (UTC); set the clock right, or start the coordinator "
            "again and use its new string"
        )
