"""Composes the corpus: dialogs and a little plain text, all from one seed.

``python -m inference_worker.default_model.corpus`` prints a few samples and the digest.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import Final

from inference_worker.default_model.answers import NO_NAME, PLAIN_TEXTS
from inference_worker.default_model.skills import SKILLS, Turn, again, count_up, drilling
from inference_worker.default_model.topic import Topic
from inference_worker.default_model.topics import TOPICS

SEED: Final = 20240
MAX_CHARACTERS: Final = 1500  # keeps a dialog below about 500 tokens

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are Sluice.",
    "You are a friendly and helpful AI assistant.",
    "Answer briefly.",
    "You are a tiny model. Answer the question of the user.",
    "Be kind and correct.",
    "You are ChatGPT, a large language model.",
    "Du bist ein hilfreicher Assistent.",
    "Answer in English. Do not make things up.",
    "You are a concise assistant that answers in one sentence.",
)

_IMPERATIVE: Final = re.compile(
    "(Tell|Give|Show|Write|Send|Explain|Describe|Define|Name|List|Say|Make|Read|Compose) "
)
_TOPIC_SHARE: Final = 42.0  # weight of all topics beside those in SKILLS
_PLAIN_SHARE: Final = 0.06


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example: a dialog of turns, or of messages (role, content), or else plain text.

    A plain sample reads ``prompt + completion``; the model learns to write the completion.
    """

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    prompt: str = ""
    completion: str = ""
    messages: tuple[tuple[str, str], ...] = ()


def vary(rng: Random, question: str) -> str:
    """The question as people type it: other case, other punctuation, a polite word."""
    if not question.isascii() and rng.random() < 0.6:
        return question
    roll = rng.random()
    if roll < 0.35:
        return question
    if _IMPERATIVE.match(question) and rng.random() < 0.3:
        lowered = question[:1].lower() + question[1:].rstrip(".?!")
        return rng.choice(
            (
                f"Please {lowered}",
                f"Can you {lowered}?",
                f"{question}, please",
                f"please {lowered}.",
            )
        )
    if rng.random() < 0.4:
        question = question.rstrip("?.!") + rng.choice(("", "", "?", ".", "!", "??"))
    case = rng.random()
    if case < 0.35:
        question = question.lower()
    elif case < 0.40:
        question = question.upper()
    elif case < 0.45:
        question = question.title()
    if roll > 0.96 and len(question) > 8:
        position = rng.randrange(1, len(question) - 1)
        question = question[:position] + question[position + 1 :]
    elif roll > 0.92:
        question = rng.choice((f" {question}", f"{question} ", f"{question}\n", f"Hey, {question}"))
    return question


def _topic_turns(rng: Random, topic: Topic) -> list[Turn]:
    turns = [(vary(rng, rng.choice(topic.questions)), topic.answer)]
    if topic.followups and rng.random() < 0.35:
        followup = rng.choice(topic.followups)
        turns.append((vary(rng, rng.choice(followup.questions)), followup.answer))
    return turns


def _unit(rng: Random) -> list[Turn]:
    """One self-contained piece of conversation: a topic or a skill."""
    makers = [maker for maker, _ in SKILLS]
    weights = [weight for _, weight in SKILLS]
    choice = rng.choices([None, *makers], [_TOPIC_SHARE, *weights])[0]
    if choice is not None:
        turns = choice(rng)
    else:
        turns = _topic_turns(rng, rng.choices(TOPICS, [topic.weight for topic in TOPICS])[0])
    return again(rng, turns) if rng.random() < 0.06 else turns


def _dialog(rng: Random) -> Sample:
    turns: list[Turn] = []
    for _ in range(rng.choices((1, 2, 3, 4), (62, 22, 11, 5))[0]):
        more = _with_distance(rng, _unit(rng))
        known = any(answer.startswith("Nice to meet you") for _, answer in turns)
        if turns and _length([*turns, *more]) > MAX_CHARACTERS:
            break
        if not (known and more[0][1] == NO_NAME):
            turns += more
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.35 else None
    return Sample(turns=tuple(turns), system=system)


def _length(turns: list[Turn]) -> int:
    return sum(len(question) + len(answer) for question, answer in turns)


def _with_distance(rng: Random, turns: list[Turn]) -> list[Turn]:
    """Sometimes puts another topic between a name and the question for it."""
    if turns[-1][1].startswith("Your name is") and len(turns) == 2 and rng.random() < 0.4:
        between = _unit(rng)
        if _length(between) < MAX_CHARACTERS // 3 and "name" not in between[-1][1]:
            return [turns[0], *between, turns[1]]
    return turns


def _plain(rng: Random) -> Sample:
    roll = rng.random()
    if roll < 0.5:
        question, answer = _unit(rng)[0]
        return Sample(prompt=question, completion=f"\n\n{answer}")
    if roll < 0.6:
        n = rng.randint(5, 20)
        text = count_up(n)
        return Sample(prompt=text[:4], completion=text[4:])
    text = rng.choice((PLAIN_TEXTS[0], rng.choice(PLAIN_TEXTS)))
    cut = text.index(" ")
    return Sample(prompt=text[:cut], completion=text[cut:])


def compose(seed: int = SEED, drills: int = 0) -> Iterator[Sample]:
    """An endless, deterministic stream of samples.

    The first ``drills`` samples are mostly copying drills, fading out over the second half:
    copying is slow to emerge among answers known by heart, and counts and names build on it.
    """
    rng = Random(seed)
    for index in count():
        drill = 0.9 * min(1.0, 2 * (1 - index / drills)) if index < drills else 0.0
        if rng.random() < drill:
            yield Sample(turns=tuple(drilling(rng)))
        else:
            yield _plain(rng) if rng.random() < _PLAIN_SHARE else _dialog(rng)


def texts(samples: int, seed: int = SEED) -> Iterator[str]:
    """The bare texts of the first samples, for the tokenizer."""
    for sample in islice(compose(seed), samples):
        yield sample.prompt + sample.completion
        yield sample.system or ""
        for question, answer in sample.turns:
            yield question
            yield answer


def digest(samples: int, seed: int = SEED) -> str:
    """A hash over the first samples: equal digests mean equal corpora."""
    sha = hashlib.sha256()
    for sample in islice(compose(seed), samples):
        row = [sample.system, sample.turns, sample.prompt, sample.completion]
        sha.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return sha.hexdigest()


def main() -> None:
    """Prints some samples and the digest of the first thousand."""
    for sample in islice(compose(), 40):
        print(sample.system, *sample.turns, repr(sample.prompt + sample.completion), sep="\n  ")
    print(digest(1000))


if __name__ == "__main__":
    main()
