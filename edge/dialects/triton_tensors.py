"""The inputs of an infer request: tensors to texts and parameters, with the limits of their types."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edge.dialects.triton_schema import TritonInferRequest, TritonTensor
from edge.errors import EdgeError, invalid_request

# Names that the text goes by: Triton's own, Inferless's, and what people choose.
TEXT_NAMES = ("text_input", "TEXT", "text", "prompt")
OUTPUT_NAME = "text_output"

_TEXT_TYPES = frozenset({"BYTES", "STRING"})
_INTEGER_RANGES = {
    **{f"UINT{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
}
_FLOAT_LIMITS = {"FP32": 3.4028234663852886e38, "FP64": math.inf}
_WITHOUT_JSON = frozenset({"FP16", "BF16"})  # "does not have a JSON representation" in the protocol

_INTEGER_TYPES = frozenset(_INTEGER_RANGES)
_NUMBER_TYPES = _INTEGER_TYPES | frozenset(_FLOAT_LIMITS)
_PARAMETER_TYPES = {
    **dict.fromkeys(("max_tokens", "top_k", "seed", "stop_token_ids"), _INTEGER_TYPES),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), _NUMBER_TYPES),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), _NUMBER_TYPES),
    "stop": _TEXT_TYPES,
    "ignore_eos": frozenset({"BOOL"}),
}
_LISTS = frozenset({"stop", "stop_token_ids"})


@dataclass(frozen=True)
class Inputs:
    """What the tensors say."""

    texts: list[str]
    shape: list[int]  # of the texts, and of the output
    parameters: dict[str, Any]


def read_inputs(request: TritonInferRequest, max_prompts: int) -> Inputs:
    """Raises a 400 that names the tensor."""
    _check_outputs(request)
    by_name: dict[str, tuple[int, TritonTensor]] = {}
    for index, tensor in enumerate(request.inputs):
        name = "text_input" if tensor.name in TEXT_NAMES else tensor.name
        if name in by_name:
            raise _bad(index, "name", f"{tensor.name!r} is given already")
        if name != "text_input" and name not in _PARAMETER_TYPES:
            raise _bad(index, "name", f"there is no input {tensor.name!r}")
        by_name[name] = index, tensor
    if "text_input" not in by_name:
        raise invalid_request(f"inputs: one of them must be {' or '.join(TEXT_NAMES)}.", "inputs")
    index, text = by_name.pop("text_input")
    texts = _values(index, text, _TEXT_TYPES)
    if not 1 <= len(texts) <= max_prompts:
        raise _bad(index, "shape", f"1 to {max_prompts} texts, got {len(texts)}")
    parameters: dict[str, Any] = {}
    for name, (position, tensor) in by_name.items():
        values = _values(position, tensor, _PARAMETER_TYPES[name])
        if name not in _LISTS and len(values) != 1:
            raise _bad(position, "shape", f"{name} has one value, got {len(values)}")
        parameters[name] = values if name in _LISTS else values[0]
    return Inputs(texts, list(text.shape), parameters)


def _check_outputs(request: TritonInferRequest) -> None:
    for index, output in enumerate(request.outputs or ()):
        if output.name != OUTPUT_NAME:
            raise invalid_request(
                f"outputs[{index}].name: there is no output {output.name!r}, only {OUTPUT_NAME}.",
                f"outputs[{index}].name",
            )
        _refuse_parameters(f"outputs[{index}].parameters", output.parameters, "binary_data")
    _refuse_parameters("parameters", request.parameters, "binary_data_output")


def _refuse_parameters(path: str, parameters: dict[str, Any] | None, harmless: str) -> None:
    """Binary outputs may be asked for, as clients do unless told otherwise; they read the JSON that comes as well."""
    for name in parameters or ():
        if name != harmless:
            raise invalid_request(f"{path}.{name[:64]} is not supported.", f"{path}.{name[:64]}")


def _values(index: int, tensor: TritonTensor, datatypes: frozenset[str]) -> list[Any]:
    """The elements, each of the tensor's datatype, which is one of `datatypes`."""
    if tensor.datatype in _WITHOUT_JSON:
        raise _bad(index, "datatype", f"{tensor.datatype} has no form in JSON; use FP32")
    if tensor.datatype not in datatypes:
        allowed = ", ".join(sorted(datatypes))
        raise _bad(index, "datatype", f"{tensor.name} is {allowed}, got {tensor.datatype!r}")
    if tensor.parameters:
        raise _bad(
            index, "parameters", "binary tensors and shared memory are not supported; send data"
        )
    if tensor.data is None:
        raise _bad(index, "data", "is required")
    values = list(_flat(tensor.data))
    if len(values) != math.prod(tensor.shape):
        raise _bad(index, "shape", f"{tensor.shape} does not fit {len(values)} elements of data")
    for value in values:
        if not _has_type(value, tensor.datatype):
            raise _bad(index, "data", f"{str(value)[:64]!r} is no {tensor.datatype}")
    return values


def _flat(data: list[Any]) -> Iterator[Any]:
    """Row-major; the protocol lets a client nest its rows or not."""
    for value in data:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value


def _has_type(value: Any, datatype: str) -> bool:
    if datatype in _TEXT_TYPES:
        return isinstance(value, str)
    if datatype == "BOOL":
        return isinstance(value, bool)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if datatype in _INTEGER_RANGES:
        low, high = _INTEGER_RANGES[datatype]
        return isinstance(value, int) and low <= value <= high
    return abs(value) <= _FLOAT_LIMITS[datatype]


def _bad(index: int, part: str, problem: str) -> EdgeError:
    path = f"inputs[{index}].{part}"
    return invalid_request(f"{path}: {problem}.", path)
