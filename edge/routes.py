"""The route table: what is served where, and what its document says."""

from dataclasses import replace

from pydantic import BaseModel
from starlette.requests import Request

from edge import response_schema as shape
from edge.dialects import (
    anthropic,
    anthropic_schema,
    native,
    native_frames,
    native_schema,
    openai_chat,
    openai_chat_schema,
    openai_completions,
    responses_answer_schema,
    responses_endpoints,
    responses_schema,
)
from edge.dialects.anthropic_endpoints import CountTokens
from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.dialects.tgi_endpoints import TgiEndpoints
from edge.dialects.triton_endpoints import TritonEndpoints
from edge.drain import Drain
from edge.error_response import Refuse, error_response
from edge.gate import QUERY_PARAMETER, Gate
from edge.generate_endpoint import GenerateEndpoint, Parse
from edge.info_endpoints import InfoEndpoints
from edge.operation import GENERATE_ERRORS, Generate, Operation
from edge.route_tables import ai_sdk, socket, tgi, triton
from edge.route_tables.bodies import from_body
from edge.settings import EdgeSettings
from edge.socket_endpoint import SocketEndpoint
from edge.worker_pool import WorkerPool


def operations(
    workers: WorkerPool, drain: Drain, settings: EdgeSettings, gate: Gate
) -> list[Operation]:
    """All of them but the document's own and the probes'."""
    info = InfoEndpoints(workers, drain)

    def generate(parse: Parse, refuse: Refuse = error_response) -> GenerateEndpoint:
        return GenerateEndpoint(parse, refuse, workers, drain, settings)

    return [
        Operation(
            "POST",
            "/v1/chat/completions",
            generate(from_body(openai_chat.parse)),
            "Answers a conversation, as OpenAI does.",
            shape.ChatCompletion,
            GENERATE_ERRORS,
            body=openai_chat_schema.ChatCompletionRequest,
            events={"": shape.ChatCompletionChunk},
        ),
        Operation(
            "POST",
            "/v1/completions",
            generate(from_body(openai_completions.parse)),
            "Continues texts, as OpenAI does.",
            shape.Completion,
            GENERATE_ERRORS,
            body=openai_completions.CompletionRequest,
            events={"": shape.Completion},
        ),
        Operation(
            "GET",
            "/v1/models",
            info.models,
            "Lists the served model.",
            shape.ModelList,
            (500, 503, 504),
        ),
        Operation(
            "GET",
            "/v1/models/{model:path}",
            info.model,
            "Describes the served model, by its name or an alias.",
            shape.ModelObject,
            (404, 500, 503, 504),
        ),
        *_responses_operations(generate, responses_endpoints.ResponsesEndpoints(workers)),
        *_native_operations(generate, info),
        *_anthropic_operations(generate, CountTokens(workers, PromptLimits.of(settings))),
        *tgi.operations(generate, TgiEndpoints(workers, PromptLimits.of(settings))),
        *ai_sdk.operations(generate),
        *socket.operations(SocketEndpoint(workers, drain, settings, gate)),
        *triton.operations(generate, TritonEndpoints(workers, drain)),
        Operation(
            "POST",
            "/v1/tokens",
            gate.token,
            "Gives a short-lived token in place of the API key, for a GET's access_token parameter"
            " where no header can be set.",
            shape.AccessToken,
            (404,),
        ),
    ]


def _responses_operations(
    generate: Generate, endpoints: responses_endpoints.ResponsesEndpoints
) -> list[Operation]:
    shape = responses_answer_schema
    return [
        Operation(
            "POST",
            "/v1/responses",
            generate(endpoints.parse),
            "Answers a conversation, as OpenAI's Responses do.",
            shape.ResponsesAnswer,
            GENERATE_ERRORS,
            body=responses_schema.ResponsesRequest,
            events=dict(shape.EVENTS),
        ),
        Operation(
            "GET",
            "/v1/responses/{response_id}",
            responses_endpoints.Retrieval(
                endpoints, generate(endpoints.parse_events, responses_endpoints.refuse)
            ),
            "A response that is kept: what there is of it, or its events, also those to come.",
            shape.ResponsesAnswer,
            GENERATE_ERRORS,
            query=responses_endpoints.RetrieveQuery,
            events=dict(shape.EVENTS),
        ),
        Operation(
            "DELETE",
            "/v1/responses/{response_id}",
            endpoints.delete,
            "Forgets a response that is kept, and ends it, if it is still generated.",
            shape.ResponsesDeleted,
            (404, 500, 503, 504),
        ),
        Operation(
            "POST",
            "/v1/responses/{response_id}/cancel",
            endpoints.cancel,
            "Ends a response that is generated on another connection.",
            shape.ResponsesCancelled,
            (400, 404, 500, 503, 504),
        ),
    ]


