"""Bodies of TGI's routes, as text-generation-inference documents them."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from edge.dialects.schema import Float, Int64, Items, RequestModel, Uint32
from edge.errors import invalid_request
from edge.response_schema import ResponseModel
from protos.sluice.v1 import generation_pb2 as pb

DEFAULT_MAX_NEW_TOKENS = 100  # TGI's own


class TgiGrammar(RequestModel):
    """A language that the output belongs to."""

    type: Literal["json", "json_schema", "regex"]
    value: Any = Field(description="A JSON schema, or the text of a regular expression.")

    def constraint(self) -> pb.Constraint:
        """In the contract's words."""
        if self.type == "regex":
            if not isinstance(self.value, str):
                raise invalid_request("grammar.value: must be text.", "parameters.grammar.value")
            return pb.Constraint(regex=self.value)
        if isinstance(self.value, str):
            return pb.Constraint(json_schema=self.value)
        schema = self.value
        if self.type == "json_schema" and isinstance(schema, dict) and "schema" in schema:
            schema = schema["schema"]  # {"name": ..., "schema": ...}
        # Not by the edge's own codec, which takes less depth than a body may have.
        return pb.Constraint(json_schema=json.dumps(schema, separators=(",", ":")))


class TgiParameters(RequestModel):
    """How to generate. What is left out, or null, is as in TGI: greedy, and 100 tokens."""

    max_new_tokens: Uint32 | None = Field(None, description="Most new tokens; 100 when left out.")
    temperature: Float | None = Field(None, description="Any but 1 asks for sampling; 0 is greedy.")
    top_k: Uint32 | None = Field(None, description="Asks for sampling among the k likeliest.")
    top_p: Float | None = Field(None, description="Below 1 asks for sampling from this mass.")
    do_sample: bool | None = Field(None, description="Asks for sampling.")
    repetition_penalty: Float | None = Field(None, description="Above 1 discourages repetition.")
    frequency_penalty: Float | None = Field(None, description="Taken for each occurrence.")
    seed: Int64 | None = Field(None, description="Makes the draws repeatable.")
    stop: Items[str] | None = Field(None, description="Texts that end the output; not sent.")
    return_full_text: bool | None = Field(None, description="Put the input before the output.")
    details: bool | None = Field(None, description="Send tokens, counts and the finish reason.")
    decoder_input_details: bool | None = Field(
        None, description="With details, unstreamed: the input's tokens and log-probabilities."
    )
    top_n_tokens: Uint32 | None = Field(None, description="Send so many likeliest candidates.")
    best_of: Annotated[int, Field(ge=1, le=2**32 - 1)] | None = Field(
        None, description="Unstreamed: the likeliest of so many outputs."
    )
    grammar: TgiGrammar | None = Field(None, description="A language that the output belongs to.")
    # Accepted with values that ask for nothing.
    typical_p: Float | None = Field(None, description="Not supported but as 1.")
    truncate: Uint32 | None = Field(None, description="Not supported.")
    watermark: bool | None = Field(None, description="Not supported but as false.")
    adapter_id: str | None = Field(None, max_length=1024, description="Not supported.")

    def refuse_unsupported(self) -> None:
        """Raises a 400 that names what cannot be had here."""
        for name, is_asked in (
            ("typical_p", self.typical_p is not None and self.typical_p != 1),
            ("truncate", self.truncate is not None),
            ("watermark", bool(self.watermark)),
            ("adapter_id", self.adapter_id is not None),
        ):
            if is_asked:
                raise invalid_request(
                    f"parameters.{name} is not supported.", f"parameters.{name}", "unsupported"
                )

    def refuse_streamed(self) -> None:
        """Raises a 400 for what TGI has no place for in a stream."""
        for name, is_asked in (
            ("best_of", (self.best_of or 1) > 1),
            ("decoder_input_details", bool(self.decoder_input_details)),
        ):
            if is_asked:
                raise invalid_request(
                    f"parameters.{name} is not supported in a stream.",
                    f"parameters.{name}",
                    "unsupported",
                )

    def sampling(self) -> pb.Sampling:
        """In the contract's words. TGI draws only where something asks for it."""
        draws = (
            bool(self.do_sample)
            or self.temperature not in (None, 1)
            or bool(self.top_k)
            or self.top_p not in (None, 1)
        )
        temperature = (1 if self.temperature is None else self.temperature) if draws else 0
        return pb.Sampling(
            temperature=temperature,
            top_k=self.top_k or None,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
        )


class TgiGenerateRequest(RequestModel):
    """Body of POST /generate and POST /generate_stream."""

    inputs: str = Field(description="The prompt, as plain text.")
    parameters: TgiParameters | None = Field(None, description="How to generate.")


class TgiRequest(TgiGenerateRequest):
    """Body of POST /."""

    stream: bool | None = Field(None, description="Answer as /generate_stream does.")


class TgiTokenizeRequest(RequestModel):
    """Body of POST /tokenize."""

    inputs: str = Field(description="Plain text.")
    add_special_tokens: Literal[True] | None = None


class TgiError(ResponseModel):
    """Every failure on TGI's routes; also the data of an error event."""

    error: str
    error_type: Literal[
        "overloaded", "validation", "generation", "incomplete_generation", "authentication"
    ]


class TgiPrefillToken(ResponseModel):
    """A token of the input."""

    id: int
    text: str
    logprob: float | None


class TgiToken(TgiPrefillToken):
    """A token of the output. The one that ends it, if any, is special and has no text."""

    special: bool


FinishReason = Literal["length", "eos_token", "stop_sequence"]


class TgiSequence(ResponseModel):
    """How one output came about."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[TgiPrefillToken]
    tokens: list[TgiToken]
    top_tokens: list[list[TgiToken]] | None = None


class TgiBestOf(TgiSequence):
    """One of the outputs that were not the likeliest."""

    generated_text: str


class TgiDetails(TgiSequence):
    """How the output came about."""

    best_of_sequences: list[TgiBestOf] | None = None


class TgiGeneration(ResponseModel):
    """An unstreamed answer."""

    generated_text: str
    details: TgiDetails | None = None


class TgiGenerations(RootModel[list[TgiGeneration]]):
    """The unstreamed answer of POST /, a list of one."""


class TgiStreamDetails(ResponseModel):
    """The counts at the end."""

    finish_reason: FinishReason
    generated_tokens: int
    input_length: int
    seed: int | None


class TgiStreamEvent(ResponseModel):
    """The data of one event: a token, and with the last one the whole text."""

    index: int = Field(ge=1)
    token: TgiToken
    generated_text: str | None
    details: TgiStreamDetails | None
    top_tokens: list[TgiToken] | None = None


class TgiInfo(ResponseModel):
    """What is served."""

    model_id: str
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: Literal["text-generation"]
    max_input_tokens: int
    max_total_tokens: int
    router: Literal["sluice"]
    version: str


class TgiInputToken(ResponseModel):
    """A token of a text, and the characters of the text that it stands for."""

    id: int
    text: str
    start: int
    stop: int


class TgiInputTokens(RootModel[list[TgiInputToken]]):
    """The tokens of a text."""
