"""TGI's routes: POST /generate, /generate_stream and /, for the clients of text-generation-inference.

Differs from TGI where the worker does: a stop sequence is not part of the text. A stream has one event a token; where
an end-of-sequence token or a stop sequence ends it, the last event is a special token without text.
"""

import codecs
from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.responses import Response

from edge.dialects.common import field_names, new_id, shown_bytes, shown_logprob
from edge.dialects.dialect import ParsedRequest, PromptLimits, StreamEncoder, sse_data
from edge.dialects.schema import validate
from edge.dialects.tgi_schema import (
    DEFAULT_MAX_NEW_TOKENS,
    TgiGenerateRequest,
    TgiParameters,
    TgiRequest,
)
from edge.errors import EdgeError, from_finish, server_error
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "eos_token",
    pb.FINISH_REASON_STOP_SEQUENCE: "stop_sequence",
    pb.FINISH_REASON_LENGTH: "length",
}
NAMES = field_names(
    {
        "prompt": "inputs",
        "prompt.text": "inputs",
        "n": "parameters.best_of",
        "sampling": "parameters",
        "stopping.max_tokens": "parameters.max_new_tokens",
        "stopping.stop_sequences": "parameters.stop",
        "output.logprobs": "parameters.top_n_tokens",
        "output.prompt_logprobs": "parameters.decoder_input_details",
        "constraint": "parameters.grammar",
    }
)


