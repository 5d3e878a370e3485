"""The endpoints of /v1/responses that do not generate."""

import re

from starlette.requests import Request
from starlette.responses import Response

from edge.errors import EdgeError, invalid_request
from edge.gate import caller_of
from edge.info_endpoints import json_response
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb

_RESPONSE_ID = re.compile(r"resp_[0-9a-f]{32}")


class ResponsesEndpoints:
    """Short answers."""

    def __init__(self, workers: WorkerPool) -> None:
        self._workers = workers

    async def cancel(self, request: Request) -> Response:
        """Ends a response that is generated on another connection."""
        response_id = request.path_params["response_id"]
        outcome = pb.ABORT_OUTCOME_UNKNOWN
        if _RESPONSE_ID.fullmatch(response_id):
            outcome = await self._workers.abort(response_id, caller_of(request.scope))
        if outcome == pb.ABORT_OUTCOME_ABORTED:
            return json_response({"id": response_id, "object": "response", "status": "cancelled"})
        if outcome == pb.ABORT_OUTCOME_ALREADY_FINISHED:
            raise invalid_request(
                "The response has already ended.", "response_id", "already_finished"
            )
        raise EdgeError(
            404,
            "not_found_error",
            "No such response is known.",
            "response_not_found",
            "response_id",
        )
