"""What a soak asks for, and what one worker that nothing disturbed gave for it beforehand."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc

_SEED: Final = 11
_PROMPTS: Final = (
    "Once upon a time",
    "The river ran",
    "In the morning, the baker",
    "A ship with three masts",
)
_TALKS: Final = (
    ("Hello! Who are you?", "Count from 3 to 30.", "And what is 12 plus 30?"),
    ("What is the capital of France?", "And of Italy?", "Say: the river ran to the sea."),
    ("Count from 1 to 40.", "Tell me a story about a baker.", "Thank you."),
)
_TALK_TOKENS: Final = 120  # most of one answer
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "animals": {
            "type": "array",
            "items": {"enum": ["cat", "dog", "goose"]},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "animals"],
    "additionalProperties": False,
}
_JSON_TOKENS: Final = 400


@dataclass(frozen=True)
class Known:
    """A generation whose text was asked for beforehand, from one worker that nothing disturbed."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    text: str = ""

    def request(self) -> pb.GenerateRequest:
        """It, in the worker's words."""
        return pb.GenerateRequest(
            prompt=pb.Prompt(text=self.prompt),
            sampling=pb.Sampling(temperature=self.temperature, seed=self.seed),
            stopping=pb.Stopping(max_tokens=self.max_tokens, ignore_eos=True),
        )

    def fields(self) -> dict[str, Any]:
        """It, in the words that the native dialect and OpenAI's completions share."""
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
        }


@dataclass(frozen=True)
class KnownJson:
    """A generation that is held to SCHEMA."""

    prompt: str
    seed: int
    text: str = ""

    def request(self) -> pb.GenerateRequest:
        """It, in the worker's words."""
        return pb.GenerateRequest(
            prompt=pb.Prompt(text=self.prompt),
            sampling=pb.Sampling(temperature=0.9, seed=self.seed),
            stopping=pb.Stopping(max_tokens=_JSON_TOKENS),
            constraint=pb.Constraint(json_schema=json.dumps(SCHEMA)),
        )

    def fields(self) -> dict[str, Any]:
        """It without its constraint, in the words that the native dialect and OpenAI's completions share."""
        return {
            "prompt": self.prompt,
            "max_tokens": _JSON_TOKENS,
            "temperature": 0.9,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class KnownTalk:
    """A conversation: what the user says in each turn, and the greedy answers."""

    said: Sequence[str]
    answers: Sequence[str] = ()
    max_tokens: int = _TALK_TOKENS

    def messages(self, turns: int) -> list[dict[str, str]]:
        """The conversation up to what the user says in the last of so many turns, whose answer is the next one."""
        messages = []
        for said, answer in zip(self.said, [*self.answers, ""], strict=False):
            messages += [
                {"role": "user", "content": said},
                {"role": "assistant", "content": answer},
            ]
        return messages[: 2 * turns - 1]

    def request(self, turns: int) -> pb.GenerateRequest:
        """So many turns of it, in the worker's words."""
        messages = [
            pb.ChatMessage(role=message["role"], content=message["content"])
            for message in self.messages(turns)
        ]
        return pb.GenerateRequest(
            prompt=pb.Prompt(chat=pb.Chat(messages=messages)),
            sampling=pb.Sampling(temperature=0),
            stopping=pb.Stopping(max_tokens=self.max_tokens),
        )


@dataclass(frozen=True)
class Knowledge:
    """All that is known beforehand."""

    texts: Sequence[Known]
    objects: Sequence[KnownJson]
    talks: Sequence[KnownTalk]


async def ask_beforehand(worker: pb_grpc.GenerationServiceAsyncStub) -> Knowledge:
    """Ask one worker for everything, one request after another."""
    chooser = random.Random(_SEED)

    async def ask(request: pb.GenerateRequest) -> str:
        return "".join([message.delta.text async for message in worker.Generate(request)])

    texts, objects, talks = [], [], []
    for prompt in _PROMPTS:
        for temperature in (0.0, 0.9):
            one = Known(prompt, chooser.randrange(20, 300), temperature, chooser.randrange(99))
            texts.append(replace(one, text=await ask(one.request())))
        constrained = KnownJson(prompt, chooser.randrange(99))
        objects.append(replace(constrained, text=await ask(constrained.request())))
    for said in _TALKS:
        talk = KnownTalk(said)
        for turn in range(1, len(said) + 1):
            talk = replace(talk, answers=[*talk.answers, await ask(talk.request(turn))])
        talks.append(talk)
    return Knowledge(texts, objects, talks)
