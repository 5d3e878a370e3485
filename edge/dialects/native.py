"""The native dialect: POST and GET /v1/streams, the contract's messages as typed server-sent events."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from google.protobuf import duration_pb2

from edge.dialects.common import (
    WHILE_UNREAD,
    WhileUnread,
    field_names,
    new_id,
    shown_bytes,
    shown_float,
    shown_logprob,
    window_message,
)
from edge.dialects.dialect import Collector, ParsedRequest, PromptLimits, StreamEncoder
from edge.dialects.native_schema import StreamFields, StreamQuery, StreamRequest
from edge.dialects.schema import validate
from edge.errors import EdgeError, invalid_request
from edge.finish_reason import finish_reason_name
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb

_ID_PREFIX = "stream"
# An event's id is the stream's name and the event's number, and says whether it is the last. A stream's name is what
# the worker keeps it by, or else its request's id: that has a hyphen, which the other never has.
_LAST_EVENT_ID = re.compile(r"(stream-)?([0-9A-Za-z_]{16,128})-([0-9]{1,19})(-end)?")
_END = "-end"


_LIST_PARAMETERS = frozenset({"stop", "stop_token_ids"})


def parse(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:  # noqa: ARG001
    """A POST in the contract's words."""
    stream = validate(StreamRequest, body)
    given = [
        name for name in ("prompt", "token_ids", "messages") if getattr(stream, name) is not None
    ]
    if len(given) != 1:
        raise invalid_request(
            "Give exactly one of prompt, token_ids and messages.", given[1] if given else "prompt"
        )
    constraint = None if stream.constraint is None else stream.constraint.message()
    prompt = _prompt(stream)
    if stream.special_tokens is not None:
        prompt.special_tokens = stream.special_tokens
    return _parsed(stream, prompt, constraint=constraint)


def _prompt(stream: StreamRequest) -> pb.Prompt:
    if stream.messages is not None:
        chat = pb.Chat(messages=[message.message() for message in stream.messages])
        for tool in stream.tools or []:
            schema = None if tool.parameters is None else encode(tool.parameters).decode()
            chat.tools.add(name=tool.name, description=tool.description, parameters=schema)
        return pb.Prompt(chat=chat)
    if stream.tools:
        raise invalid_request("Tools go with messages alone.", "tools")
    if stream.token_ids is not None:
        return pb.Prompt(token_ids=pb.TokenIds(ids=stream.token_ids))
    return pb.Prompt(text=stream.prompt or "")


def parse_query(parameters: list[tuple[str, str]], limits: PromptLimits) -> ParsedRequest:
    """The parameters of a GET in the contract's words."""
    values: dict[str, Any] = {}
    for name, value in parameters:
        if name in _LIST_PARAMETERS:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise invalid_request(f"{name} is given twice.", name)
        else:
            values[name] = value
    query = validate(StreamQuery, values, strict=False)
    prompt = pb.Prompt(text=query.prompt, special_tokens=query.special_tokens)
    return _parsed(query, prompt, limits.resume_window_seconds, while_unread="park")


def resume(last_event_id: str) -> ParsedRequest | None:
    """The rest of a stream, for a reader who reconnects; None if it saw the last event.

    The id of a last event says that it is the last, so that nobody need remember streams for it. Raises a 410 for the
    id of a stream that is not kept.
    """
    match = _LAST_EVENT_ID.fullmatch(last_event_id)
    if match is not None and match[4]:
        return None
    if match is None or match[1]:
        raise EdgeError(
            410,
            "invalid_request_error",
            "The stream broke off and cannot be resumed; begin a new one without Last-Event-ID.",
            "resume_not_supported",
            "Last-Event-ID",
            is_retryable=False,
        )
    _, resume_id, number, _ = match.groups()
    request = pb.GenerateRequest(
        resume=pb.Resume(resume_id=resume_id, after_sequence_number=int(number))
    )
    encoder = partial(NativeEncoder, resume_id, is_kept=True)
    # The stream's name is a secret, which has no place in a log.
    return ParsedRequest(
        new_id("resume"), [request], True, encoder, _never, lambda _: "Last-Event-ID"
    )


def _parsed(
    stream: StreamFields,
    prompt: pb.Prompt,
    window: float = 0,
    while_unread: WhileUnread = "continue",
    constraint: pb.Constraint | None = None,
) -> ParsedRequest:
    if stream.resume_window is not None:
        window = stream.resume_window
    if stream.while_unread is not None and not window:
        raise invalid_request("Only with a resume_window.", "while_unread")
    request_id = new_id(_ID_PREFIX)
    request = pb.GenerateRequest(
        request_id=request_id,
        model=stream.model,
        prompt=prompt,
        sampling=stream.sampling(),
        stopping=stream.stopping(stream.max_tokens),
        output=pb.Output(
            logprobs=stream.logprobs,
            token_ids=stream.return_token_ids,
            echo=stream.echo,
            prompt_logprobs=stream.prompt_logprobs,
        ),
        n=stream.n,
        priority=stream.priority,
        constraint=constraint,
        resume_window=window_message(window),
        while_unread=(
            WHILE_UNREAD[stream.while_unread or while_unread]
            if window
            else pb.WHILE_UNREAD_UNSPECIFIED
        ),
        timeout=stream.timeout_duration(),
    )
    names = field_names(
        {
            "prompt": "prompt",
            "prompt.text": "prompt",
            "prompt.special_tokens": "special_tokens",
            "prompt.chat": "messages",
            "prompt.chat.messages": "messages",
            "prompt.chat.tools": "tools",
            "prompt.token_ids": "token_ids",
            "prompt.token_ids.ids": "token_ids",
            "stopping.stop_sequences": "stop",
            "output.token_ids": "return_token_ids",
            "constraint": "constraint",
        }
    )
    encoder = partial(NativeEncoder, request_id)
    return ParsedRequest(request_id, [request], True, encoder, _never, names)


