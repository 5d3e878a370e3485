"""The certificates of the gRPC server, which can be exchanged while it runs."""

from __future__ import annotations

from pathlib import Path

import grpc

from inference_worker.certificates import check_pair, check_roots
from inference_worker.request_log import get_logger


class ServerCertificates:
    """From PEM files: a certificate, its private key and, where clients need a certificate too, the roots of theirs."""

    def __init__(self, certificate: str, key: str, client_roots: str | None) -> None:
        self._certificate, self._key, self._client_roots = certificate, key, client_roots
        self._latest: grpc.ServerCertificateConfiguration | None = None  # for connections to come
        self._told: grpc.ServerCertificateConfiguration | None = None  # which gRPC has

    def credentials(self) -> grpc.ServerCredentials:
        """What a server listens with; TLS from version 1.2 on. Once. Raises: OSError."""
        self._latest = self._told = _configuration(*self._read())
        return grpc.dynamic_ssl_server_credentials(
            self._latest,
            self._fetch,  # type: ignore[arg-type]  # None, for no change, is missing from the types
            require_client_authentication=self._client_roots is not None,
        )

    def reload(self) -> None:
        """Read the files again, for connections to come. What cannot be used changes nothing and is told in the log."""
        try:
            contents = self._read()
            check_pair(self._certificate, self._key, "--tls-cert")
            check_roots(self._client_roots or "")
            if self._read() != contents:  # so that what was checked may not be what was read
                raise ValueError("the files changed meanwhile")
            self._latest = _configuration(*contents)
        except (ValueError, OSError) as error:
            get_logger().error("certificates not reloaded", reason=str(error))
        else:
            get_logger().info("certificates reloaded")

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        roots = None if self._client_roots is None else Path(self._client_roots).read_bytes()
        return Path(self._key).read_bytes(), Path(self._certificate).read_bytes(), roots

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC does not have yet. Called for every connection, on threads of gRPC.

        Nothing that `reload` writes is written here: a reload at this very moment is found by the next call.
        """
        latest = self._latest
        if latest is self._told:
            return None
        self._told = latest
        return latest


def _configuration(
    key: bytes, certificate: bytes, roots: bytes | None
) -> grpc.ServerCertificateConfiguration:
    pairs = [(key, certificate)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=roots)
