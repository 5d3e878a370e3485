"""POST /v1/completions: plain text, several prompts at once, legacy log-probabilities."""

import codecs
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from edge.dialects.common import field_names, new_id, shown_bytes, shown_logprob
from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.dialects.openai_schema import OpenAIFields, agreed
from edge.dialects.openai_wire import ChunkEncoder, UsageCount, finish_reason
from edge.dialects.schema import Items, OnlyFalse, OnlyOne, SomeItems, Uint32, validate
from edge.errors import invalid_request
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb


class CompletionRequest(OpenAIFields):
    """Body of POST /v1/completions, with TGI's parameters at its root."""

    prompt: str | SomeItems[Uint32] | SomeItems[str] | SomeItems[SomeItems[Uint32]] = Field(
        description="One text or list of token ids, or several."
    )
    logprobs: Uint32 | None = Field(
        None, description="Send log-probabilities and this many likeliest candidates."
    )
    echo: bool | None = Field(None, description="Send the prompt before the completion.")
    max_completion_tokens: Uint32 | None = Field(None, description="Another name of max_tokens.")

    # TGI.
    max_new_tokens: Uint32 | None = Field(None, description="TGI: another name of max_tokens.")
    do_sample: bool | None = Field(
        None,
        description="TGI: false is greedy, unless temperature, top_k or top_p ask for sampling.",
    )
    return_full_text: bool | None = Field(None, description="TGI: another name of echo.")
    top_n_tokens: Uint32 | None = Field(None, description="TGI: another name of logprobs.")
    stop_sequences: Items[str] | None = Field(None, description="TGI: another name of stop.")
    details: bool | None = Field(None, description="TGI: no effect; the counts are in usage.")

    # Accepted with values that ask for nothing.
    suffix: Literal[""] | None = None
    best_of: OnlyOne | None = None
    typical_p: OnlyOne | Annotated[float, Field(ge=1, le=1)] | None = None
    truncate: None = None
    watermark: OnlyFalse | None = None
    decoder_input_details: OnlyFalse | None = None
    grammar: None = None
    adapter_id: None = None

    UNSUPPORTED = OpenAIFields.UNSUPPORTED | {
        "suffix",
        "best_of",
        "typical_p",
        "truncate",
        "watermark",
        "decoder_input_details",
        "grammar",
        "adapter_id",
    }

    def prompts(self) -> list[pb.Prompt]:
        """Each prompt in the contract's words."""
        if isinstance(self.prompt, str):
            return [pb.Prompt(text=self.prompt)]
        prompts = []
        alone: list[int] = []
        for entry in self.prompt:
            if isinstance(entry, str):
                prompts.append(pb.Prompt(text=entry))
            elif isinstance(entry, int):
                alone.append(entry)
            else:
                prompts.append(pb.Prompt(token_ids=pb.TokenIds(ids=entry)))
        return prompts or [pb.Prompt(token_ids=pb.TokenIds(ids=alone))]


