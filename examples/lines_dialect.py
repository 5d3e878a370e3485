"""A dialect in one file: Ollama's POST /api/generate, in newline-delimited JSON, with the options that Sluice has.

To serve it, put the file into `edge/dialects/` and a row into the route table, `operations` of `edge/routes.py`:

    Operation(
        "POST",
        "/ollama/api/generate",
        generate(from_body(lines_dialect.parse), lines_dialect.refuse),
        "Continues a text, as Ollama does.",
        lines_dialect.LinesAnswer,
        GENERATE_ERRORS,
        body=lines_dialect.LinesRequest,
        events={"": lines_dialect.LinesAnswer},
        stream_type=lines_dialect.LINES,
        error=lines_dialect.LinesFailure,
        refuse=lines_dialect.refuse,
    ),

Nothing else: keys, limits, deadlines, cancelling, failover, the log, the metrics and /openapi.json go by the row.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Final

from pydantic import BaseModel
from starlette.responses import Response

from edge.dialects.common import field_names, new_id
from edge.dialects.dialect import (
    Headers,
    ParsedRequest,
    PromptLimits,
    StreamEncoder,
    stream_headers,
)
from edge.dialects.schema import Float, Int64, Items, RequestModel, Uint32, validate
from edge.errors import EdgeError, from_finish
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb

LINES: Final = "application/x-ndjson"
_REASONS: Final = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_STOP_SEQUENCE: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}
# What the worker's fields are called here, for the refusals that name one.
_NAMES: Final = field_names(
    {
        "prompt.text": "prompt",
        "sampling": "options",
        "stopping.max_tokens": "options.num_predict",
        "stopping.stop_sequences": "options.stop",
    }
)


class LinesOptions(RequestModel):
    """How tokens are drawn, and when to end."""

    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Uint32 | None = None
    seed: Int64 | None = None
    num_predict: Uint32 | None = None
    stop: Items[str] | None = None


class LinesRequest(RequestModel):
    """The body. Streamed unless it says otherwise."""

    model: str
    prompt: str
    stream: bool = True
    options: LinesOptions = LinesOptions()


class LinesAnswer(BaseModel):
    """A line of a stream, of which the last one is done; or the whole answer."""

    model: str
    response: str
    done: bool
    done_reason: str | None = None
    prompt_eval_count: int | None = None
    eval_count: int | None = None


class LinesFailure(BaseModel):
    """The body of a refusal, and the last line of a stream that failed."""

    error: str


def parse(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """The body in the contract's words."""
    asked = validate(LinesRequest, body)
    options = asked.options
    message = pb.GenerateRequest(
        request_id=new_id("lines"),
        model=asked.model,
        prompt=pb.Prompt(text=asked.prompt),
        sampling=pb.Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k or None,
            seed=options.seed,
        ),
        stopping=pb.Stopping(max_tokens=options.num_predict, stop_sequences=options.stop),
    )
    encoder = partial(Encoder, asked.model)
    whole = partial(Whole, asked.model)
    return ParsedRequest(message.request_id, [message], asked.stream, encoder, whole, _NAMES)


def refuse(error: EdgeError, request_id: str = "") -> Response:  # noqa: ARG001
    """A failure before the 200."""
    return Response(_failure(error), error.status, error.http_headers(), "application/json")


def _failure(error: EdgeError) -> bytes:
    return encode(LinesFailure(error=error.message).model_dump())


def _line(model: str, message: pb.GenerateResponse) -> LinesAnswer | None:
    if message.HasField("delta"):
        return LinesAnswer(model=model, response=message.delta.text, done=False)
    if not message.HasField("finished"):
        return None
    finished = message.finished
    failure = from_finish(finished.finish_reason)
    if failure is not None:
        raise failure
    return LinesAnswer(
        model=model,
        response="",
        done=True,
        done_reason=_REASONS[finished.finish_reason],
        prompt_eval_count=finished.usage.prompt_tokens,
        eval_count=finished.usage.completion_tokens,
    )


class Encoder(StreamEncoder):
    """A line for each message."""

    headers: ClassVar[Headers] = stream_headers(LINES)
    ping = b""  # there is no line that means nothing
    is_cut_on_error = False  # every reader knows the last line for a failure

    def __init__(self, model: str) -> None:
        self._model = model

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:  # noqa: ARG002
        """The line, or nothing."""
        line = _line(self._model, message)
        return b"" if line is None else encode(line.model_dump(exclude_none=True)) + b"\n"

    def end(self) -> bytes:
        """Nothing: the line that is done is the end."""
        return b""

    def error(self, error: EdgeError) -> bytes:
        """The last line of a stream that failed."""
        return _failure(error) + b"\n"


class Whole:
    """All lines as one."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._lines: list[LinesAnswer] = []

    def add(self, prompt: int, message: pb.GenerateResponse) -> None:  # noqa: ARG002
        """Takes one message."""
        if (line := _line(self._model, message)) is not None:
            self._lines.append(line)

    def body(self) -> bytes:
        """The last line, with the text of all."""
        text = "".join(line.response for line in self._lines)
        return encode(self._lines[-1].model_copy(update={"response": text}).model_dump())
