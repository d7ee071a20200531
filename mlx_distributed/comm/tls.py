"""TLS for a group: one certificate for one run, which all of its workers hold and which is all that they trust."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import ClassVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLOCK_SKEW = timedelta(days=1)
"""By how much the clock of a worker may be behind the one that made the certificate."""
LIFETIME = timedelta(days=90)
"""Longer than a run. Only connecting asks for it: a stream that is up stays up."""


@dataclass(frozen=True)
class Identity:
    """Key and certificate that every worker of a run shows, and the only ones that it takes from a peer.

    Who has them is in the run, and nobody else can read what travels: to be handed out over a channel that is as safe
    as the run is to be, and written down where nobody else can read it, if at all.
    """

    server_name: ClassVar[str] = "worker.mlx-distributed.internal"
    """What the certificate is for, in place of addresses, which nobody knows when it is made."""

    key: str = field(repr=False)
    """PEM of the private key, PKCS #8."""
    certificate: str
    """PEM."""

    @classmethod
    def create(cls, now: datetime) -> Identity:
        """A new self-signed one on the curve P-256.

        Args:
            now: with a time zone; it is valid from `CLOCK_SKEW` before, and for `LIFETIME`.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cls.server_name)])
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + LIFETIME)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(cls.server_name)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ).decode(),
            certificate.public_bytes(serialization.Encoding.PEM).decode(),
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate (DER), in hexadecimal: what people may compare."""
        return x509.load_pem_x509_certificate(self.certificate.encode()).fingerprint(hashes.SHA256()).hex()
