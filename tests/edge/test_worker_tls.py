"""TLS between edge and worker, with real certificates."""

import grpc
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc
from tests.edge.certificates import Certificates
from tests.edge.edge_process import PATIENCE, running_edge
from tests.edge.tls_client import status_of
from tests.worker.worker_process import ready_worker


async def test_edge_and_worker_know_each_other_by_certificate(certificates: Certificates) -> None:
    flags = {
        "--tls-cert": certificates.server,
        "--tls-key": certificates.server_key,
        "--tls-client-ca": certificates.ca,
    }
    trust = {"worker_ca": certificates.ca}
    shown = trust | {"worker_cert": certificates.client, "worker_key": certificates.client_key}
    async with ready_worker(*(f"{name}={value}" for name, value in flags.items())) as worker:
        async with running_edge(worker.address, **shown) as edge:
            assert await status_of(edge) == 200
        for wrong in (
            {},
            trust,
            shown | {"worker_ca": certificates.other_ca},
            shown | {"worker_server_name": "worker.example"},
        ):
            async with running_edge(worker.address, **wrong) as edge:
                assert await status_of(edge) == 503
        channel = grpc.aio.insecure_channel(worker.address)
        stub: pb_grpc.GenerationServiceAsyncStub = pb_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await channel.close()


async def test_a_worker_is_known_by_another_name_than_it_is_reached_by(
    certificates: Certificates,
) -> None:
    flags = (f"--tls-cert={certificates.named}", f"--tls-key={certificates.named_key}")
    async with ready_worker(*flags) as worker:
        for name, status in (("worker.example", 200), ("", 503)):
            async with running_edge(
                worker.address, worker_ca=certificates.ca, worker_server_name=name
            ) as edge:
                assert await status_of(edge) == status
