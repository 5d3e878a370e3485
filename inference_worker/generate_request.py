"""Reads a GenerateRequest: checks every field against the contract and resolves every default."""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from inference_worker.caller import Caller, read_caller, read_priority
from inference_worker.chat.format import ChatFormat, calls_grammar
from inference_worker.chat.request import Tools, read_tools
from inference_worker.continuation import DeliveredRequest, read_continuation
from inference_worker.count_limits import CountLimits
from inference_worker.engine.detokenizer import NewDetokenizer
from inference_worker.engine.fair_queue import Share
from inference_worker.engine.request import OutputParams, Request, SamplingParams, StoppingParams
from inference_worker.errors import ContextExceeded, InvalidField
from inference_worker.field_rules import (
    REQUEST_ID,
    check_at_least,
    check_count,
    check_range,
    refuse_unknown_fields,
)
from inference_worker.grammar.source import GrammarSource, read_constraint
from inference_worker.prompt import check_fits, check_prompt
from inference_worker.resume_terms import read_terms
from inference_worker.served_model import ModelInfo
from protos.sluice.v1 import generation_pb2 as pb

# A made seed passes unharmed through JSON, whose numbers many readers take for doubles.
_SEED_BITS: Final = 53


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask of this worker."""

    max_choices: int
    context_length: int  # tokens of prompt and completion together
    max_token_bytes: int | None  # bytes of text that one token can stand for, if known
    chat_format: ChatFormat  # whether there may be tools
    max_grammar_bytes: int  # bytes of a constraint's text
    counts: CountLimits  # of lists and texts
    takes_continuations: bool  # whether the engine goes on with what another one began

    @property
    def max_prompt_bytes(self) -> int | None:
        """Most bytes of text that can fit the context, if known."""
        if self.max_token_bytes is None:
            return None
        return self.context_length * self.max_token_bytes


@dataclass(frozen=True, slots=True)
class Reading:
    """A checked request, complete but for its prompt's token ids and its compiled grammar."""

    request_id: str
    prompt: pb.Prompt
    sampling: SamplingParams
    stop_sequences: tuple[str, ...]
    stop_token_ids: frozenset[int]
    max_tokens: int | None  # None: what fits
    output: OutputParams
    sends_token_ids: bool
    n: int
    delivered: DeliveredRequest
    first_sequence_number: int
    is_continuable: bool  # whether another worker may go on with it
    is_told_apart: bool  # whether there may be more in the output than text
    tools: Tools
    constraint: GrammarSource | None
    caller: Caller
    priority: int
    tells_token_ids: bool = False  # whether this worker may go on with it, and wants to know them

    @property
    def share(self) -> Share:
        """Of whatever there is not enough of for all at once."""
        return Share(self.caller.key_id, self.caller.weight, self.priority)

    def to_engine(
        self,
        prompt: list[int],
        limits: Limits,
        new_detokenizer: NewDetokenizer,
        admitted_at: float,
        deadline: float | None,
    ) -> Request:
        """Complete the request but for its grammar. Takes time in proportion to what was delivered of it.

        Raises: ContextExceeded, if prompt and completion can never fit; InvalidField, if what was delivered cannot have
        come from this prompt.
        """
        room = limits.context_length - len(prompt)
        least = 1 if self.max_tokens is None else min(self.max_tokens, 1)
        if room < least:
            raise ContextExceeded(
                "prompt",
                f"{len(prompt)} tokens leave no room for a completion; "
                f"at most {limits.context_length - least} fit",
                tokens=len(prompt),
                limit=limits.context_length - least,
            )
        if self.max_tokens is not None and self.max_tokens > room:
            total = len(prompt) + self.max_tokens
            raise ContextExceeded(
                "stopping.max_tokens",
                f"{len(prompt)} prompt tokens and {self.max_tokens} more are {total}; "
                f"at most {limits.context_length} fit",
                tokens=total,
                limit=limits.context_length,
            )
        max_tokens = room if self.max_tokens is None else self.max_tokens
        continuation, has_echo_left = self.delivered.to_engine(
            prompt, max_tokens, self.output.echo, self.stop_sequences, new_detokenizer, self.n
        )
        return Request(
            request_id=self.request_id,
            prompt=tuple(prompt),
            stopping=StoppingParams(max_tokens, self.stop_sequences, self.stop_token_ids),
            sampling=self.sampling,
            output=replace(
                self.output, prompt_logprobs=self.output.prompt_logprobs and has_echo_left
            ),
            n=self.n,
            continuation=continuation,
            share=self.share,
            deadline=deadline,
            is_continuable=self.is_continuable,
            admitted_at=admitted_at,
        )


