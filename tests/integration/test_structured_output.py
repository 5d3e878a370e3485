"""Structured output by the OpenAI client, from the embedded model, through both processes."""

from __future__ import annotations

import json
from typing import Literal

import jsonschema
import openai
import pydantic

from tests.integration.stack import Stack


class Answer(pydantic.BaseModel):
    """What is asked for."""

    colour: Literal["red", "green"]
    count: int = pydantic.Field(ge=1, le=9)
    parts: list[Literal["a", "b"]] = pydantic.Field(max_length=2)


async def test_parse_gives_the_model(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
        completion = await client.chat.completions.parse(
            model="default",
            messages=[{"role": "user", "content": "Which colour?"}],
            response_format=Answer,
            max_tokens=200,
            n=2,
        )
    for choice in completion.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Answer)


async def test_a_streamed_answer_obeys_its_schema(stack: Stack) -> None:
    schema = Answer.model_json_schema()
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Which colour?"}],
            stream=True,
            extra_body={"guided_json": schema},
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    jsonschema.validate(json.loads(text), schema)
