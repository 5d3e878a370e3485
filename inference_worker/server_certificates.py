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
        # What the next connection is to find; None once gRPC has it.
        self._next: grpc.ServerCertificateConfiguration | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """What a server listens with; TLS from version 1.2 on. Raises: OSError."""
        return grpc.dynamic_ssl_server_credentials(
            self._read(),
            self._fetch,  # type: ignore[arg-type]  # None, for no change, is missing from the types
            require_client_authentication=self._client_roots is not None,
        )

    def reload(self) -> None:
        """Read the files again, for connections to come. What cannot be used changes nothing and is told in the log."""
        try:
            check_pair(self._certificate, self._key, "--tls-cert")
            check_roots(self._client_roots or "")
            self._next = self._read()
        except (ValueError, OSError) as error:
            get_logger().error("certificates not reloaded", reason=str(error))
        else:
            get_logger().info("certificates reloaded")

    def _read(self) -> grpc.ServerCertificateConfiguration:
        pair = (Path(self._key).read_bytes(), Path(self._certificate).read_bytes())
        roots = None if self._client_roots is None else Path(self._client_roots).read_bytes()
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called for every connection, on threads of gRPC."""
        configuration, self._next = self._next, None
        return configuration
