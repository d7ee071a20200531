"""The join string: one word that lets another machine into a run."""

from __future__ import annotations

import base64
import binascii
import secrets
import zlib
from dataclasses import dataclass, field
from typing import Literal

from mlx_distributed.config.checks import is_address
from mlx_distributed.errors import ConfigError

Kind = Literal["elastic", "group"]
"""Of a run with a coordinator, or of a group whose members are all there from the beginning to the end."""
PREFIX = "mlxd"
PREFIXES: dict[Kind, str] = {"elastic": PREFIX, "group": "mlxg"}
VERSION = "1"
TOKEN_BYTES, FINGERPRINT_BYTES, CHECKSUM_BYTES = 16, 32, 4


def new_token() -> str:
    """The secret of a run, in hexadecimal."""
    return secrets.token_hex(TOKEN_BYTES)


@dataclass(frozen=True)
class Invitation:
    """Where to ask to be let in, the secret that opens, and by what the one who listens there is known."""

    address: str
    """Host and port."""
    token: str = field(repr=False)
    """As of `new_token`."""
    fingerprint: str
    """SHA-256 of the certificate that is shown there, in hexadecimal."""
    kind: Kind = "elastic"

    def __str__(self) -> str:
        """Without the secret: for logs."""
        return f"the invitation to {self.address}"

    def encode(self) -> str:
        """The join string: a prefix, a version, then a checksum, token, fingerprint and address in base 32.

        Base 32 has no letter that a shell or a chat program takes for something else, and no upper and lower case.
        """
        payload = bytes.fromhex(self.token) + bytes.fromhex(self.fingerprint) + self.address.encode()
        text = base64.b32encode(zlib.crc32(payload).to_bytes(CHECKSUM_BYTES) + payload).decode()
        return PREFIXES[self.kind] + VERSION + text.rstrip("=").lower()

    @classmethod
    def decode(cls, text: str) -> Invitation:
        """What a join string says. White space, as mail programs put it into long words, does not count.

        Raises:
            ConfigError: it is not one, was not copied as a whole, or is of another version. The message does not repeat
                it, as it may hold the secret.
        """
        word = "".join(text.split()).lower()
        kind = next((kind for kind, prefix in PREFIXES.items() if word.startswith(prefix)), None)
        if kind is None:
            begins = " or ".join(prefix + VERSION for prefix in PREFIXES.values())
            raise ConfigError(
                f"this is not a join string: those begin with {begins}; copy the one that mlx-train or mlx-distributed "
                "has printed, with nothing before or after it"
            )
        version, body = word[len(PREFIX) : len(PREFIX) + 1], word[len(PREFIX) + 1 :]
        if version != VERSION:
            raise ConfigError(
                f"this join string is of version {version or '(none)'}, and this program reads version {VERSION}; use "
                "the version of mlx-distributed that the run was started with, or copy the string again"
            )
        damaged = ConfigError(
            f"this join string is damaged: its checksum does not fit its {len(word)} letters; copy it again as a whole"
        )
        try:
            data = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
            checksum, payload = data[:CHECKSUM_BYTES], data[CHECKSUM_BYTES:]
            token, rest = payload[:TOKEN_BYTES], payload[TOKEN_BYTES:]
            fingerprint, address = rest[:FINGERPRINT_BYTES], rest[FINGERPRINT_BYTES:].decode()
        except (binascii.Error, ValueError):
            raise damaged from None
        if checksum != zlib.crc32(payload).to_bytes(CHECKSUM_BYTES) or not is_address(address):
            raise damaged
        return cls(address, token.hex(), fingerprint.hex(), kind)