def parse(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """POST /, whose unstreamed answer is a list."""
    request = validate(TgiRequest, body)
    return _parsed(request, streamed=bool(request.stream), is_listed=True)


def parse_generate(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """POST /generate."""
    return _parsed(validate(TgiGenerateRequest, body), streamed=False)


def parse_stream(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """POST /generate_stream."""
    return _parsed(validate(TgiGenerateRequest, body), streamed=True)


def refuse(error: EdgeError, request_id: str = "") -> Response:  # noqa: ARG001
    """A failure before the 200, as TGI tells it."""
    kind = "generation" if error.status >= 500 or error.status == 499 else "validation"
    if error.status == 429:
        kind = "overloaded"  # which huggingface_hub turns into its OverloadedError
    elif error.status in (401, 403):
        kind = "authentication"  # which it leaves as the HTTP error that it is
    return Response(
        _error(error, kind),
        status_code=error.status,
        headers=error.http_headers(),
        media_type="application/json",
    )


def _error(error: EdgeError, kind: str) -> bytes:
    return encode({"error": error.message, "error_type": kind})


def _parsed(
    request: TgiGenerateRequest, *, streamed: bool, is_listed: bool = False
) -> ParsedRequest:
    parameters = request.parameters or TgiParameters()
    parameters.refuse_unsupported()
    if streamed:
        parameters.refuse_streamed()
    generation_id = new_id("tgi")
    shows_prompt = bool(parameters.details and parameters.decoder_input_details)
    message = pb.GenerateRequest(
        request_id=generation_id,
        prompt=pb.Prompt(text=request.inputs),
        sampling=parameters.sampling(),
        stopping=pb.Stopping(
            max_tokens=DEFAULT_MAX_NEW_TOKENS
            if parameters.max_new_tokens is None
            else parameters.max_new_tokens,
            stop_sequences=parameters.stop or [],
        ),
        output=pb.Output(
            echo=shows_prompt or None,
            prompt_logprobs=shows_prompt or None,
            logprobs=parameters.top_n_tokens or 0 if _wants_tokens(parameters, streamed) else None,
        ),
        n=parameters.best_of,
    )
    if parameters.grammar is not None:
        message.constraint.CopyFrom(parameters.grammar.constraint())
    before = request.inputs if parameters.return_full_text else ""
    return ParsedRequest(
        generation_id,
        [message],
        streamed,
        partial(TgiEncoder, before, parameters.top_n_tokens or 0),
        partial(TgiCollector, before, parameters, is_listed),
        NAMES,
    )


def _wants_tokens(parameters: TgiParameters, streamed: bool) -> bool:
    is_compared = (parameters.best_of or 1) > 1
    return streamed or is_compared or bool(parameters.details or parameters.top_n_tokens)


class _Tokens:
    """The tokens of one choice, each with its part of the text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ahead = ""  # text whose token is still to come
        self.text: list[str] = []

    def add(self, delta: pb.Delta) -> list[dict[str, Any]]:
        """The tokens of a delta; their texts, joined over the whole choice, are its text."""
        self.text.append(delta.text)
        parts = [self._decoder.decode(entry.token.token) for entry in delta.logprobs]
        text = self._ahead + delta.text
        self._ahead = ""
        if not parts:
            self._ahead = text
            return []
        if "".join(parts) != text:  # a special token, a held stop sequence, a first space
            parts = [""] * (len(parts) - 1) + [text]
        return [
            _token(entry.token, part) for entry, part in zip(delta.logprobs, parts, strict=True)
        ]

    def last(self, finished: pb.Finished) -> dict[str, Any]:
        """The token that ends the text and is no part of it."""
        return {
            "id": finished.stop_token_id,
            "text": self._ahead,
            "logprob": 0.0,
            "special": True,
        }


def _token(candidate: pb.Candidate, text: str) -> dict[str, Any]:
    return {
        "id": candidate.token_id,
        "text": text,
        "logprob": shown_logprob(candidate),
        "special": False,
    }


def _top_tokens(entry: pb.TokenLogprob) -> list[dict[str, Any]]:
    return [_token(candidate, shown_bytes(candidate.token)) for candidate in entry.top]


def _finish_reason(finished: pb.Finished) -> str:
    reason = _FINISH_REASONS.get(finished.finish_reason)
    if reason is None:
        raise from_finish(finished.finish_reason) or server_error()
    return reason


class TgiEncoder(StreamEncoder):
    """Messages to one event a token; the last has the whole text. No terminator follows."""

    def __init__(self, before: str, top_n: int) -> None:
        self._before = before
        self._top_n = top_n
        self._tokens = _Tokens()
        self._started = pb.Started()
        self._index = 0
        # The token that max_tokens makes the last waits for its footer; any other is sent at once.
        self._waiting: tuple[dict[str, Any], list[dict[str, Any]]] | None = None

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:  # noqa: ARG002
        """The events of one message."""
        match message.WhichOneof("event"):
            case "started":
                self._started = message.started
                return b""
            case "delta":
                return self._delta(message.delta)
            case "finished":
                return self._finished(message.finished)
            case _:
                return b""

    def end(self) -> bytes:
        """Nothing: the event with the whole text was the last."""
        return b""

    def error(self, error: EdgeError) -> bytes:
        """The event of a failure."""
        return sse_data(_error(error, "incomplete_generation"))

    def _delta(self, delta: pb.Delta) -> bytes:
        events = []
        for token, entry in zip(self._tokens.add(delta), delta.logprobs, strict=False):
            self._index += 1
            if self._index == self._started.max_tokens:
                self._waiting = token, _top_tokens(entry)
            else:
                events.append(self._event(token, _top_tokens(entry)))
        return b"".join(events)

    def _finished(self, finished: pb.Finished) -> bytes:
        reason = _finish_reason(finished)
        if self._waiting is None:
            self._index += 1
            self._waiting = self._tokens.last(finished), []
        token, top = self._waiting
        details = {
            "finish_reason": reason,
            "generated_tokens": finished.usage.completion_tokens,
            "input_length": self._started.prompt_tokens,
            "seed": _seed(self._started),
        }
        text = self._before + "".join(self._tokens.text)
        return self._event(token, top, text, details)

    def _event(
        self,
        token: dict[str, Any],
        top: list[dict[str, Any]],
        text: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> bytes:
        event = {"index": self._index, "token": token, "generated_text": text, "details": details}
        if self._top_n:
            event["top_tokens"] = top
        return sse_data(encode(event))


def _seed(started: pb.Started) -> int | None:
    """Greedy draws have none."""
    return started.sampling.seed if started.sampling.temperature > 0 else None


class _Output:
    """One choice of an unstreamed answer."""

    def __init__(self) -> None:
        self.tokens = _Tokens()
        self.shown: list[dict[str, Any]] = []
        self.top: list[list[dict[str, Any]]] = []
        self.prefill: list[dict[str, Any]] = []
        self.finished = pb.Finished()

    def add(self, delta: pb.Delta) -> None:
        if delta.is_prompt:
            for entry in delta.logprobs:
                shown = _token(entry.token, shown_bytes(entry.token.token))
                del shown["special"]
                self.prefill.append(shown)
            return
        self.shown += self.tokens.add(delta)
        self.top += map(_top_tokens, delta.logprobs)

    def mean_logprob(self) -> float:
        """How likely it is, for each token."""
        logprobs: list[float] = [token["logprob"] for token in self.shown]
        return sum(logprobs) / max(1, len(logprobs))


class TgiCollector:
    """Messages to one answer."""

    def __init__(self, before: str, parameters: TgiParameters, is_listed: bool) -> None:
        self._before = before
        self._parameters = parameters
        self._is_listed = is_listed
        self._started = pb.Started()
        self._outputs: list[_Output] = []

    def add(self, prompt: int, message: pb.GenerateResponse) -> None:  # noqa: ARG002
        """Takes one message."""
        match message.WhichOneof("event"):
            case "started":
                self._started = message.started
                self._outputs = [_Output() for _ in range(message.started.n)]
            case "delta":
                self._outputs[message.delta.choice_index].add(message.delta)
            case "finished":
                self._outputs[message.finished.choice_index].finished = message.finished
            case _:
                pass

    def body(self) -> bytes:
        """The likeliest output, and with details how it came about."""
        reasons = {id(output): _finish_reason(output.finished) for output in self._outputs}
        best, *others = sorted(self._outputs, key=_Output.mean_logprob, reverse=True)
        answer: dict[str, Any] = {"generated_text": self._text(best)}
        if self._parameters.details:
            answer["details"] = self._details(best, reasons[id(best)])
            if others:
                answer["details"]["best_of_sequences"] = [
                    {"generated_text": self._text(other)} | self._details(other, reasons[id(other)])
                    for other in others
                ]
        return encode([answer] if self._is_listed else answer)

    def _text(self, output: _Output) -> str:
        return self._before + "".join(output.tokens.text)

    def _count(self, output: _Output) -> int:
        """Of several outputs the worker only tells how many tokens they have together."""
        if len(self._outputs) == 1:
            return output.finished.usage.completion_tokens
        return len(output.shown) + output.finished.HasField("stop_token_id")

    def _details(self, output: _Output, reason: str) -> dict[str, Any]:
        shown = output.shown
        if reason != "length":
            shown = [*shown, output.tokens.last(output.finished)]
        details: dict[str, Any] = {
            "finish_reason": reason,
            "generated_tokens": self._count(output),
            "seed": _seed(self._started),
            "prefill": output.prefill,
            "tokens": shown,
        }
        if self._parameters.top_n_tokens:
            details["top_tokens"] = [*output.top, *([[]] * (len(shown) - len(output.top)))]
        return details
