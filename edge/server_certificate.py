"""The certificate that clients are shown, which can be exchanged while the edge runs."""

import ssl

import structlog

from edge.certificates import check_pair, server_context

_log = structlog.get_logger("edge")


class ServerCertificate:
    """From two PEM files: the certificate with those between it and its root, and its private key."""

    def __init__(self, certificate: str, key: str) -> None:
        """Raises: OSError."""
        self._certificate, self._key = certificate, key
        # Whoever has begun a handshake goes on with the one that was there then.
        self.context: ssl.SSLContext = server_context(certificate, key)

    def reload(self) -> None:
        """Reads the files again. What cannot be used changes nothing and is told in the log."""
        try:
            check_pair(self._certificate, self._key, "--tls-cert")
            self.context = server_context(self._certificate, self._key)
        except (ValueError, OSError) as error:  # changed between the two, perhaps
            _log.error("certificate not reloaded", reason=f"{self._certificate}: {error}")
        else:
            _log.info("certificate reloaded")
