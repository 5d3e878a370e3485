"""The v2 inference protocol's routes that do not generate: health and metadata."""

from starlette.requests import Request
from starlette.responses import Response

from edge.dialects.triton import check_version, refuse
from edge.dialects.triton_schema import VERSION
from edge.dialects.triton_tensors import OUTPUT_NAME
from edge.drain import Drain
from edge.errors import EdgeError, unavailable
from edge.info_endpoints import json_response
from edge.request_log import record_of
from edge.version import version_of_sluice
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb


class TritonEndpoints:
    """Short answers. What is not ready is a 503, since a 4xx would say that the question was wrong."""

    def __init__(self, workers: WorkerPool, drain: Drain) -> None:
        self._workers = workers
        self._drain = drain

    async def server(self, request: Request) -> Response:  # noqa: ARG002
        """What answers here."""
        extensions = ["generate"]
        return json_response(
            {"name": "sluice", "version": version_of_sluice(), "extensions": extensions}
        )

    async def live(self, request: Request) -> Response:  # noqa: ARG002
        """Alive as long as it answers."""
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        """Ready while a worker serves, until the shutdown begins."""
        if self._drain.is_stopping:
            return _refused(request, unavailable("The server is shutting down."))
        if not self._workers.is_serving:
            return _refused(request, unavailable(f"No worker is ready: {self._workers.reason}."))
        return json_response({"ready": True})

    async def model_ready(self, request: Request) -> Response:
        """The same for a model, which must be the served one."""
        try:
            await self._model(request)
        except EdgeError as error:
            return _refused(request, error)
        return await self.ready(request)

    async def model(self, request: Request) -> Response:
        """What the model takes and gives."""
        try:
            model = await self._model(request)
        except EdgeError as error:
            return _refused(request, error)
        return json_response(
            {
                "name": model.model,
                "versions": [VERSION],
                "platform": "sluice",
                "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [-1]}],
                "outputs": [{"name": OUTPUT_NAME, "datatype": "BYTES", "shape": [-1]}],
            }
        )

    async def _model(self, request: Request) -> pb.GetModelResponse:
        check_version(request.path_params)
        return await self._workers.get_model(request.path_params["model"])


def _refused(request: Request, error: EdgeError) -> Response:
    record_of(request.scope).error(error)
    return refuse(error)
