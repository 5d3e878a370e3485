"""Certificates that are exchanged: what gRPC is told of them, and when."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from inference_worker import server_certificates
from inference_worker.certificates import check_pair
from inference_worker.server_certificates import ServerCertificates


class Files:
    """A certificate and its key, which are made anew."""

    def __init__(self, directory: Path) -> None:
        self.certificate, self.key = directory / "cert.pem", directory / "key.pem"
        self.renew()

    def renew(self) -> None:
        made = trustme.CA().issue_cert("localhost")
        self.certificate.write_bytes(made.cert_chain_pems[0].bytes())
        self.key.write_bytes(made.private_key_pem.bytes())


def test_grpc_is_told_of_what_was_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(tmp_path)
    certificates = ServerCertificates(str(files.certificate), str(files.key), None)
    certificates.credentials()
    assert certificates._fetch() is None, "it began with these"
    files.renew()
    certificates.reload()
    assert certificates._fetch() is not None
    assert certificates._fetch() is None

    def check_as_they_change(certificate: str, key: str, flag: str) -> None:
        check_pair(certificate, key, flag)
        files.renew()

    with monkeypatch.context() as patch:
        patch.setattr(server_certificates, "check_pair", check_as_they_change)
        certificates.reload()
    assert certificates._fetch() is None, "nobody has looked at what is there now"
    certificates.reload()
    assert certificates._fetch() is not None
