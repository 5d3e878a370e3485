"""Short-lived signed tokens that stand for an API key where no header can be set, or where the key must not be."""

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from edge.api_keys import ApiKeys, Holder

TOKEN_PREFIX: Final = "sluicet."  # noqa: S105  # names the kind
MIN_SECRET_BYTES: Final = 32


class BadSecret(ValueError):
    """A secret that cannot be used."""


def random_secret() -> bytes:
    """One that nobody else knows."""
    return secrets.token_bytes(MIN_SECRET_BYTES)


def read_secret(path: str) -> bytes:
    """The secret in a file, without white space around it. Raises: BadSecret."""
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise BadSecret(f"cannot read {path}: {error.strerror}") from None
    if len(secret) < MIN_SECRET_BYTES:
        raise BadSecret(f"must be at least {MIN_SECRET_BYTES} bytes, got {len(secret)}")
    return secret


class AccessTokens:
    """Signs and verifies `sluicet.NAME.EXPIRY.SIGNATURE`: any edge with the same secret and keys takes it.

    The signature (HMAC-SHA256) covers a hash of the key, so that a token ends with its key.
    """

    def __init__(
        self, secret: bytes, lifetime_seconds: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._secret = secret
        self._clock = clock
        self.lifetime_seconds = lifetime_seconds

    def issue(self, holder: Holder) -> str:
        """A token for the holder of a key."""
        expiry = int(self._clock()) + self.lifetime_seconds
        name = _text(holder.key.name.encode())
        return (
            f"{TOKEN_PREFIX}{name}.{expiry}.{_text(self._signature(name, expiry, holder.digest))}"
        )

    def find(self, token: str, keys: ApiKeys) -> Holder | None:
        """The holder that a token stands for; None if it is none of ours, or over, or its key is gone."""
        parts = token.removeprefix(TOKEN_PREFIX).split(".")
        if len(parts) != 3 or not (parts[1].isascii() and parts[1].isdecimal()):
            return None
        name, expiry, signature = parts[0], int(parts[1][:20]), parts[2]
        try:
            key = keys.named(_bytes(name).decode())
            given = _bytes(signature)
        except ValueError:
            return None
        if key is None or expiry <= self._clock():
            return None
        for digest in key.digests:
            if hmac.compare_digest(self._signature(name, expiry, digest), given):
                return Holder(key, digest)
        return None

    def _signature(self, name: str, expiry: int, digest: bytes) -> bytes:
        signed = f"{TOKEN_PREFIX}{name}.{expiry}.".encode() + digest
        return hmac.digest(self._secret, signed, hashlib.sha256)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    """Raises: ValueError."""
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
