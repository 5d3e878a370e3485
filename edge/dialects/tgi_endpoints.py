"""TGI's routes that do not generate: GET /info and POST /tokenize."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edge.dialects.common import shown_bytes
from edge.dialects.dialect import PromptLimits
from edge.dialects.schema import validate
from edge.dialects.tgi import NAMES, refuse
from edge.dialects.tgi_schema import TgiTokenizeRequest
from edge.errors import EdgeError
from edge.gate import caller_of
from edge.info_endpoints import json_response
from edge.presence import while_there
from edge.request_body import beside_the_loop, read_parsed
from edge.request_log import record_of
from edge.version import version_of_sluice
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb


class TgiEndpoints:
    """Short answers."""

    def __init__(self, workers: WorkerPool, limits: PromptLimits) -> None:
        self._workers = workers
        self._limits = limits

    async def info(self, request: Request) -> Response:
        """What is served."""
        try:
            model = await self._workers.get_model()
        except EdgeError as error:
            return _refused(request, error)
        return json_response(
            {
                "model_id": model.model,
                "model_dtype": model.dtype,
                "model_device_type": model.device.partition(":")[0],
                "model_pipeline_tag": "text-generation",
                "max_input_tokens": model.context_length - 1,
                "max_total_tokens": model.context_length,
                "router": "sluice",
                "version": version_of_sluice(),
            }
        )

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text, special ones before it included."""
        try:
            body = await read_parsed(request, self._limits, partial(validate, TgiTokenizeRequest))
            prompt = pb.Prompt(text=body.inputs)
            asked = pb.TokenizeRequest(prompt=prompt, caller=caller_of(request.scope))
            answer = await while_there(request.receive, self._workers.tokenize(asked))
        except EdgeError as error:
            error.rename_param(NAMES)
            return _refused(request, error)

        def tell() -> Response:
            return json_response(_spans(body.inputs, answer.token_ids, answer.tokens))

        return await beside_the_loop(tell, len(body.inputs))


def _refused(request: Request, error: EdgeError) -> Response:
    record_of(request.scope).error(error)
    return refuse(error)


def _spans(text: str, token_ids: Sequence[int], tokens: Sequence[bytes]) -> list[dict[str, Any]]:
    """Each token with its place in the text, in characters; one that is not in it (BOS) has an empty place.

    A character that several tokens make is in the place of each.
    """
    data, at = text.encode(), 0
    spans, begun = [], 0  # characters that begin before `at`
    for token_id, token in zip(token_ids, tokens, strict=True):
        shown = token
        if not data.startswith(shown, at):
            shown = token.removeprefix(b" ")  # which some tokenizers put before a text
        if not shown or not data.startswith(shown, at):
            start = stop = begun
        else:
            start = begun - _continues(data, at)
            begun += sum(byte & 0xC0 != 0x80 for byte in shown)
            at += len(shown)
            stop = begun
        spans.append({"id": token_id, "text": shown_bytes(token), "start": start, "stop": stop})
    return spans


def _continues(data: bytes, at: int) -> bool:
    """Whether the byte there continues a character that begins before it."""
    return at < len(data) and data[at] & 0xC0 == 0x80
