"""The v2 inference protocol of KServe and Triton: generate, generate_stream, and infer with tensors of text.

https://github.com/kserve/open-inference-protocol (generate_rest, inference_rest).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.responses import Response

from edge.dialects.common import field_names, new_id
from edge.dialects.dialect import ParsedRequest, PromptLimits, StreamEncoder, sse_data
from edge.dialects.schema import validate
from edge.dialects.triton_schema import (
    VERSION,
    TritonGenerateRequest,
    TritonInferRequest,
    TritonParameters,
)
from edge.dialects.triton_tensors import OUTPUT_NAME, read_inputs
from edge.errors import EdgeError, from_finish, invalid_request, server_error
from edge.finish_reason import finish_reason_name
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb

_SUCCESSES = (pb.FINISH_REASON_STOP, pb.FINISH_REASON_STOP_SEQUENCE, pb.FINISH_REASON_LENGTH)
_GENERATE_NAMES = field_names(
    {
        "prompt": "text_input",
        "prompt.text": "text_input",
        "sampling": "parameters",
        "stopping.max_tokens": "parameters.max_tokens",
        "stopping.stop_sequences": "parameters.stop",
        "stopping.stop_token_ids": "parameters.stop_token_ids",
        "output.echo": "parameters.exclude_input_in_output",
    }
)
_INFER_NAMES = field_names(
    {"prompt": "text_input", "prompt.text": "text_input", "stopping.stop_sequences": "stop"}
)


def parse_generate(
    body: Mapping[str, Any],
    limits: PromptLimits,  # noqa: ARG001
    path: Mapping[str, str],
) -> ParsedRequest:
    """POST /v2/models/{model}/generate."""
    return _generate(body, path, streamed=False)


def parse_stream(
    body: Mapping[str, Any],
    limits: PromptLimits,  # noqa: ARG001
    path: Mapping[str, str],
) -> ParsedRequest:
    """POST /v2/models/{model}/generate_stream."""
    return _generate(body, path, streamed=True)


def parse_infer(
    body: Mapping[str, Any], limits: PromptLimits, path: Mapping[str, str]
) -> ParsedRequest:
    """POST /v2/models/{model}/infer."""
    check_version(path)
    request = validate(TritonInferRequest, body)
    inputs = read_inputs(request, limits.max_prompts)
    parameters = validate(TritonParameters, inputs.parameters)
    generation_id = new_id("infer")
    ids = [generation_id]
    if len(inputs.texts) > 1:
        ids = [f"{generation_id}-{index}" for index in range(len(inputs.texts))]
    return ParsedRequest(
        generation_id,
        [
            _message(request_id, path, text, parameters)
            for request_id, text in zip(ids, inputs.texts, strict=True)
        ],
        False,
        _never,
        partial(TensorCollector, request.id, inputs.shape),
        _INFER_NAMES,
    )


def _never() -> StreamEncoder:
    raise AssertionError("tensors are never streamed")


def check_version(path: Mapping[str, str]) -> None:
    """There is one. Raises a 404 for another."""
    if path.get("version", VERSION) != VERSION:
        raise EdgeError(
            404, "not_found_error", f"The model has version {VERSION} alone.", "model_not_found"
        )


def refuse(error: EdgeError, request_id: str = "") -> Response:  # noqa: ARG001
    """A failure before the 200."""
    return Response(
        _error(error),
        status_code=error.status,
        headers=error.http_headers(),
        media_type="application/json",
    )


def _error(error: EdgeError) -> bytes:
    return encode({"error": error.message})


def _generate(body: Mapping[str, Any], path: Mapping[str, str], *, streamed: bool) -> ParsedRequest:
    check_version(path)
    request = validate(TritonGenerateRequest, body)
    parameters = request.parameters or TritonParameters()
    if parameters.stream is not None and parameters.stream != streamed:
        raise invalid_request(
            "parameters.stream contradicts the route: generate answers in one piece, generate_stream streams.",
            "parameters.stream",
        )
    generation_id = new_id("generate")
    shape = partial(_Answer, request.id, bool(parameters.details))
    return ParsedRequest(
        generation_id,
        [_message(generation_id, path, request.text_input, parameters)],
        streamed,
        lambda: TritonEncoder(shape()),
        lambda: TritonCollector(shape()),
        _GENERATE_NAMES,
    )


def _message(
    request_id: str, path: Mapping[str, str], text: str, parameters: TritonParameters
) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id,
        model=path["model"],
        prompt=pb.Prompt(text=text),
        sampling=parameters.sampling(),
        stopping=parameters.stopping(parameters.max_tokens),
        output=pb.Output(echo=True if parameters.exclude_input_in_output is False else None),
    )


class _Answer:
    """The fields around the text."""

    def __init__(self, given_id: str | None, has_details: bool) -> None:
        self._given_id = given_id
        self._has_details = has_details
        self.started = pb.Started()

    def json(self, text: str, finished: pb.Finished | None = None) -> bytes:
        """One answer, or one event of several."""
        answer: dict[str, Any] = {} if self._given_id is None else {"id": self._given_id}
        answer |= model_json(self.started.model) | {"text_output": text}
        if self._has_details and finished is not None:
            answer |= {
                "details": {
                    "finish_reason": finish_reason_name(finished.finish_reason),
                    "prompt_tokens": finished.usage.prompt_tokens,
                    "completion_tokens": finished.usage.completion_tokens,
                }
            }
        return encode(answer)

    @property
    def has_footer(self) -> bool:
        return self._has_details


def model_json(name: str) -> dict[str, Any]:
    """What every answer says of the model."""
    return {"model_name": name, "model_version": VERSION}


def _check_success(finished: pb.Finished) -> None:
    if finished.finish_reason not in _SUCCESSES:
        raise from_finish(finished.finish_reason) or server_error()


class TritonEncoder(StreamEncoder):
    """One event for each delta. With details a last one has no text but the details; no terminator follows."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:  # noqa: ARG002
        """The event of one message."""
        match message.WhichOneof("event"):
            case "started":
                self._answer.started = message.started
            case "delta" if message.delta.text:
                return sse_data(self._answer.json(message.delta.text))
            case "finished":
                _check_success(message.finished)
                if self._answer.has_footer:
                    return sse_data(self._answer.json("", message.finished))
            case _:
                pass
        return b""

    def end(self) -> bytes:
        """Nothing."""
        return b""

    def error(self, error: EdgeError) -> bytes:
        """The event of a failure."""
        return sse_data(_error(error))


