"""The API keys that the edge knows: names, hashes and limits, from a file or the environment."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from protos.sluice.v1 import generation_pb2 as pb

KEY_PREFIX: Final = "sluice_"
HASH_PREFIX: Final = "sha256:"
_NAME: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")  # Caller.key_id of the contract
_HASH: Final = re.compile(rf"{HASH_PREFIX}[0-9a-f]{{64}}")
# As the contract has it.
_WEIGHTS: Final[tuple[float, float]] = (0.001, 1000)
_CONCURRENT: Final = (1, 2**32 - 1)
_TOKENS_PER_MINUTE: Final = (1, 2**64 - 1)
_DISABLED: Final = "disabled"

N = TypeVar("N", int, float)


class BadKeys(ValueError):
    """A list of keys that cannot be used. The message names the line, never a key or a hash."""


@dataclass(frozen=True)
class ApiKey:
    """One line: who may call, and what they may take of the worker."""

    name: str
    # SHA-256 of each secret that opens it: several while one is exchanged for another.
    digests: tuple[bytes, ...]
    weight: float | None = None
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None
    is_disabled: bool = False

    def caller(self) -> pb.Caller:
        """What the worker is told of it."""
        return pb.Caller(
            key_id=self.name,
            weight=self.weight,
            max_concurrent=self.max_concurrent,
            tokens_per_minute=self.tokens_per_minute,
        )


@dataclass(frozen=True)
class Holder:
    """Who came in: a key, and the hash of the one of its secrets that opened it."""

    key: ApiKey
    digest: bytes


class ApiKeys:
    """All keys. Immutable; a changed file makes another one."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._by_name = {key.name: key for key in keys}

    def __len__(self) -> int:
        return len(self._by_name)

    def named(self, name: str) -> ApiKey | None:
        """The key of that name."""
        return self._by_name.get(name)

    def find(self, secret: str) -> Holder | None:
        """Who holds a secret.

        All hashes are compared, each in constant time: how long it takes tells nothing of how near a guess was.
        """
        digest = digest_of(secret)
        found = None
        for key in self._by_name.values():
            for known in key.digests:
                if hmac.compare_digest(known, digest):
                    found = Holder(key, known)
        return found


def digest_of(secret: str) -> bytes:
    """SHA-256 of a key. Nothing slower is needed: made keys have 256 random bits, which nobody can try out."""
    # Headers are text of their bytes, one character for each.
    return hashlib.sha256(secret.encode("latin-1", "replace")).digest()


def read_keys(path: str, inline: str) -> ApiKeys:
    """The keys of the file at `path` and of `inline`, whose lines may end with ";" too; either may be empty.

    Raises: BadKeys, also if the file cannot be read or there is no key at all.
    """
    keys: list[ApiKey] = []
    if path:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not UTF-8"
            raise BadKeys(f"cannot read {path}: {reason}") from None
        keys += parse_keys(text)
    keys += parse_keys(inline.replace(";", "\n"))
    if not keys:
        raise BadKeys("holds no key")
    seen: set[str] = set()
    digests: set[bytes] = set()
    for key in keys:
        if key.name in seen:
            raise BadKeys(f"{key.name} comes twice")
        if not digests.isdisjoint(key.digests):
            raise BadKeys(f"{key.name} has the hash of another one")
        seen.add(key.name)
        digests.update(key.digests)
    return ApiKeys(keys)


def parse_keys(text: str) -> list[ApiKey]:
    """One key a line: `name: sha256:HEX [more hashes] [weight=W] [max_concurrent=N] [tokens_per_minute=N] [disabled]`.

    Empty lines, and what follows a "#", mean nothing. Raises: BadKeys.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if content:
            try:
                keys.append(_parse_line(content))
            except ValueError as error:
                raise BadKeys(f"line {number}: {error}") from None
    return keys


def line_of(key: ApiKey) -> str:
    """The line that `parse_keys` reads."""
    words = [f"{key.name}:", *(HASH_PREFIX + digest.hex() for digest in key.digests)]
    if key.weight is not None:
        words.append(f"weight={key.weight}")
    if key.max_concurrent is not None:
        words.append(f"max_concurrent={key.max_concurrent}")
    if key.tokens_per_minute is not None:
        words.append(f"tokens_per_minute={key.tokens_per_minute}")
    if key.is_disabled:
        words.append(_DISABLED)
    return " ".join(words)


def _parse_line(content: str) -> ApiKey:
    name, *words = content.split()
    if not name.endswith(":") or not _NAME.fullmatch(name[:-1]):
        raise ValueError(
            "must begin with a name of 1 to 64 characters of [A-Za-z0-9._:-] and a colon"
        )
    digests = [word for word in words if word.startswith(HASH_PREFIX)]
    if not digests or not all(map(_HASH.fullmatch, digests)):
        raise ValueError(f"needs {HASH_PREFIX} and 64 hexadecimal digits, as edge.keys prints them")
    options: dict[str, str] = {}
    for word in words:
        option, _, value = word.partition("=")
        if option in options:
            raise ValueError("something is given twice")
        if word not in digests:
            options[option] = value
    is_disabled = _DISABLED in words
    if is_disabled:
        del options[_DISABLED]
    key = ApiKey(
        name[:-1],
        tuple(bytes.fromhex(word.removeprefix(HASH_PREFIX)) for word in digests),
        _number(options, "weight", float, _WEIGHTS),
        _number(options, "max_concurrent", int, _CONCURRENT),
        _number(options, "tokens_per_minute", int, _TOKENS_PER_MINUTE),
        is_disabled,
    )
    if options:
        # A secret that was put where its hash belongs must not be repeated.
        raise ValueError(
            "knows weight=, max_concurrent=, tokens_per_minute= and disabled besides hashes"
        )
    return key


def _number(options: dict[str, str], name: str, kind: type[N], limits: tuple[N, N]) -> N | None:
    text = options.pop(name, None)
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{name} is not a number") from None
    least, most = limits
    if not least <= value <= most:  # nor is a NaN
        raise ValueError(f"{name} must be {least} to {most}")
    return value
