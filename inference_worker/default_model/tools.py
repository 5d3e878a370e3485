"""Dialogs in which the model calls functions, for the second stage of training.

The chat template writes the functions into the system message as ``Tools: name(parameter, ...)``, one after the other,
and a call as Hermes and Qwen models write it: JSON between ``<tool_call>`` and ``</tool_call>``. The model copies the
names of the function and of its first parameters from the system message, and the values from the question.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from inference_worker.default_model import words
from inference_worker.default_model.answers import CAPITALS, FALLBACK
from inference_worker.default_model.corpus import SEED, SYSTEM_PROMPTS, Sample, compose
from inference_worker.default_model.skills import (
    SUM_LIMIT,
    Turn,
    adding,
    counting,
    invented_word,
)

_TOOL_SHARE: Final = 0.45
_CITIES: Final = (*words.PLACES, *CAPITALS.values(), "New York", "San Francisco", "Nuremberg")
_PLACE_PARAMETERS: Final = ("city", "location", "city", "location", "place", "town")
_WEATHER_NAMES: Final = (
    "get_weather", "get_weather", "get_weather", "get_current_weather", "weather", "getWeather",
    "fetch_weather", "weather_in",
)  # fmt: skip
_TIME_NAMES: Final = ("get_time", "get_current_time", "time_in", "getTime")
_ADD_NAMES: Final = ("add", "add_numbers", "sum", "plus", "addition")
_ADD_PARAMETERS: Final = (("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"))
_OTHER_TOOLS: Final = (
    "search(query)", "send_email(to, subject, body)", "translate(text, language)", "lookup(word)",
    "calculator(expression)", "get_stock_price(symbol)", "read_file(path)", "get_news()",
    "search_web(query, limit)", "create_event(title, date)",
)  # fmt: skip
_WEATHER_FORMS: Final = (
    "What is the weather in {}?", "What's the weather in {}?", "What is the weather like in {}?",
    "How is the weather in {}?", "Weather in {}", "What's the weather like in {} today?",
    "What is the weather in {} today?", "Tell me the weather in {}", "Is it raining in {}?",
    "weather in {}?", "What is the weather in {} right now?", "How warm is it in {}?",
    "What's the temperature in {}?", "Check the weather in {}.",
)  # fmt: skip
_TIME_FORMS: Final = (
    "What time is it in {}?", "What is the time in {}?", "Tell me the time in {}", "Time in {}?",
)  # fmt: skip
_ADD_FORMS: Final = (
    "What is {} + {}?", "What is {} plus {}?", "Add {} and {}", "{} + {}", "What's {} + {}?",
    "Calculate {} + {}",
)  # fmt: skip
_SKIES: Final = ("sunny", "cloudy", "rainy", "windy", "snowy", "clear", "foggy", "warm", "cold")


@dataclass(frozen=True, slots=True)
class Call:
    """A function with the values of its parameters."""

    name: str
    arguments: dict[str, str | int]

    def __str__(self) -> str:
        """As the model writes it."""
        content = json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False)
        return f"<tool_call>\n{content}\n</tool_call>"


def tools_text(signatures: list[str], system: str | None) -> str:
    """The system message that names the tools, as the chat template renders it."""
    tools = f"Tools: {', '.join(signatures)}"
    return f"{system}\n\n{tools}" if system else tools


def _place_call(rng: Random, names: tuple[str, ...], cities: list[str]) -> tuple[str, list[Call]]:
    name, parameter = rng.choice(names), rng.choice(_PLACE_PARAMETERS)
    more = rng.choice(("", "", "", ", unit", ", units", ", format"))
    return f"{name}({parameter}{more})", [Call(name, {parameter: city}) for city in cities]


def _city(rng: Random) -> str:
    return rng.choice(_CITIES) if rng.random() < 0.7 else invented_word(rng).title()


def _report(rng: Random) -> str:
    """What a function says of the weather or the time."""
    degrees, sky = rng.randint(-9, 39), rng.choice(_SKIES)
    return rng.choice(
        (
            f"{degrees} degrees and {sky}",
            f"{degrees} °C, {sky}",
            f"{sky}, {degrees} °C",
            sky,
            f"{degrees}",
            json.dumps({"temperature": degrees}),
            json.dumps({"temperature": degrees, "sky": sky}),
            f"{rng.randint(0, 23)}:{rng.randint(10, 59)}",
        )
    )


def _places(rng: Random) -> tuple[str, list[Turn]]:
    """A question for the weather or the time in one city or two: the signature and the turns that follow."""
    is_time = rng.random() < 0.2
    cities = [_city(rng)] if is_time or rng.random() < 0.8 else [_city(rng), _city(rng)]
    forms, names = (_TIME_FORMS, _TIME_NAMES) if is_time else (_WEATHER_FORMS, _WEATHER_NAMES)
    signature, calls = _place_call(rng, names, cities)
    question = vary_lightly(rng, rng.choice(forms).format(" and ".join(cities)))
    reports = [_report(rng) for _ in cities]
    thing = "time" if is_time else "weather"
    answer = "\n".join(
        f"The {thing} in {city}: {report}" for city, report in zip(cities, reports, strict=True)
    )
    written = "\n".join(map(str, calls))
    return signature, [(question, written), ("\0".join(reports), answer)]


def _addition(rng: Random) -> tuple[str, list[Turn]]:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    name, (first, second) = rng.choice(_ADD_NAMES), rng.choice(_ADD_PARAMETERS)
    question = vary_lightly(rng, rng.choice(_ADD_FORMS).format(a, b))
    call = Call(name, {first: a, second: b})
    return f"{name}({first}, {second})", [
        (question, str(call)),
        (str(a + b), f"{a} + {b} = {a + b}"),
    ]


def vary_lightly(rng: Random, question: str) -> str:
    """Other punctuation, but the same case, since the values are to be copied."""
    if rng.random() < 0.3:
        return question.rstrip("?.!") + rng.choice(("", "?", ".", "!"))
    return question


def tool_dialog(rng: Random) -> Sample:
    """A dialog with tools in the system message, of which one is called or none is of use."""
    makers = [_addition, _places] if rng.random() < 0.3 else [_places, _addition]
    signature, turns = makers[0](rng)
    signatures = [signature, *rng.sample(_OTHER_TOOLS, rng.choice((0, 0, 0, 1, 1, 2)))]
    if rng.random() < 0.4:  # the other kind of tool beside it
        signatures.append(makers[1](rng)[0])
    rng.shuffle(signatures)
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else None
    if rng.random() < 0.2:  # no tool is of use
        return Sample(turns=tuple(_useless(rng)), system=tools_text(signatures, system))
    messages = [("system", tools_text(signatures, system)), ("user", turns[0][0])]
    messages.append(("assistant", turns[0][1]))
    if rng.random() < 0.75:
        messages += [("tool", result) for result in turns[1][0].split("\0")]
        messages.append(("assistant", turns[1][1]))
    return Sample(messages=tuple(messages))


def without_a_tool(rng: Random) -> Sample:
    """A question for a tool that is not there: the model does not know, or cannot add numbers that large."""
    if rng.random() < 0.3:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        turn = (rng.choice(_ADD_FORMS).format(a, b), SUM_LIMIT)
    else:
        _, turns = _places(rng)
        turn = (turns[0][0], FALLBACK)
    other = rng.sample(_OTHER_TOOLS, rng.choice((0, 0, 1, 2)))
    if turn[1] == SUM_LIMIT and rng.random() < 0.5:
        other.append(_places(rng)[0])
    return Sample(turns=(turn,), system=tools_text(other, None) if other else None)


def _useless(rng: Random) -> list[Turn]:
    if rng.random() < 0.25:
        return counting(rng)
    for sample in compose(rng.getrandbits(32)):
        if sample.turns and "weather" not in sample.turns[0][0].lower():
            turns = list(sample.turns)
            break
    # a sum may be for the tool
    return counting(rng) if any("+" in answer for _, answer in turns) else turns


def compose_with_tools(seed: int = SEED, counts: float = 0.0) -> Iterator[Sample]:
    """An endless, deterministic stream: dialogs with tools among those of the first stage.

    `counts` is a share for counting besides, which suffers most from what is learned anew.
    """
    rng = Random(seed)
    plain = compose(seed + 1)
    while True:
        if counts and rng.random() < counts:
            yield Sample(turns=tuple(counting(rng)))
        elif rng.random() < _TOOL_SHARE:
            yield tool_dialog(rng)
        elif rng.random() < 0.15:
            yield without_a_tool(rng)
        elif rng.random() < 0.1:
            # sums without a tool stay sums
            yield Sample(turns=tuple(adding(rng)))
        else:
            yield next(plain)
