"""Checks TLS certificates where they are named, so that a bad one stops the start instead of every connection."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator


def check_pair(certificate: str, key: str, certificate_flag: str) -> None:
    """Check that two PEM files are a certificate and its private key; both may be "" for none. Raises: ValueError."""
    if bool(certificate) != bool(key):
        raise ValueError(f"must be given together with {certificate_flag}")
    if certificate:
        with _explained():
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)


def check_roots(roots: str) -> None:
    """Check that a PEM file holds certificates; "" is none. Raises: ValueError."""
    if roots:
        with _explained():
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(roots)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:  # which is an OSError, too
        reason = (error.reason or "not PEM").lower().replace("_", " ")
        raise ValueError(f"cannot be used ({reason})") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
