"""Writes the messages of a stream of ours as those of vllm.grpc.engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from smg_grpc_proto import vllm_engine_pb2 as vllm

from inference_worker.errors import Interrupted
from inference_worker.vllm_engine.request import VllmRequest
from protos.sluice.v1 import generation_pb2 as pb

VllmResponse: TypeAlias = Any  # vllm.grpc.engine.GenerateResponse

# The words of their contract; SHUTDOWN is a status there.
_REASONS: Final = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_STOP_SEQUENCE: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "abort",
    pb.FINISH_REASON_DEADLINE: "abort",
}


@dataclass(slots=True)
class _Choice:
    """What has come of one choice."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)  # only what was not sent
    prompt_logprobs: list[pb.TokenLogprob] = field(default_factory=list)  # only what was not sent


class AnswerWriter:
    """Makes the answers to one request. Every token of the completion is in one, those that end it too."""

    def __init__(self, request: VllmRequest) -> None:
        self._is_streamed = bool(request.stream)
        params = request.sampling_params
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._num_top = params.logprobs if params.HasField("logprobs") else None
        self._num_prompt_top = params.prompt_logprobs
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._choices: dict[int, _Choice] = {}

    def answers(self, message: pb.GenerateResponse) -> Iterator[VllmResponse]:
        """The answers that a message brings; none where theirs has no such thing. Raises: Interrupted."""
        match message.WhichOneof("event"):
            case "started":
                self._prompt_tokens = message.started.prompt_tokens
                self._cached_tokens = message.started.cached_tokens
            case "delta":
                yield from self._delta(message.delta)
            case "finished":
                yield from self._finished(message.finished)
            case _:
                pass

    def _choice(self, index: int) -> _Choice:
        return self._choices.setdefault(index, _Choice())

    def _delta(self, delta: pb.Delta) -> Iterator[VllmResponse]:
        choice = self._choice(delta.choice_index)
        if delta.is_prompt:
            choice.prompt_logprobs += delta.logprobs
            return
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        if self._is_streamed and delta.token_ids:
            yield self._chunk(delta.choice_index, delta.token_ids)

    def _finished(self, finished: pb.Finished) -> Iterator[VllmResponse]:
        if finished.finish_reason == pb.FINISH_REASON_SHUTDOWN:
            raise Interrupted  # a caller may ask another worker; an answer would be final
        choice = self._choice(finished.choice_index)
        choice.token_ids += finished.withheld_token_ids
        choice.logprobs += finished.withheld_logprobs
        if finished.HasField("usage"):
            self._cached_tokens = finished.usage.cached_tokens
        if self._is_streamed and (finished.withheld_token_ids or choice.prompt_logprobs):
            yield self._chunk(finished.choice_index, finished.withheld_token_ids)
        complete = vllm.GenerateComplete(
            output_ids=choice.token_ids,
            finish_reason=_REASONS.get(finished.finish_reason, "error"),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=finished.completion_tokens,
            cached_tokens=self._cached_tokens,
            index=finished.choice_index,
            **self._take_logprobs(choice),
        )
        if finished.HasField("stop_sequence"):
            complete.matched_stop_str = finished.stop_sequence
        elif (
            finished.stop_token_id in self._stop_token_ids
        ):  # vLLM does not tell of the model's own
            complete.matched_token_id = finished.stop_token_id
        del self._choices[finished.choice_index]
        yield vllm.GenerateResponse(complete=complete)

    def _chunk(self, index: int, token_ids: Sequence[int]) -> VllmResponse:
        chunk = vllm.GenerateStreamChunk(
            token_ids=token_ids,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(token_ids),  # of this chunk: the reader adds them up
            cached_tokens=self._cached_tokens,
            index=index,
            **self._take_logprobs(self._choices[index]),
        )
        return vllm.GenerateResponse(chunk=chunk)

    def _take_logprobs(self, choice: _Choice) -> dict[str, Any]:
        """The log-probabilities that were asked for and not sent yet, as fields of an answer."""
        fields: dict[str, Any] = {}
        if self._num_top is not None and choice.logprobs:
            fields["output_logprobs"] = vllm.OutputLogProbs(
                token_logprobs=[scored.token.logprob for scored in choice.logprobs],
                token_ids=[scored.token.token_id for scored in choice.logprobs],
                top_logprobs=_tops(choice.logprobs, self._num_top),
            )
        if choice.prompt_logprobs:
            fields["input_logprobs"] = vllm.InputLogProbs(
                token_logprobs=[_input_logprob(scored.token) for scored in choice.prompt_logprobs],
                token_ids=[scored.token.token_id for scored in choice.prompt_logprobs],
                top_logprobs=_tops(choice.prompt_logprobs, self._num_prompt_top),
            )
        choice.logprobs, choice.prompt_logprobs = [], []
        return fields


def _tops(tokens: Iterable[pb.TokenLogprob], num_top: int) -> list[Any]:
    """The likeliest candidates of each token; none where none were asked for."""
    if not num_top:
        return []
    return [
        vllm.TopLogProbs(
            values=[candidate.logprob for candidate in scored.top[:num_top]],
            token_ids=[candidate.token_id for candidate in scored.top[:num_top]],
        )
        for scored in tokens
    ]


def _input_logprob(token: pb.Candidate) -> Any:
    """Unset for the first token of a prompt."""
    return vllm.InputTokenLogProb(value=token.logprob if token.HasField("logprob") else None)
