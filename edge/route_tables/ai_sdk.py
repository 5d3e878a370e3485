"""The Vercel AI SDK's routes."""

from pydantic import BaseModel
from starlette.requests import Request

from edge.dialects import ai_sdk
from edge.dialects import ai_sdk_schema as shape
from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.operation import GENERATE_ERRORS, BodyParse, Generate, Operation
from edge.route_tables.bodies import from_body

_TEXT = {"text/plain": "The text of the answer as it comes. A failure breaks the body off."}


async def _resume(request: Request, limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    return ai_sdk.resume_chat(request.path_params["id"])


def operations(generate: Generate) -> list[Operation]:
    """Their rows."""

    def row(
        path: str, parse: BodyParse, summary: str, body: type[BaseModel], *, is_text: bool = False
    ) -> Operation:
        return Operation(
            "POST",
            path,
            generate(from_body(parse), ai_sdk.refuse),
            summary,
            None,
            GENERATE_ERRORS,
            body=body,
            events={} if is_text else {"": shape.UiMessageChunk},
            other_content=_TEXT if is_text else {},
            error=None,
            refuse=ai_sdk.refuse,
        )

    return [
        Operation(
            "GET",
            "/api/chat/{id:path}/stream",
            generate(_resume, ai_sdk.refuse_resume),
            "Streams a chat's latest answer again from its beginning, and on, to a useChat that resumes.",
            None,
            (*GENERATE_ERRORS, 410),
            events={"": shape.UiMessageChunk},
            other_answers={204: "There is none, or none any more."},
            error=None,
            refuse=ai_sdk.refuse,
        ),
        row(
            "/api/chat",
            ai_sdk.parse_chat,
            "Answers a conversation of the AI SDK's useChat as a UI message stream.",
            shape.AiSdkChatRequest,
        ),
        row(
            "/api/completion",
            ai_sdk.parse_completion,
            "Answers a prompt of the AI SDK's useCompletion as a UI message stream.",
            shape.AiSdkCompletionRequest,
        ),
        row(
            "/api/text",
            ai_sdk.parse_text,
            "Answers a conversation or a prompt of the AI SDK as plain text.",
            shape.AiSdkTextRequest,
            is_text=True,
        ),
    ]
