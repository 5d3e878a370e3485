"""Reads a request of vllm.grpc.engine as one of our contract.

A zero where their contract has no "unset" means what it does to vLLM: no restriction, no penalty, one choice. What
cannot be honoured is refused by its name there, never ignored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from inference_worker.errors import InvalidField, SluiceError, UnsupportedField
from inference_worker.field_rules import refuse_unknown_fields
from protos.sluice.v1 import generation_pb2 as pb

VllmRequest: TypeAlias = (
    Any  # vllm.grpc.engine.GenerateRequest; its package need not be there for the types
)

_ANY_OBJECT: Final = '{"type":"object"}'
_PARAMS: Final = "sampling_params"
# Path of a field of ours -> what it was read from. The longest one that fits counts; "prompt" is either input.
_NAMES: Final = {
    "sampling": _PARAMS,
    "stopping.max_tokens": f"{_PARAMS}.max_tokens",
    "stopping.stop_sequences": f"{_PARAMS}.stop",
    "stopping.stop_token_ids": f"{_PARAMS}.stop_token_ids",
    "n": f"{_PARAMS}.n",
    "constraint": _PARAMS,
    "constraint.choice.texts": f"{_PARAMS}.choice.choices",
    "constraint.lark": f"{_PARAMS}.grammar",
}


def read_request(message: VllmRequest, vocabulary_size: int) -> pb.GenerateRequest:
    """The same request in our contract, which asks for every token id. Its ranges are the worker's to check.

    Raises: InvalidField, naming a field of `message`.
    """
    with their_names(message):
        return _read(message, vocabulary_size)


def _read(message: VllmRequest, vocabulary_size: int) -> pb.GenerateRequest:
    _refuse_unsupported(message)
    params = message.sampling_params
    request = pb.GenerateRequest(
        prompt=_read_prompt(message),
        sampling=_read_sampling(params, vocabulary_size),
        stopping=pb.Stopping(
            max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
            stop_sequences=params.stop,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
        ),
        output=_read_output(params),
        constraint=_read_constraint(params),
        n=params.n or 1,
    )
    if message.request_id:
        request.request_id = message.request_id
    return request


@contextlib.contextmanager
def their_names(message: VllmRequest) -> Iterator[None]:
    """Let errors that leave the block name the fields of `message` and not those that were made from them.

    A field that is not supported is a bad one here: gateways take UNIMPLEMENTED for a failure of the worker.
    """
    try:
        yield
    except UnsupportedField as error:
        field = _their_name(error.field or "", message)
        raise InvalidField(field, "not supported by this worker") from error
    except SluiceError as error:
        if error.field is not None:
            name = _their_name(error.field, message)
            error.args = (str(error).replace(error.field, name, 1),)
            error.field = name
        raise


def _their_name(path: str, message: VllmRequest) -> str:
    params = message.sampling_params
    prompt = "text" if message.WhichOneof("input") == "text" else "tokenized.input_ids"
    names = _NAMES | {
        "prompt": prompt,
        "prompt.text": prompt,
        "prompt.token_ids": prompt,
        "prompt.token_ids.ids": prompt,
        "output.logprobs": f"{_PARAMS}.{_widest_logprobs(params)}",
    }
    for ours in sorted(names, key=len, reverse=True):
        if path == ours or path.startswith((f"{ours}.", f"{ours}[")):
            return names[ours] + path[len(ours) :]
    return path


def _refuse_unsupported(message: VllmRequest) -> None:
    refuse_unknown_fields(message, "")
    _refuse(
        "",
        kv_transfer_params=message.HasField("kv_transfer_params"),
        kv_transfer_params_json=message.HasField("kv_transfer_params_json"),
        mm_inputs=message.HasField("mm_inputs"),
        extra_mm_inputs=bool(message.extra_mm_inputs),
        media_refs=message.HasField("media_refs"),
    )
    if message.HasField("data_parallel_rank") and message.data_parallel_rank != 0:
        raise InvalidField("data_parallel_rank", "there is one rank, 0")
    params = message.sampling_params
    refuse_unknown_fields(params, _PARAMS)
    # What asks only for another text (skip_special_tokens, spaces_between_special_tokens, include_stop_str_in_output)
    # is the caller's own doing: it gets every token. A constraint always holds from the first token on.
    _refuse(
        f"{_PARAMS}.",
        min_tokens=params.min_tokens != 0,
        truncate_prompt_tokens=params.HasField("truncate_prompt_tokens"),
        structural_tag=params.HasField("structural_tag"),
    )


def _refuse(prefix: str, **is_set: bool) -> None:
    for name, value in is_set.items():
        if value:
            raise UnsupportedField(f"{prefix}{name}")


def _read_prompt(message: VllmRequest) -> pb.Prompt:
    match message.WhichOneof("input"):
        case "tokenized":  # its original_text is told for reference only
            refuse_unknown_fields(message.tokenized, "tokenized")
            return pb.Prompt(token_ids=pb.TokenIds(ids=message.tokenized.input_ids))
        case "text":
            return pb.Prompt(text=message.text)
        case _:
            raise InvalidField("input", "set one of tokenized and text")


def _read_sampling(params: Any, vocabulary_size: int) -> pb.Sampling:
    for token_id in params.logit_bias:
        if token_id < 0:
            raise InvalidField(f"{_PARAMS}.logit_bias[{token_id}]", "is no token id")
    return pb.Sampling(
        temperature=params.temperature if params.HasField("temperature") else None,
        top_k=params.top_k or vocabulary_size,
        top_p=params.top_p or 1,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty or 1,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed if params.HasField("seed") else None,
    )


def _read_output(params: Any) -> pb.Output:
    output = pb.Output(token_ids=True)
    for name in ("logprobs", "prompt_logprobs"):
        if params.HasField(name) and getattr(params, name) < 0:
            raise InvalidField(
                f"{_PARAMS}.{name}", f"must be 0 or more, got {getattr(params, name)}"
            )
    if params.HasField("logprobs") or params.HasField("prompt_logprobs"):
        # one number for prompt and completion; the answers carry of each as many as were asked for
        output.logprobs = getattr(params, _widest_logprobs(params))
    output.echo = output.prompt_logprobs = params.HasField("prompt_logprobs")
    return output


def _widest_logprobs(params: Any) -> str:
    """Which of the two numbers of candidates is the larger one."""
    return max(
        ("logprobs", "prompt_logprobs"),
        key=lambda name: getattr(params, name) if params.HasField(name) else -1,
    )


def _read_constraint(params: Any) -> pb.Constraint | None:
    match params.WhichOneof("constraint"):
        case "json_schema":
            return pb.Constraint(json_schema=params.json_schema)
        case "json_object":
            return pb.Constraint(json_schema=_ANY_OBJECT) if params.json_object else None
        case "regex":
            return pb.Constraint(regex=params.regex)
        case "grammar":
            return pb.Constraint(lark=params.grammar)
        case "choice":
            return pb.Constraint(choice=pb.ChoiceList(texts=params.choice.choices))
        case _:
            return None
