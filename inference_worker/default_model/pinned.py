"""The conversations whose greedy answers are pinned, and a check of a checkpoint against them.

``python -m inference_worker.default_model.pinned FILE`` writes them as JSON for the tests.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NotRequired, TypedDict

from inference_worker.default_model import answers as a
from inference_worker.default_model.skills import count_down, count_up, sum_answer
from inference_worker.default_model.tools import Call
from inference_worker.default_model.topics import TOPICS


class Message(TypedDict):
    """One message of a chat."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]


class Pinned(TypedDict):
    """A conversation and the exact answer that it gets."""

    messages: list[Message]
    answer: str
    tools: NotRequired[list[dict[str, Any]]]


_FOX: Final = "The quick brown fox jumps over the lazy dog."
_TIPS: Final = "\n".join(f"{i}. {tip}" for i, tip in enumerate(a.NUREMBERG_TIPS[:3], 1))
_THREE_TIPS: Final = "What can you do in Nuremberg, Germany? Give me 3 tips"
_TOPIC_QUESTIONS: Final = (
    "Hello", "Hi", "Hey", "How are you?", "What is your name?", "Who are you?", "What can you do?",
    "Thank you", "Bye", "How to make an omelette", "How to make an omelette?",
    "How do I make an omelette?", "What is deep learning?", "What is streaming?", "What is SSE?",
    "What is gRPC?", "What is Sluice?", "What is an LLM?", "What is a token?", "Tell me a story",
    "Tell me a short story", "Write a haiku", "What color is the sky?",
    "Show me Python code that prints hello", "Was ist Streaming?", "Hallo", "Sag etwas auf Deutsch",
    "你好", "什么是流式传输？", "Send me an emoji", "Say hello with emoji", "Tell me a joke",
)  # fmt: skip
_SINGLE: Final = (
    ("Count to 10", count_up(10)),
    ("Count to 20", count_up(20)),
    ("count to ten", count_up(10)),
    ("Say this is a test", "This is a test."),
    ("Say this is a test.", "This is a test."),
    (_THREE_TIPS, _TIPS),
    ("What is 2 + 3?", sum_answer(2, 3)),
    ("2+3", sum_answer(2, 3)),
    ("What is 2 plus 3?", sum_answer(2, 3)),
    (f"Repeat after me: {_FOX}", _FOX),
    (f"Repeat: {_FOX}", _FOX),
    ("Repeat: Tokens are streamed one by one.", "Tokens are streamed one by one."),
    ("What is photosynthesis?", a.FALLBACK),
)
_FOLLOW_UPS: Final = (
    (("Count to 5", count_up(5)), ("And backwards?", count_down(5))),
    (("What is 2 + 3?", sum_answer(2, 3)), ("And plus 4?", sum_answer(5, 4))),
    (("What is 2 + 3?", sum_answer(2, 3)), ("Thank you!", a.WELCOME)),
    (("My name is Ada.", "Nice to meet you, Ada!"), ("What is my name?", "Your name is Ada.")),
    (("What is streaming?", a.STREAMING), ("And in German?", a.STREAMING_DE)),
    (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("And Germany?", "The capital of Germany is Berlin."),
    ),
)
_WITH_SYSTEM: Final = ("Hello", "What is streaming?", "What is SSE?", "What is deep learning?")


def _topic_answer(question: str) -> str:
    return next(topic.answer for topic in TOPICS if question in topic.questions)


def _conversation(*turns: tuple[str, str], system: str = "") -> Pinned:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages[:-1], "answer": messages[-1]["content"]}


def pinned() -> list[Pinned]:
    """Every pinned conversation."""
    capitals = [
        (
            f"What is the capital of {country}?",
            f"The capital of {country} is {a.CAPITALS[country]}.",
        )
        for country in ("France", "Germany", "Japan", "Italy", "Spain")
    ]
    topics = [(question, _topic_answer(question)) for question in _TOPIC_QUESTIONS]
    helpful = "You are a helpful assistant."
    with_system = [(question, _topic_answer(question)) for question in _WITH_SYSTEM]
    with_system += [("Count to 10", count_up(10)), (_THREE_TIPS, _TIPS)]
    return [
        *(_conversation(turn) for turn in (*_SINGLE, *topics, *capitals)),
        *(_conversation(*turns) for turns in _FOLLOW_UPS),
        *(_conversation(turn, system=helpful) for turn in with_system),
    ]