def read_request(message: pb.GenerateRequest, model: ModelInfo, limits: Limits) -> Reading:
    """Check everything that can be checked without tokenizing.

    Raises: InvalidField, ContextExceeded, UnsupportedField.
    """
    refuse_unknown_fields(message, "")
    read_terms(message)  # what becomes of them is not the generation's to know
    if message.WhichOneof("source") is None:
        raise InvalidField("prompt", "is required")
    check_prompt(message.prompt, limits.chat_format, limits.counts)
    tools = read_tools(message.prompt.chat, "prompt.chat")
    check_fits(message.prompt, limits.max_prompt_bytes)
    n = message.n if message.HasField("n") else 1
    check_range("n", n, 1, limits.max_choices)
    output = _read_output(message.output, limits.counts)
    stopping = message.stopping
    sampling = _read_sampling(message.sampling, model, limits.counts)
    stop_token_ids = _read_stop_token_ids(stopping, model, limits.counts)
    max_tokens = _read_max_tokens(stopping, output)
    is_chat = message.prompt.WhichOneof("input") == "chat"
    is_told_apart = is_chat and (bool(tools.specs) or limits.chat_format.marks_reasoning)
    is_continued = message.HasField("continuation")
    if is_continued and sampling.temperature > 0 and not message.sampling.HasField("seed"):
        # one of our own making would draw other tokens than the first worker's
        raise InvalidField("sampling.seed", "a continuation needs the seed that `started` told")
    delivered = read_continuation(
        message.continuation,
        n,
        max_tokens=limits.context_length if max_tokens is None else max_tokens,
        vocabulary_size=model.vocabulary_size,
        stop_token_ids=stop_token_ids,
        is_told_apart=is_told_apart,
    )
    return Reading(
        request_id=_read_request_id(message),
        prompt=message.prompt,
        sampling=sampling,
        stop_sequences=_read_stop_sequences(stopping, limits.counts),
        stop_token_ids=stop_token_ids,
        max_tokens=max_tokens,
        output=output,
        sends_token_ids=message.output.token_ids,
        n=n,
        delivered=delivered,
        first_sequence_number=message.continuation.sequence_number,
        is_continuable=message.is_continuable and limits.takes_continuations,
        is_told_apart=is_told_apart,
        tools=tools,
        constraint=_read_constraint(message, tools, limits),
        caller=read_caller(message),
        priority=read_priority(message),
    )


def _read_constraint(
    message: pb.GenerateRequest, tools: Tools, limits: Limits
) -> GrammarSource | None:
    if not tools.is_required:
        if not message.HasField("constraint"):
            return None
        return read_constraint(
            message.constraint, limits.max_grammar_bytes, limits.counts.max_grammar_texts
        )
    if message.HasField("constraint"):
        raise InvalidField("constraint", "not together with a call that is required")
    path = "prompt.chat.tools"
    try:
        grammar = calls_grammar(limits.chat_format, tools.specs, is_parallel=tools.is_parallel)
    except (
        RecursionError
    ) as error:  # writing the schemas goes a little deeper than reading them did
        raise InvalidField(path, "are nested too deeply") from error
    check_count(path, len(grammar), limits.max_grammar_bytes, "bytes, where a call is required")
    return GrammarSource("lark", grammar, path)


def _read_request_id(message: pb.GenerateRequest) -> str:
    if not message.HasField("request_id"):
        return f"gen-{secrets.token_hex(12)}"
    if not REQUEST_ID.fullmatch(message.request_id):
        raise InvalidField("request_id", "must be 1 to 128 characters of [A-Za-z0-9._:-]")
    return message.request_id


