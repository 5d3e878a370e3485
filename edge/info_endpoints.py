"""The endpoints that do not generate: models, health, readiness, abort."""

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edge.drain import Drain
from edge.errors import EdgeError, invalid_request
from edge.gate import caller_of
from edge.json_codec import encode
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def json_response(value: Any, status: int = 200) -> Response:
    """A JSON body."""
    return Response(encode(value), status, media_type="application/json")


class InfoEndpoints:
    """Short answers."""

    def __init__(self, workers: WorkerPool, drain: Drain) -> None:
        self._workers = workers
        self._drain = drain

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        """Alive as long as it answers."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:  # noqa: ARG002
        """Ready while a worker serves, until the shutdown begins."""
        reason = "the server is shutting down" if self._drain.is_stopping else self._workers.reason
        if self._drain.is_stopping or not self._workers.is_serving:
            return json_response({"status": "not_ready", "reason": reason}, 503)
        return json_response({"status": "ready", "reason": None})

    async def models(self, request: Request) -> Response:  # noqa: ARG002
        """The list of one."""
        model = await self._workers.get_model()
        return json_response({"object": "list", "data": [_model_json(model.model, model)]})

    async def model(self, request: Request) -> Response:
        """The served model under the name that was asked for."""
        name = request.path_params["model"]
        return json_response(_model_json(name, await self._workers.get_model(name)))

    async def abort(self, request: Request) -> Response:
        """Says what it did."""
        request_id = request.path_params["request_id"]
        if not _REQUEST_ID.fullmatch(request_id):
            raise invalid_request("Not a request id.", "request_id")
        message = pb.AbortRequest(request_id=request_id)
        outcome = await self._workers.abort(message, caller_of(request.scope))
        if outcome == pb.ABORT_OUTCOME_ABORTED:
            return json_response({"request_id": request_id, "outcome": "aborted"})
        if outcome == pb.ABORT_OUTCOME_ALREADY_FINISHED:
            return json_response({"request_id": request_id, "outcome": "already_finished"})
        raise EdgeError(
            404,
            "not_found_error",
            "No such request is known.",
            "request_not_found",
            "request_id",
        )


def _model_json(name: str, model: pb.GetModelResponse) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.loaded_at.seconds,
        "owned_by": "sluice",
        "root": model.model,
        "aliases": list(model.aliases),
        "max_model_len": model.context_length,
        "kv_cache_bytes": model.kv_cache_bytes,
        "kv_bytes_per_token": model.kv_bytes_per_token,
    }
