"""Checks TLS certificates where they are named, so that a bad one stops the start instead of every connection."""

import contextlib
import ssl
from collections.abc import Iterator


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    """TLS of a server with the certificate and key in two PEM files. Raises: OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(certificate, key)
    return context


def check_pair(certificate: str, key: str, certificate_flag: str) -> None:
    """Checks that two PEM files are a certificate and its private key; both may be "" for none. Raises: ValueError."""
    if bool(certificate) != bool(key):
        raise ValueError(f"must be given together with {certificate_flag}")
    if certificate:
        with _explained():
            server_context(certificate, key)


def check_roots(roots: str) -> None:
    """Checks that a PEM file holds certificates; "" is none. Raises: ValueError."""
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
