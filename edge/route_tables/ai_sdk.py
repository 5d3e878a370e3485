"""The Vercel AI SDK's routes."""

from pydantic import BaseModel

from edge.dialects import ai_sdk
from edge.dialects import ai_sdk_schema as shape
from edge.operation import GENERATE_ERRORS, BodyParse, Generate, Operation
from edge.route_tables.bodies import from_body

_TEXT = {"text/plain": "The text of the answer as it comes. A failure breaks the body off."}


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