def _never() -> Collector:
    raise AssertionError("this dialect always streams")


class NativeEncoder(StreamEncoder):
    """Messages to `started`, `delta`, `finished` and `failed` events."""

    def __init__(self, name: str, is_kept: bool = False) -> None:
        """`name` is the stream's, until its header says that it is kept under another."""
        self._name = name
        self._is_kept = is_kept
        self._next_sequence_number = 0
        self._encoders: dict[str, Callable[[Any], dict[str, Any]]] = {
            "started": _started_json,
            "delta": _delta_json,
            "finished": _finished_json,
        }

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:  # noqa: ARG002
        """The event of one message."""
        kind = message.WhichOneof("event")
        self._next_sequence_number = message.sequence_number + 1
        if kind is None or kind == "heartbeat" or kind == "resumed":
            return b""
        if kind == "started" and message.started.HasField("resume_id"):
            self._name, self._is_kept = message.started.resume_id, True
        data = self._encoders[kind](getattr(message, kind))
        is_last = message.finished.HasField("usage")
        return self._event(kind, message.sequence_number, data, is_last)

    def end(self) -> bytes:
        """Nothing: the last `finished` is the end."""
        return b""

    def error(self, error: EdgeError) -> bytes:
        """The event of a failure; none where a reader had better come back."""
        if error.is_resumable and self._is_kept:
            return b""
        return self._event("failed", self._next_sequence_number, error.body(), is_last=True)

    def _event(
        self,
        kind: Literal["started", "delta", "finished", "failed"],
        sequence_number: int,
        data: dict[str, Any],
        is_last: bool,
    ) -> bytes:
        end = _END if is_last else ""
        place = f"{self._name}-{sequence_number}{end}"
        # The id comes last: fetch-event-source takes it for read though the connection breaks before the data.
        return f"event: {kind}\ndata: ".encode() + encode(data) + f"\nid: {place}\n\n".encode()


def _started_json(started: pb.Started) -> dict[str, Any]:
    sampling = {
        descriptor.name: shown_float(value) if isinstance(value, float) else value
        for descriptor, value in started.sampling.ListFields()
        if descriptor.name != "logit_bias"
    }
    return {
        "request_id": started.request_id,
        "model": started.model,
        "created": started.created_at.seconds,
        "prompt_tokens": started.prompt_tokens,
        "cached_tokens": started.cached_tokens,
        "queue_position": started.queue_position,
        "max_tokens": started.max_tokens,
        "n": started.n,
        "sampling": sampling,
    }


def _delta_json(delta: pb.Delta) -> dict[str, Any]:
    data: dict[str, Any] = {
        "choice_index": delta.choice_index,
        "text": delta.text,
        "token_count": delta.token_count,
    }
    if delta.is_prompt:
        data["is_prompt"] = True
    if delta.reasoning:
        data["reasoning"] = delta.reasoning
    if delta.tool_calls:
        data["tool_calls"] = [_call_json(call) for call in delta.tool_calls]
    if delta.token_ids:
        data["token_ids"] = list(delta.token_ids)
    if delta.logprobs:
        data["logprobs"] = [
            {**_candidate_json(entry.token), "top": [_candidate_json(top) for top in entry.top]}
            for entry in delta.logprobs
        ]
    return data


def _call_json(call: pb.ToolCallDelta) -> dict[str, Any]:
    first = {"id": call.id, "name": call.name} if call.HasField("name") else {}
    return {"index": call.index, **first, "arguments": call.arguments}


def _candidate_json(candidate: pb.Candidate) -> dict[str, Any]:
    return {
        "token_id": candidate.token_id,
        "token": shown_bytes(candidate.token),
        "bytes": list(candidate.token),
        "logprob": shown_logprob(candidate),
    }


def _finished_json(finished: pb.Finished) -> dict[str, Any]:
    data: dict[str, Any] = {
        "choice_index": finished.choice_index,
        "finish_reason": finish_reason_name(finished.finish_reason),
    }
    matched = finished.WhichOneof("matched")
    if matched is not None:
        data[matched] = getattr(finished, matched)
    if finished.HasField("usage"):
        usage = finished.usage
        data["usage"] = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        }
    if finished.HasField("timings"):
        data["timings"] = {
            f"{descriptor.name}_seconds": _seconds(value)
            for descriptor, value in finished.timings.ListFields()
        }
    return data


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
