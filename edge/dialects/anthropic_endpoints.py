"""Anthropic's POST /v1/messages/count_tokens."""

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edge.dialects.anthropic import NAMES, refuse, to_chat
from edge.dialects.anthropic_schema import AnthropicFields
from edge.dialects.dialect import PromptLimits
from edge.dialects.schema import validate
from edge.errors import EdgeError
from edge.gate import caller_of
from edge.info_endpoints import json_response
from edge.presence import while_there
from edge.request_body import read_parsed
from edge.request_log import record_of
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb


class CountTokens:
    """Tells how long a prompt is, without an answer to it."""

    def __init__(self, workers: WorkerPool, limits: PromptLimits) -> None:
        self._workers = workers
        self._limits = limits

    async def answer(self, request: Request) -> Response:
        """The length of the prompt that the messages make."""
        try:
            asked = await read_parsed(request, self._limits, _parse)
            if (caller := caller_of(request.scope)) is not None:
                asked.caller.CopyFrom(caller)
            answer = await while_there(request.receive, self._workers.tokenize(asked))
        except EdgeError as error:
            error.rename_param(NAMES)
            record = record_of(request.scope)
            record.error(error)
            return refuse(error, record.request_id)
        return json_response({"input_tokens": len(answer.token_ids)})


def _parse(fields: Mapping[str, Any]) -> pb.TokenizeRequest:
    body = validate(AnthropicFields, fields)
    return pb.TokenizeRequest(model=body.model, prompt=pb.Prompt(chat=to_chat(body)))
