"""Writes the messages of one stream: numbered, with what the request asked for and nothing else."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from google.protobuf import duration_pb2

from inference_worker.chat.format import THINK_END
from inference_worker.chat.output import CallPiece, ChatOutput, Piece, Reasoning, Text
from inference_worker.continuation import DeliveredRequest
from inference_worker.engine import event
from inference_worker.engine.request import Request, SamplingParams
from inference_worker.generate_request import Reading
from inference_worker.served_model import ModelInfo
from inference_worker.tokenizer import Tokenizer
from protos.sluice.v1 import generation_pb2 as pb


class StreamWriter:
    """Makes the GenerateResponse messages of one stream. Made when the request is admitted."""

    def __init__(self, reading: Reading, model: ModelInfo, tokenizer: Tokenizer) -> None:
        self._reading = reading
        self._model = model
        self._tokenizer = tokenizer
        self._created_at = time.time_ns()
        self._sequence_number = reading.first_sequence_number
        # Ids of tokens of deltas that were not worth a message; they go with the choice's next one.
        self._untold: defaultdict[int, list[int]] = defaultdict(list)
        # Where the output is told apart, and once it has begun: one for each choice.
        self._chats: list[ChatOutput] = []

    def started(
        self, request: Request | None, cached_tokens: int, queue_position: int
    ) -> pb.GenerateResponse:
        """The header. Without a request, one that ended before its prompt was tokenized: its tokens count as none."""
        message = self._next()
        started = message.started
        started.request_id = self._reading.request_id
        started.model = self._model.name
        started.prompt_tokens = 0 if request is None else len(request.prompt)
        started.cached_tokens = cached_tokens
        started.queue_position = queue_position
        started.sampling.CopyFrom(sampling_message(self._reading.sampling, self._model))
        started.sampling.seed = self._reading.sampling.seed
        started.max_tokens = (
            self._reading.max_tokens or 0 if request is None else request.stopping.max_tokens
        )
        started.n = self._reading.n
        started.is_continuable = self._reading.is_continuable
        started.created_at.FromNanoseconds(self._created_at)
        if request is not None and self._reading.is_told_apart:
            self._begin_chat(request)
        return message

    def delta(self, delta: event.Delta) -> Iterator[pb.GenerateResponse]:
        """Items; none if it has nothing that was asked for."""
        if self._chats and not delta.is_prompt:
            pieces = self._chats[delta.choice_index].push(delta.text)
            yield from self._told_apart(delta, pieces)
        elif delta.text or delta.is_prompt or self._wants_tokens(delta):
            message = self._item(delta)
            message.delta.text = delta.text
            yield message
        else:
            self._hold(delta)

    def _begin_chat(self, request: Request) -> None:
        constraint = self._reading.constraint
        # what a constraint leaves no end of reasoning in is the answer, however the prompt ends
        may_reason = constraint is None or THINK_END in constraint.text
        is_reasoning = may_reason and self._tokenizer.opens_reasoning(request.prompt)
        chat_format, names = self._tokenizer.chat_format, self._reading.tools.names
        self._chats = [
            ChatOutput(
                chat_format,
                names,
                is_reasoning=is_reasoning,
                is_parallel=self._reading.tools.is_parallel,
                delivered=self._reading.delivered.outputs.get(index),
            )
            for index in range(self._reading.n)
        ]

    def _told_apart(
        self, delta: event.Delta, pieces: Sequence[Piece]
    ) -> Iterator[pb.GenerateResponse]:
        """A delta whose text is these pieces. The first item has the tokens."""
        groups = list(_groups(pieces))
        if not groups and self._wants_tokens(delta):
            groups.append([])
        if not groups:
            self._hold(delta)
        for index, group in enumerate(groups):
            message = self._item(delta if not index else event.Delta(delta.choice_index, "", ()))
            for piece in group:
                _add_piece(message.delta, piece)
            yield message

    def _hold(self, delta: event.Delta) -> None:
        self._untold[delta.choice_index] += [token.token_id for token in delta.tokens]

    def _wants_tokens(self, delta: event.Delta) -> bool:
        is_asked = self._reading.sends_token_ids or self._sends_logprobs(delta)
        return bool(delta.tokens) and is_asked

    def _item(self, delta: event.Delta) -> pb.GenerateResponse:
        """An item with all but its text."""
        token_ids = self._untold.pop(delta.choice_index, [])
        token_ids += [token.token_id for token in delta.tokens]
        sends_logprobs = self._sends_logprobs(delta)
        message = self._next()
        item = message.delta
        item.choice_index = delta.choice_index
        item.token_count = len(token_ids)
        item.is_prompt = delta.is_prompt
        is_continued = self._reading.is_continuable or self._reading.tells_token_ids
        if self._reading.sends_token_ids or (is_continued and not delta.is_prompt):
            item.token_ids.extend(token_ids)
        if sends_logprobs:
            item.logprobs.extend(map(self._logprob, delta.tokens))
        return message

    def finished(self, finished: event.Finished) -> Iterator[pb.GenerateResponse]:
        """A footer, after what was held back of a chat."""
        reason = finished.reason.name
        if self._chats:
            chat = self._chats[finished.choice_index]
            yield from self._told_apart(
                event.Delta(finished.choice_index, "", ()), list(chat.flush())
            )
            if chat.has_calls and finished.reason is event.FinishReason.STOP:
                reason = "TOOL_CALLS"
        yield self._footer(finished, pb.FinishReason.Value(f"FINISH_REASON_{reason}"))

    def _footer(
        self, finished: event.Finished, reason: pb.FinishReason.ValueType
    ) -> pb.GenerateResponse:
        message = self._next()
        footer = message.finished
        footer.choice_index = finished.choice_index
        footer.completion_tokens = finished.completion_tokens
        footer.finish_reason = reason
        if self._reading.sends_token_ids:
            footer.withheld_token_ids.extend([token.token_id for token in finished.withheld])
        if self._reading.output.logprobs is not None:
            footer.withheld_logprobs.extend(map(self._logprob, finished.withheld))
        if finished.stop_sequence is not None:
            footer.stop_sequence = finished.stop_sequence
        elif finished.stop_token_id is not None:
            footer.stop_token_id = finished.stop_token_id
        if (usage := finished.usage) is not None:
            footer.usage.prompt_tokens = usage.prompt_tokens
            footer.usage.completion_tokens = usage.completion_tokens
            footer.usage.cached_tokens = usage.cached_tokens
        if (timings := finished.timings) is not None:
            _set_seconds(footer.timings.queued, timings.queued)
            _set_seconds(footer.timings.prefill, timings.prefill)
            _set_seconds(footer.timings.decode, timings.decode)
            _set_seconds(footer.timings.time_to_first_token, timings.time_to_first_token)
        return message

    def heartbeat(self) -> pb.GenerateResponse:
        """A sign of life."""
        message = self._next()
        message.heartbeat.SetInParent()
        return message

    def _next(self) -> pb.GenerateResponse:
        message = pb.GenerateResponse(sequence_number=self._sequence_number)
        self._sequence_number += 1
        return message

    def _sends_logprobs(self, delta: event.Delta) -> bool:
        output = self._reading.output
        if delta.is_prompt:
            return output.prompt_logprobs
        return output.logprobs is not None

    def _logprob(self, token: event.Token) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            token=self._candidate(token),
            top=map(self._candidate, token.top),
        )

    def _candidate(self, token: event.Token | event.Candidate) -> pb.Candidate:
        return pb.Candidate(
            token_id=token.token_id,
            token=self._tokenizer.token_bytes(token.token_id),
            logprob=token.logprob,
        )


# In one delta reasoning comes before text and text before calls.
_RANKS: Final = {Reasoning: 0, Text: 1, CallPiece: 2}


def _groups(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces in as few groups as keep that order."""
    group: list[Piece] = []
    for piece in pieces:
        if group and _RANKS[type(piece)] < _RANKS[type(group[-1])]:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _add_piece(delta: pb.Delta, piece: Piece) -> None:
    match piece:
        case Reasoning():
            delta.reasoning += piece.text
        case Text():
            delta.text += piece.text
        case CallPiece():
            delta.tool_calls.add(
                index=piece.index, id=piece.call_id, name=piece.name, arguments=piece.arguments
            )


def sampling_message(sampling: SamplingParams, model: ModelInfo) -> pb.Sampling:
    """The parameters with every field set but the seed. "All" tokens of top_k are the whole vocabulary."""
    return pb.Sampling(
        temperature=sampling.temperature,
        top_k=model.vocabulary_size if sampling.top_k is None else sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
    )


def unstarted_endings(
    delivered: DeliveredRequest, n: int, reason: event.FinishReason
) -> Iterable[event.Finished]:
    """The footers of a request that ended before the engine had it."""
    footers = [
        event.Finished(index, reason, completion_tokens=delivered.num_tokens_of(index))
        for index in range(n)
        if index not in delivered.finished
    ]
    yield from footers[:-1]
    yield replace(
        footers[-1],
        usage=event.Usage(
            prompt_tokens=0, completion_tokens=delivered.num_tokens_in_usage, cached_tokens=0
        ),
        timings=event.Timings(queued=0.0, prefill=0.0, decode=0.0, time_to_first_token=0.0),
    )


def _set_seconds(duration: duration_pb2.Duration, seconds: float) -> None:
    duration.FromNanoseconds(round(seconds * 1e9))
