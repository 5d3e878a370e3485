"""A service of one's own: stubs generated from the contract, and nothing else of this repository.

Run with the folder of the stubs and the worker's address; answers calls on stdin as `foreign_process` asks.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2

stubs, address = sys.argv[1:]
sys.path.insert(0, stubs)
from protos.sluice.v1 import generation_pb2 as pb  # noqa: E402
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc  # noqa: E402

DETAILS = {
    detail.DESCRIPTOR.full_name: detail
    for detail in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.RetryInfo,
        error_details_pb2.BadRequest,
    )
}
stub = pb_grpc.GenerationServiceStub(grpc.insecure_channel(address))


def where() -> str:
    """The file that the stubs are in."""
    return str(pb.__file__)


def stream(request: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
    """All messages."""
    call = stub.Generate(json_format.ParseDict(request, pb.GenerateRequest()), timeout=timeout)
    return [
        json_format.MessageToDict(message, preserving_proto_field_name=True) for message in call
    ]


def leave(request: dict[str, Any]) -> dict[str, str]:
    """The first delta's text of a call that is then cancelled, and the status that it ended with."""
    call = stub.Generate(json_format.ParseDict(request, pb.GenerateRequest()))
    text = next(message.delta.text for message in call if message.HasField("delta"))
    call.cancel()
    return {"text": text, "code": call.code().name}


def told(error: grpc.RpcError) -> dict[str, Any]:
    """A call's failure, its details by their names."""
    fields: dict[str, Any] = {"name": error.code().name, "message": error.details()}
    metadata: Any = error.trailing_metadata()  # whose type says less than it is
    for key, value in metadata:
        if key == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(value).details:
                kind = packed.type_url.rpartition("/")[2]
                detail = DETAILS[kind].FromString(packed.value)
                fields[kind] = json_format.MessageToDict(detail)
    return fields


for line in sys.stdin:
    asked = json.loads(line)
    try:
        reply = {"value": globals()[asked["call"]](**asked["arguments"])}
    except grpc.RpcError as error:
        reply = {"raised": told(error)}
    print(json.dumps(reply), flush=True)
