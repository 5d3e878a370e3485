"""Certificates of an authority of the tests' own."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme


@dataclass(frozen=True)
class Certificates:
    """PEM files of one authority and of two that it signed, and another authority."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path
    other_ca: Path
    # for a name that nothing is reached by
    named: Path
    named_key: Path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("tls")
    authority, other = trustme.CA(), trustme.CA()

    def write(name: str, certificate: trustme.LeafCert) -> tuple[Path, Path]:
        chain, key = directory / f"{name}.pem", directory / f"{name}.key"
        chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        key.write_bytes(certificate.private_key_pem.bytes())
        return chain, key

    for name, made in (("ca", authority), ("other", other)):
        made.cert_pem.write_to_path(str(directory / name))
    return Certificates(
        directory / "ca",
        *write("server", authority.issue_cert("127.0.0.1", "localhost")),
        *write("client", authority.issue_cert("edge")),
        directory / "other",
        *write("named", authority.issue_cert("worker.example")),
    )