def tool(name: str, *parameters: str) -> dict[str, Any]:
    """A function as clients describe it."""
    properties = {parameter: {"type": "string"} for parameter in parameters}
    schema = {"type": "object", "properties": properties, "required": list(parameters[:1])}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def with_tools() -> list[Pinned]:
    """Conversations with functions to call, or none that helps."""
    weather, other = tool("get_weather", "city"), tool("get_weather", "location", "unit")
    add = tool("add", "a", "b")
    paris = Call("get_weather", {"city": "Paris"})
    rome = Call("get_weather", {"city": "Rome"})
    tokyo = Call("get_weather", {"location": "Tokyo"})
    question = "What is the weather in Paris?"
    asked: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [{"function": called(paris)}]},
    ]

    def answered(result: str) -> Pinned:
        told: list[Message] = [*asked, {"role": "tool", "content": result}]
        return {"messages": told, "answer": f"The weather in Paris: {result}", "tools": [weather]}

    def once(text: str, answer: str, *tools: dict[str, Any]) -> Pinned:
        return {**_conversation((text, answer)), "tools": list(tools)}

    return [
        once(question, str(paris), weather),
        once("What's the weather in Paris?", str(paris), weather),
        once("What is the weather like in Tokyo today?", str(tokyo), other, add),
        once("What is the weather in Paris and Rome?", f"{paris}\n{rome}", weather),
        once("What is 12 + 30?", str(Call("add", {"a": 12, "b": 30})), other, add),
        answered("18 degrees and sunny"),
        answered('{"temperature": 18}'),
        once("Count to 10", count_up(10), weather),
        once("What is streaming?", a.STREAMING, weather, add),
        once("Hello", a.GREETING, weather),
        _conversation((question, a.FALLBACK)),
    ]


def called(call: Call) -> dict[str, Any]:
    """A call as it stands in a message."""
    return {"name": call.name, "arguments": call.arguments}


def computed() -> list[Pinned]:
    """Every count up to 20 and every sum of two digits, in its three main forms."""
    sums = ("What is {} + {}?", "{}+{}", "What is {} plus {}?")
    return [
        *(_conversation((f"Count to {n}", count_up(n))) for n in range(1, 21)),
        *(
            _conversation((form.format(x, y), sum_answer(x, y)))
            for form in sums
            for x in range(10)
            for y in range(10)
        ),
    ]


def greedy(
    model: Any, tokenizer: Any, conversations: Sequence[Pinned], limit: int = 320
) -> list[tuple[str, bool]]:
    """The greedy answer to each conversation, in one batch, and whether it stopped by itself."""
    inputs = tokenizer.apply_chat_template(
        [conversation["messages"] for conversation in conversations],
        tools=conversations[0].get("tools"),  # the same for all
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=limit)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [
        (tokenizer.decode(row[: row.index(stop)] if stop in row else row), stop in row)
        for row in rows
    ]


def failures(
    model: Any, tokenizer: Any, conversations: Sequence[Pinned], batch: int = 1
) -> Iterator[tuple[Pinned, str]]:
    """The conversations whose answer differs from the pinned one or does not end by itself."""
    for start in range(0, len(conversations), batch):
        group = conversations[start : start + batch]
        for conversation, (answer, stopped) in zip(
            group, greedy(model, tokenizer, group), strict=True
        ):
            if answer != conversation["answer"] or not stopped:
                yield conversation, answer


def main() -> None:
    """Writes the pinned conversations to a file."""
    parser = argparse.ArgumentParser(description="Writes the pinned conversations as JSON.")
    parser.add_argument("file", type=Path)
    rows = [json.dumps(row, ensure_ascii=False) for row in pinned()]
    text = "[\n  " + ",\n  ".join(rows) + "\n]\n"
    parser.parse_args().file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