def _native_operations(generate: Generate, info: InfoEndpoints) -> list[Operation]:
    events: dict[str, type[BaseModel]] = {
        "started": shape.StreamStarted,
        "delta": shape.StreamDelta,
        "finished": shape.StreamFinished,
        "failed": shape.Error,
    }
    frames = {
        native_frames.MEDIA_TYPE: "The same as frames, where Accept asks for them: tag (1 byte), length (4 bytes,"
        " big-endian) and the event's data. Tags: started 2, delta 3, finished 4, failed 5."
    }
    reconnect = {204: "The stream that Last-Event-ID names has ended; an EventSource stops."}
    return [
        Operation(
            "POST",
            "/v1/streams",
            generate(_resumable(from_body(native.parse))),
            "Streams a generation as typed events.",
            None,
            (*GENERATE_ERRORS, 410),
            body=native_schema.StreamRequest,
            events=events,
            other_answers=reconnect,
            other_content=frames,
        ),
        Operation(
            "GET",
            "/v1/streams",
            generate(_resumable(_from_query)),
            "Streams a generation as typed events to an EventSource.",
            None,
            (*GENERATE_ERRORS, 410),
            query=native_schema.StreamQuery,
            events=events,
            other_answers=reconnect,
            other_content=frames,
        ),
        Operation(
            "DELETE",
            "/v1/streams/{request_id}",
            info.abort,
            "Aborts a generation that came over any connection, by the id in its answer. A request with several prompts"
            " is not found: close its connection.",
            shape.Aborted,
            (400, 404, 500, 503, 504),
        ),
    ]


def _anthropic_operations(generate: Generate, count_tokens: CountTokens) -> list[Operation]:
    events: dict[str, type[BaseModel]] = {
        "message_start": anthropic_schema.AnthropicMessageStart,
        "ping": anthropic_schema.AnthropicPing,
        "content_block_start": anthropic_schema.AnthropicBlockStart,
        "content_block_delta": anthropic_schema.AnthropicBlockDelta,
        "content_block_stop": anthropic_schema.AnthropicBlockStop,
        "message_delta": anthropic_schema.AnthropicMessageDelta,
        "message_stop": anthropic_schema.AnthropicMessageStop,
    }
    return [
        Operation(
            "POST",
            "/v1/messages",
            generate(from_body(anthropic.parse), anthropic.refuse),
            "Answers a conversation, as Anthropic does.",
            anthropic_schema.AnthropicAnswer,
            (*GENERATE_ERRORS, 529),
            body=anthropic_schema.AnthropicRequest,
            events=events,
            error=anthropic_schema.AnthropicError,
            refuse=anthropic.refuse,
        ),
        Operation(
            "POST",
            "/v1/messages/count_tokens",
            count_tokens.answer,
            "Counts the tokens of a conversation, as Anthropic does.",
            anthropic_schema.AnthropicTokenCount,
            (400, 404, 408, 413, 415, 429, 431, 500, 503, 504),
            body=anthropic_schema.AnthropicFields,
            error=anthropic_schema.AnthropicError,
            refuse=anthropic.refuse,
        ),
    ]


async def _from_query(request: Request, limits: PromptLimits) -> ParsedRequest:
    parameters = request.query_params.multi_items()
    given = [pair for pair in parameters if pair[0] != QUERY_PARAMETER]
    return native.parse_query(given, limits)


def _resumable(parse: Parse) -> Parse:
    """Gives readers that reconnect the rest of their stream, and others a new one, as events or as frames."""

    async def parse_or_resume(request: Request, limits: PromptLimits) -> ParsedRequest | None:
        last_event_id = request.headers.get("last-event-id", "")
        if last_event_id:
            return native.resume(last_event_id)
        if not native_frames.are_wanted(request.headers.get("accept", "")):
            return await parse(request, limits)
        parsed = await parse(request, replace(limits, resume_window_seconds=0))
        return None if parsed is None else native_frames.framed(parsed)

    return parse_or_resume
