"""Bodies of the v2 inference protocol, as KServe and Triton document them: the generate extension, and tensors.

https://github.com/kserve/open-inference-protocol (generate_rest, inference_rest).
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from edge.dialects.schema import (
    Items,
    RequestModel,
    SamplingFields,
    SomeItems,
    StoppingFields,
    Uint32,
)
from edge.response_schema import ResponseModel

VERSION = "1"  # of the one model
Id = Annotated[str, Field(max_length=1024)]


class TritonParameters(SamplingFields, StoppingFields):
    """How to generate. What is left out, or null, is the worker's to choose."""

    max_tokens: Uint32 | None = Field(None, description="Most tokens of the output.")
    details: bool | None = Field(None, description="Send the finish reason and counts, too.")
    exclude_input_in_output: bool | None = Field(
        None, description="Triton's vLLM backend: false puts the input before the output."
    )
    stream: bool | None = Field(None, description="Accepted where it says what the route does.")


class TritonGenerateRequest(RequestModel):
    """Body of generate and generate_stream."""

    text_input: str = Field(description="The prompt, as plain text.")
    id: Id | None = Field(None, description="Comes back in the answer.")
    parameters: TritonParameters | None = Field(None, description="How to generate.")


class TritonTensor(RequestModel):
    """One input."""

    name: str = Field(max_length=128)
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=8)]
    datatype: str = Field(max_length=16)
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class TritonWantedOutput(RequestModel):
    """One output that is asked for."""

    name: str = Field(max_length=128)
    parameters: dict[str, Any] | None = None


class TritonInferRequest(RequestModel):
    """Body of infer: the text and, by their names, parameters of generate, each a tensor."""

    inputs: SomeItems[TritonTensor]
    id: Id | None = Field(None, description="Comes back in the answer.")
    outputs: Items[TritonWantedOutput] | None = Field(None, description="text_output is all.")
    parameters: dict[str, Any] | None = Field(None, description="binary_data_output alone.")


class TritonError(ResponseModel):
    """Every failure on these routes; also the data of an error event."""

    error: str


class TritonDetails(ResponseModel):
    """How the output ended."""

    finish_reason: Literal["stop", "stop_sequence", "length"]
    prompt_tokens: int
    completion_tokens: int


class TritonGeneration(ResponseModel):
    """The answer of generate, and the data of one event of generate_stream, which has more of the text."""

    id: str | None = None
    model_name: str
    model_version: str
    text_output: str
    details: TritonDetails | None = None


class TritonOutput(ResponseModel):
    """One output."""

    name: Literal["text_output"]
    shape: list[int]
    datatype: Literal["BYTES"]
    data: list[str]


class TritonInference(ResponseModel):
    """The answer of infer."""

    id: str | None = None
    model_name: str
    model_version: str
    outputs: list[TritonOutput]


class TritonLive(ResponseModel):
    """It is; otherwise nothing answers."""

    live: Literal[True]


class TritonReady(ResponseModel):
    """It is; what is not ready is an error."""

    ready: Literal[True]


class TritonServer(ResponseModel):
    """The server."""

    name: Literal["sluice"]
    version: str
    extensions: list[str]


class TritonTensorMetadata(ResponseModel):
    """An input or output of the model."""

    name: str
    datatype: str
    shape: list[int]


class TritonModel(ResponseModel):
    """The model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TritonTensorMetadata]
    outputs: list[TritonTensorMetadata]