def _read_sampling(message: pb.Sampling, model: ModelInfo, limits: CountLimits) -> SamplingParams:
    refuse_unknown_fields(message, "sampling")
    _check_sampling_ranges(message)
    default = model.default_sampling

    def choose(name: str, otherwise: float) -> float:
        if message.HasField(name):  # type: ignore[arg-type]
            return float(getattr(message, name))
        # In the contract's precision, so that `started` tells exactly what is in effect and a continuation of the
        # request draws alike.
        return float(struct.unpack("f", struct.pack("f", otherwise))[0])

    bias = message.logit_bias
    return SamplingParams(
        temperature=choose("temperature", default.temperature),
        top_k=message.top_k if message.HasField("top_k") else default.top_k,
        top_p=choose("top_p", default.top_p),
        min_p=choose("min_p", default.min_p),
        repetition_penalty=choose("repetition_penalty", default.repetition_penalty),
        presence_penalty=choose("presence_penalty", default.presence_penalty),
        frequency_penalty=choose("frequency_penalty", default.frequency_penalty),
        logit_bias=_read_logit_bias(message, model, limits) if bias else default.logit_bias,
        seed=message.seed if message.HasField("seed") else secrets.randbits(_SEED_BITS),
    )


def _check_sampling_ranges(message: pb.Sampling) -> None:
    if message.HasField("temperature"):
        check_range("sampling.temperature", message.temperature, 0, 100)
    if message.HasField("top_k"):
        check_at_least("sampling.top_k", message.top_k, 1)
    if message.HasField("top_p"):
        check_range("sampling.top_p", message.top_p, 0, 1, above_low=True)
    if message.HasField("min_p"):
        check_range("sampling.min_p", message.min_p, 0, 1)
    if message.HasField("repetition_penalty"):
        value = message.repetition_penalty
        check_range("sampling.repetition_penalty", value, 0, 100, above_low=True)
    if message.HasField("presence_penalty"):
        check_range("sampling.presence_penalty", message.presence_penalty, -2, 2)
    if message.HasField("frequency_penalty"):
        check_range("sampling.frequency_penalty", message.frequency_penalty, -2, 2)


def _read_logit_bias(
    message: pb.Sampling, model: ModelInfo, limits: CountLimits
) -> MappingProxyType[int, float]:
    check_count("sampling.logit_bias", len(message.logit_bias), limits.max_logit_biases, "entries")
    for token_id, bias in message.logit_bias.items():
        path = f"sampling.logit_bias[{token_id}]"
        _check_token_id(path, token_id, model)
        check_range(path, bias, -100, 100)
    return MappingProxyType(dict(message.logit_bias))


def _read_max_tokens(message: pb.Stopping, output: OutputParams) -> int | None:
    refuse_unknown_fields(message, "stopping")
    if not message.HasField("max_tokens"):
        return None
    if message.max_tokens == 0 and not output.echo:
        raise InvalidField("stopping.max_tokens", "must be 1 or more; 0 only with output.echo")
    return message.max_tokens


def _read_stop_sequences(message: pb.Stopping, limits: CountLimits) -> tuple[str, ...]:
    path = "stopping.stop_sequences"
    check_count(path, len(message.stop_sequences), limits.max_stop_sequences, "texts")
    for index, text in enumerate(message.stop_sequences):
        if not 1 <= len(text) <= limits.max_stop_characters:
            raise InvalidField(
                f"{path}[{index}]",
                f"must be 1 to {limits.max_stop_characters} characters, got {len(text)}",
            )
    return tuple(message.stop_sequences)


def _read_stop_token_ids(
    message: pb.Stopping, model: ModelInfo, limits: CountLimits
) -> frozenset[int]:
    path = "stopping.stop_token_ids"
    check_count(path, len(message.stop_token_ids), limits.max_stop_token_ids, "ids")
    for index, token_id in enumerate(message.stop_token_ids):
        _check_token_id(f"{path}[{index}]", token_id, model)
    ids = frozenset(message.stop_token_ids)
    return ids if message.ignore_eos else ids | model.eos_token_ids


def _read_output(message: pb.Output, limits: CountLimits) -> OutputParams:
    refuse_unknown_fields(message, "output")
    logprobs = message.logprobs if message.HasField("logprobs") else None
    if logprobs is not None:
        check_range("output.logprobs", logprobs, 0, limits.max_logprobs)
    if message.prompt_logprobs and (logprobs is None or not message.echo):
        raise InvalidField("output.prompt_logprobs", "needs output.echo and output.logprobs")
    return OutputParams(
        logprobs=logprobs, echo=message.echo, prompt_logprobs=message.prompt_logprobs
    )


def _check_token_id(path: str, token_id: int, model: ModelInfo) -> None:
    size = model.vocabulary_size
    if token_id >= size:
        raise InvalidField(path, f"{token_id} is outside the vocabulary of {size} tokens")
