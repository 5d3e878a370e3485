"""The ways in which clients ask for structured output, as the contract's constraint."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from edge.dialects.schema import Items, RequestModel
from edge.errors import invalid_request
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb

_ANY_OBJECT = '{"type":"object"}'

JsonSchema = Annotated[
    dict[str, Any] | str, Field(description="A JSON schema, as an object or as its JSON text.")
]


class NamedSchema(RequestModel):
    """The schema of a response format. It is always kept to, strict or not."""

    name: str = Field(max_length=64, description="No effect.")
    description: str | None = Field(None, description="No effect.")
    schema_: dict[str, Any] = Field(alias="schema", description="The JSON schema.")
    strict: bool | None = Field(None, description="No effect: every schema is kept to.")


class TextFormat(RequestModel):
    """Plain text."""

    type: Literal["text"]


class JsonObjectFormat(RequestModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(RequestModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(RequestModel):
    """vLLM's newer form: exactly one of these."""

    json_: JsonSchema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = Field(None, description="A Lark grammar.")
    json_object: bool | None = Field(None, description="Any JSON object.")


class ConstraintFields(RequestModel):
    """OpenAI's response format, and the extra fields that vLLM knows. At most one of all."""

    response_format: ResponseFormat | None = Field(
        None, description="Text, any JSON object, or JSON of a schema."
    )
    guided_json: JsonSchema | None = Field(None, description="vLLM: a JSON schema.")
    guided_regex: str | None = Field(None, description="vLLM: a regular expression.")
    guided_choice: Items[str] | None = Field(None, description="vLLM: texts to choose from.")
    guided_grammar: str | None = Field(None, description="vLLM: a Lark grammar.")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM: one of several.")

    def constraint(self) -> tuple[pb.Constraint | None, dict[str, str]]:
        """The constraint, if any, and what the dialect calls its fields. Raises a 400 for more than one."""
        given = list(self._given())
        if len(given) > 1:
            (first, _), (second, _) = given[:2]
            raise invalid_request(f"{second} contradicts {first}: give one of them.", second)
        if not given:
            return None, {}
        name, constraint = given[0]
        kind = str(constraint.WhichOneof("grammar"))
        return constraint, {
            "constraint": name,
            f"constraint.{kind}": name,
            f"constraint.{kind}.texts": name,
        }

    def _given(self) -> Iterator[tuple[str, pb.Constraint]]:
        if isinstance(self.response_format, JsonObjectFormat):
            yield "response_format", pb.Constraint(json_schema=_ANY_OBJECT)
        elif isinstance(self.response_format, JsonSchemaFormat):
            schema = self.response_format.json_schema.schema_
            yield "response_format.json_schema.schema", of_schema(schema)
        if self.guided_json is not None:
            yield "guided_json", of_schema(self.guided_json)
        if self.guided_regex is not None:
            yield "guided_regex", pb.Constraint(regex=self.guided_regex)
        if self.guided_choice is not None:
            yield "guided_choice", of_choice(self.guided_choice)
        if self.guided_grammar is not None:
            yield "guided_grammar", pb.Constraint(lark=self.guided_grammar)
        if self.structured_outputs is not None:
            yield from _given_in(self.structured_outputs)


def _given_in(outputs: StructuredOutputs) -> Iterator[tuple[str, pb.Constraint]]:
    path = "structured_outputs"
    if outputs.json_ is not None:
        yield f"{path}.json", of_schema(outputs.json_)
    if outputs.regex is not None:
        yield f"{path}.regex", pb.Constraint(regex=outputs.regex)
    if outputs.choice is not None:
        yield f"{path}.choice", of_choice(outputs.choice)
    if outputs.grammar is not None:
        yield f"{path}.grammar", pb.Constraint(lark=outputs.grammar)
    if outputs.json_object:
        yield f"{path}.json_object", pb.Constraint(json_schema=_ANY_OBJECT)


def of_schema(schema: dict[str, Any] | str) -> pb.Constraint:
    """A schema's constraint."""
    text = schema if isinstance(schema, str) else encode(schema).decode()
    return pb.Constraint(json_schema=text)


def of_choice(texts: list[str]) -> pb.Constraint:
    """The constraint of a list of texts; set also if the list is empty, which the worker refuses."""
    return pb.Constraint(choice=pb.ChoiceList(texts=texts))