def parse(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:
    """A completions request in the contract's words."""
    _refuse_many_prompts(body.get("prompt"), limits.max_prompts)
    completion = validate(CompletionRequest, body)
    completion.require_stream_for_options()
    prompts = completion.prompts()
    generation_id = new_id("cmpl")
    constraint, constraint_names = completion.constraint()
    template = _template(completion, constraint)
    requests = []
    for index, prompt in enumerate(prompts):
        request = pb.GenerateRequest()
        request.CopyFrom(template)
        request.prompt.CopyFrom(prompt)
        request.request_id = f"{generation_id}-{index}" if len(prompts) > 1 else generation_id
        requests.append(request)
    has_logprobs = template.output.HasField("logprobs")
    return ParsedRequest(
        generation_id,
        requests,
        bool(completion.stream),
        partial(
            CompletionEncoder,
            generation_id,
            completion.sends_usage(),
            completion.sends_running_usage(),
            has_logprobs,
            len(prompts),
        ),
        partial(CompletionCollector, generation_id, has_logprobs),
        field_names(_names(completion) | constraint_names),
    )


def _refuse_many_prompts(prompt: object, limit: int) -> None:
    """Comes before the validation, which takes long for a million prompts. A list of numbers is one prompt."""
    if isinstance(prompt, list) and len(prompt) > limit and type(prompt[0]) is not int:
        raise invalid_request(f"prompt: at most {limit} at once.", "prompt")


def _template(
    completion: CompletionRequest, constraint: pb.Constraint | None
) -> pb.GenerateRequest:
    logprobs = agreed({"logprobs": completion.logprobs, "top_n_tokens": completion.top_n_tokens})
    echo = agreed({"echo": completion.echo, "return_full_text": completion.return_full_text})
    if completion.stop is not None and completion.stop_sequences is not None:
        raise invalid_request("stop_sequences contradicts stop.", "stop_sequences")
    max_tokens = agreed(
        {
            "max_tokens": completion.max_tokens,
            "max_completion_tokens": completion.max_completion_tokens,
            "max_new_tokens": completion.max_new_tokens,
        }
    )
    request = pb.GenerateRequest(
        model=completion.model,
        sampling=completion.sampling(),
        stopping=completion.stopping(max_tokens),
        output=pb.Output(
            logprobs=logprobs,
            echo=echo,
            prompt_logprobs=True if echo and logprobs is not None else None,
        ),
        n=completion.n,
        priority=completion.contract_priority(),
        constraint=constraint,
        timeout=completion.timeout_duration(),
    )
    request.stopping.stop_sequences.extend(completion.stop_sequences or [])
    asks_for_sampling = (completion.temperature, completion.top_k, completion.top_p)
    if completion.do_sample is False and asks_for_sampling == (None, None, None):
        request.sampling.temperature = 0
    return request


def _names(completion: CompletionRequest) -> dict[str, str]:
    names = {
        "prompt": "prompt",
        "prompt.text": "prompt",
        "prompt.token_ids": "prompt",
        "prompt.token_ids.ids": "prompt",
        "stopping.max_tokens": "max_tokens",
        "stopping.stop_sequences": "stop",
        "output.logprobs": "logprobs",
    }
    if completion.max_new_tokens is not None:
        names["stopping.max_tokens"] = "max_new_tokens"
    if completion.stop_sequences is not None:
        names["stopping.stop_sequences"] = "stop_sequences"
    if completion.return_full_text is not None:
        names["output.echo"] = "return_full_text"
    if completion.top_n_tokens is not None:
        names["output.logprobs"] = "top_n_tokens"
    return names


class LegacyLogprobs:
    """Log-probabilities of one choice as four parallel lists."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def of_end(self, finished: pb.Finished) -> dict[str, list[Any]]:
        """The lists of the stop token, which is a completion token though no part of the text."""
        has_stop_token = finished.HasField("stop_token_id")
        return self.of(finished.withheld_logprobs[-1:] if has_stop_token else [])

    def of(self, entries: Iterable[pb.TokenLogprob]) -> dict[str, list[Any]]:
        """The lists of some tokens."""
        tokens, logprobs, tops, offsets = [], [], [], []
        for entry in entries:
            tokens.append(shown_bytes(entry.token.token))
            logprobs.append(shown_logprob(entry.token))
            tops.append(_top(entry))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(entry.token.token))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _top(entry: pb.TokenLogprob) -> dict[str, float | None] | None:
    if not entry.token.HasField("logprob"):
        return None
    top: dict[str, float | None] = {}
    for candidate in (*entry.top, entry.token):
        top.setdefault(shown_bytes(candidate.token), shown_logprob(candidate))
    return top


class CompletionEncoder(ChunkEncoder):
    """Messages to `text_completion` events."""

    object = "text_completion"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._legacy: defaultdict[int, LegacyLogprobs] = defaultdict(LegacyLogprobs)

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _first_choice(self, index: int, choices: int) -> dict[str, Any] | None:
        # Clients want to see choices in index order first; the worker may begin anywhere.
        return None if choices == 1 else self._choice(index, "")

    def _last_choice(self, index: int) -> dict[str, Any]:
        return self._choice(index, "")

    def _logprobs(self, index: int, delta: pb.Delta) -> dict[str, Any]:
        return self._legacy[index].of(delta.logprobs)

    def _last_logprobs(self, index: int, finished: pb.Finished) -> dict[str, Any] | None:
        if not finished.HasField("stop_token_id"):
            return None
        return self._legacy[index].of_end(finished)


class _Choice:
    def __init__(self, has_logprobs: bool) -> None:
        self.text: list[str] = []
        self.finish_reason = ""
        self.logprobs: dict[str, list[Any]] | None = None
        self._legacy = LegacyLogprobs()
        if has_logprobs:
            self.logprobs = self._legacy.of([])

    def add(self, delta: pb.Delta) -> None:
        self.text.append(delta.text)
        self._add_logprobs(self._legacy.of(delta.logprobs))

    def finish(self, finished: pb.Finished) -> None:
        self.finish_reason = finish_reason(finished)
        self._add_logprobs(self._legacy.of_end(finished))

    def _add_logprobs(self, lists: dict[str, list[Any]]) -> None:
        if self.logprobs is not None:
            for name, values in lists.items():
                self.logprobs[name] += values


class CompletionCollector:
    """Messages to one `text_completion`."""

    def __init__(self, generation_id: str, has_logprobs: bool) -> None:
        self._id = generation_id
        self._has_logprobs = has_logprobs
        self._usage = UsageCount()
        self._choices: dict[tuple[int, int], _Choice] = {}
        self._started = pb.Started()

    def add(self, prompt: int, message: pb.GenerateResponse) -> None:
        """Takes one message."""
        kind = message.WhichOneof("event")
        if kind == "started":
            self._started = message.started
            self._usage.started(prompt, message.started)
            for index in range(message.started.n):
                self._choices[prompt, index] = _Choice(self._has_logprobs)
        elif kind == "delta":
            self._choices[prompt, message.delta.choice_index].add(message.delta)
            self._usage.delta(prompt, message.delta)
        elif kind == "finished":
            self._choices[prompt, message.finished.choice_index].finish(message.finished)
            self._usage.finished(prompt, message.finished)

    def body(self) -> bytes:
        """The whole answer."""
        choices = [self._choices[key] for key in sorted(self._choices)]
        return encode(
            {
                "id": self._id,
                "object": "text_completion",
                "created": self._started.created_at.seconds,
                "model": self._started.model,
                "choices": [
                    {
                        "index": index,
                        "text": "".join(choice.text),
                        "logprobs": choice.logprobs,
                        "finish_reason": choice.finish_reason,
                    }
                    for index, choice in enumerate(choices)
                ],
                "usage": self._usage.as_json(),
            }
        )
