"""What /v1/responses does with responses that were begun before: the worker keeps them for the resume window."""

from functools import partial
from typing import Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from edge.dialects import responses
from edge.dialects.common import new_id
from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.dialects.responses_output import IN_PROGRESS
from edge.dialects.responses_schema import ResponsesRequest
from edge.dialects.responses_state import ResponseState, is_request_id, resume_id_of
from edge.dialects.schema import RequestModel, Uint32, validate
from edge.error_response import error_response
from edge.errors import STREAM_NOT_FOUND, EdgeError, invalid_request, is_lost
from edge.gate import QUERY_PARAMETER, caller_of
from edge.generation import Generation
from edge.info_endpoints import json_response
from edge.request_body import read_parsed
from edge.request_timeout import duration
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb


class RetrieveQuery(RequestModel):
    """Parameters of GET /v1/responses/{id}."""

    stream: bool | None = Field(None, description="Answer with the response's events.")
    starting_after: Uint32 | None = Field(
        None, description="With stream: leave out the events up to this sequence number."
    )
    include_obfuscation: Literal[False] | None = None

    UNSUPPORTED = frozenset({"include_obfuscation"})


class ResponsesEndpoints:
    """Parses requests that mean a kept response, and answers those that do not generate."""

    def __init__(self, workers: WorkerPool) -> None:
        self._workers = workers

    async def parse(self, request: Request, limits: PromptLimits) -> ParsedRequest:
        """POST /v1/responses, after the conversation so far if it names a response."""

        def parse(fields: dict[str, Any]) -> ResponsesRequest | ParsedRequest:
            body = responses.read(fields)
            if body.previous_response_id is not None:
                return body
            return responses.build(body, limits)

        made = await read_parsed(request, limits, parse)
        if isinstance(made, ParsedRequest):
            return made
        return responses.build(made, limits, await self._before(made, request))

    async def _before(self, body: ResponsesRequest, request: Request) -> list[pb.ChatMessage]:
        """The conversation that it goes on with."""
        try:
            previous = await self._load(body.previous_response_id or "", request)
        except EdgeError as error:
            if error.code != "response_not_found":
                raise
            raise _not_found("previous_response_id") from None
        if previous.status == IN_PROGRESS:
            raise invalid_request(
                "The response is still in progress.", "previous_response_id", "in_progress"
            )
        return [*previous.conversation, previous.output.as_message()]

    async def parse_events(self, request: Request, limits: PromptLimits) -> ParsedRequest:  # noqa: ARG002
        """GET /v1/responses/{id}?stream=true: its events as they were and come."""
        query = _query(request)
        response_id = request.path_params["response_id"]
        first = 0 if query.starting_after is None else query.starting_after + 1
        return ParsedRequest(
            new_id("resume"),  # the response's own id is a secret, which has no place in a log
            [_resume(response_id, is_snapshot=False)],
            True,
            partial(responses.ResponsesEncoder, response_id, {}, first),
            partial(responses.ResponsesCollector, response_id, {}),
            lambda _: "response_id",
        )

    async def retrieve(self, request: Request) -> Response:
        """GET /v1/responses/{id}: what there is of it by now."""
        state = await self._load(request.path_params["response_id"], request)
        return json_response(state.as_json())

    async def cancel(self, request: Request) -> Response:
        """Ends a response that is generated on another connection."""
        response_id = request.path_params["response_id"]
        if (resume_id := resume_id_of(response_id)) is not None:
            message = pb.AbortRequest(resume_id=resume_id)
        elif is_request_id(response_id):
            message = pb.AbortRequest(request_id=response_id)
        else:
            raise _not_found("response_id")
        outcome = await self._workers.abort(message, caller_of(request.scope))
        if outcome == pb.ABORT_OUTCOME_ABORTED:
            return json_response({"id": response_id, "object": "response", "status": "cancelled"})
        if outcome == pb.ABORT_OUTCOME_ALREADY_FINISHED:
            raise invalid_request(
                "The response has already ended.", "response_id", "already_finished"
            )
        raise _not_found("response_id")

    async def delete(self, request: Request) -> Response:
        """Has the worker forget a response; ends it, if it is still generated."""
        response_id = request.path_params["response_id"]
        if (resume_id := resume_id_of(response_id)) is None:
            raise _not_found("response_id")
        message = pb.AbortRequest(resume_id=resume_id, forget=True)
        outcome = await self._workers.abort(message, caller_of(request.scope))
        if outcome == pb.ABORT_OUTCOME_UNKNOWN:
            raise _not_found("response_id")
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def _load(self, response_id: str, request: Request) -> ResponseState:
        """The response as it is by now. Raises a 404 where it is not kept."""
        message = _resume(response_id, is_snapshot=True)
        if (caller := caller_of(request.scope)) is not None:
            message.caller.CopyFrom(caller)
        message.timeout.CopyFrom(duration(self._workers.settings.connect_timeout_seconds))
        state = ResponseState(response_id)
        generation = Generation([message], lambda _: "response_id")
        try:
            for first in await generation.open(self._workers):
                state.add(first)
            while (item := await generation.read()) is not None:
                state.add(item[1])
        except EdgeError as error:
            # Without a reason of the worker's it is our call that failed, from which nothing follows for the response.
            is_ours = error.grpc_code is not None and error.reason in (None, STREAM_NOT_FOUND)
            if is_ours or not state.is_started or is_lost(error):
                raise _told(error) from None
            state.fail(error)
        finally:
            generation.cancel()
        return state


class Retrieval:
    """GET /v1/responses/{id}, which is two operations in one: an ASGI endpoint."""

    def __init__(self, endpoints: ResponsesEndpoints, events: ASGIApp) -> None:
        """`events` answers with `parse_events`."""
        self._endpoints = endpoints
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if _query(request).stream:
            await self._events(scope, receive, send)
            return
        response = await self._endpoints.retrieve(request)
        await response(scope, receive, send)


def _query(request: Request) -> RetrieveQuery:
    given = {name: value for name, value in request.query_params.items() if name != QUERY_PARAMETER}
    query = validate(RetrieveQuery, given, strict=False)
    if query.starting_after is not None and not query.stream:
        raise invalid_request("Only with stream.", "starting_after")
    return query


def refuse(error: EdgeError, request_id: str) -> Response:
    """A refusal as OpenAI has it: what is not kept is not found."""
    return error_response(_told(error), request_id)


def _told(error: EdgeError) -> EdgeError:
    if error.code != "stream_gone":
        return error
    return _not_found("response_id", "The beginning of this response is no longer kept.")


def _resume(response_id: str, *, is_snapshot: bool) -> pb.GenerateRequest:
    resume_id = resume_id_of(response_id)
    if resume_id is None:
        raise _not_found("response_id")
    return pb.GenerateRequest(resume=pb.Resume(resume_id=resume_id, snapshot=is_snapshot))


def _not_found(param: str, message: str = "No such response is known.") -> EdgeError:
    return EdgeError(404, "not_found_error", message, "response_not_found", param)