class TritonCollector:
    """Messages to one answer."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer
        self._text: list[str] = []
        self._finished = pb.Finished()

    def add(self, prompt: int, message: pb.GenerateResponse) -> None:  # noqa: ARG002
        """Takes one message."""
        match message.WhichOneof("event"):
            case "started":
                self._answer.started = message.started
            case "delta":
                self._text.append(message.delta.text)
            case "finished":
                _check_success(message.finished)
                self._finished = message.finished
            case _:
                pass

    def body(self) -> bytes:
        """The whole answer."""
        return self._answer.json("".join(self._text), self._finished)


class TensorCollector:
    """Messages to one tensor of texts, in the shape of the input's."""

    def __init__(self, given_id: str | None, shape: list[int]) -> None:
        self._given_id = given_id
        self._shape = shape
        self._model = ""
        self._texts: dict[int, list[str]] = {}

    def add(self, prompt: int, message: pb.GenerateResponse) -> None:
        """Takes one message."""
        match message.WhichOneof("event"):
            case "started":
                self._model = message.started.model
                self._texts[prompt] = []
            case "delta":
                self._texts[prompt].append(message.delta.text)
            case "finished":
                _check_success(message.finished)
            case _:
                pass

    def body(self) -> bytes:
        """The whole answer."""
        texts = ["".join(parts) for _, parts in sorted(self._texts.items())]
        output = {
            "name": OUTPUT_NAME,
            "datatype": "BYTES",
            "shape": self._shape,
            "data": texts,
        }
        answer: dict[str, Any] = {} if self._given_id is None else {"id": self._given_id}
        return encode(answer | model_json(self._model) | {"outputs": [output]})
