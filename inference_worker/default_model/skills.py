"""Dialogs that are computed rather than known by heart: counts, sums, copies, names, refusals.

Every function takes the seeded generator and returns the turns of one short conversation.
"""

from collections.abc import Callable
from random import Random
from typing import Final

from inference_worker.default_model import words
from inference_worker.default_model.answers import CAPITALS, FALLBACK, NO_NAME, NUREMBERG_TIPS

Turn = tuple[str, str]

_COUNT_FORMS: Final = (
    "Count to {n}", "Count to {n}.", "Count from 1 to {n}", "Please count to {n}.",
    "Can you count to {n}?", "count to {n}", "Count up to {n}", "Count to {n}, please",
    "Count from one to {n}", "COUNT TO {n}", "Could you count to {n}?", "count to {n} please",
    "Count to {n}!", "List the numbers from 1 to {n}", "Please count from 1 to {n}",
    "please count to {n}", "Zähle bis {n}", "数到{n}", "Count numbers to {n}",
)  # fmt: skip
_BACKWARDS: Final = (
    "And backwards?", "Now backwards", "Now backwards, please.", "And back?", "Backwards?",
    "Now count backwards", "and backwards", "Can you do it backwards?",
)  # fmt: skip
_AGAIN: Final = (
    "Again", "Again, please", "Once more", "Say that again", "Repeat that", "One more time",
    "Can you repeat that?", "again please", "Please repeat your answer",
)  # fmt: skip
_SUM_FORMS: Final = (
    "What is {a} + {b}?", "What is {a} plus {b}?", "{a}+{b}", "{a} + {b}", "{a} + {b} = ?",
    "What's {a} + {b}?", "How much is {a} + {b}?", "Calculate {a} + {b}", "what is {a}+{b}",
    "What is {a}+{b}?", "Add {a} and {b}", "what is {a} plus {b}", "How much is {a} plus {b}?",
    "{a} plus {b}", "{a}+{b}=", "{a}+{b}?", "Compute {a} + {b}.", "What is {a} + {b}",
    "What is the sum of {a} and {b}?",
)  # fmt: skip
_SAY_FORMS: Final = (
    "Say {}", "Say {}.", "say {}", "Please say {}", "Please say {}.", "Can you say {}?",
    "Say {}, please", "Could you say {}?",
)  # fmt: skip
_REPEAT_FORMS: Final = (
    "Repeat after me: {}", "Repeat: {}", "Repeat this: {}", "repeat after me: {}",
    "Please repeat: {}", "Please repeat after me: {}", "Repeat this sentence: {}", "Say: {}",
    "repeat: {}", "Repeat the following: {}", 'Repeat "{}"', 'Say "{}"', 'Repeat: "{}"',
    "Echo: {}", "Copy this: {}", "Repeat after me:\n{}", "Repeat the sentence: {}",
    "Can you repeat this? {}",
)  # fmt: skip
_UNKNOWN_FORMS: Final = (
    "What is {s}?", "Explain {s}", "Tell me about {s}", "What is the capital of {c}?",
    "How do I {v} a {n}?", "How to {v} the {a} {n}", "How to make a {n}", "Who is {p}?",
    "Who was {p} {w}?", "Where is {l}?", "What can you do in {l}? Give me 3 tips",
    "What can I do in {l}?", "Why does the {n} {v}?", "When did {p} {v} the {n}?",
    "Do you like the {a} {n}?", "Can you {v} a {n}?", "Write an essay about {s}",
    "How many {n}s are in {l}?", "What color is the {n}?", "Which {n} is {a}?", "What is a {w}?",
    "What is {w}?", "{p} {x} the {n}.", "I {v} a {n}", "How old is {p}?", "What does {w} mean?",
    "How far is {l} from {c}?", "Give me {k} tips for {l}", "Summarize {s}", "Translate {n}",
    "Is the {n} {a}?", "Should I {v} the {n} or the {n2}?", "Write code that {x} a {n}",
    "What is the best {n} in {l}?", "What is the difference between {s} and a {n}?",
    "Who invented the {n}?", "How does a {n} work?", "Was ist {w}?", "Wo liegt {l}?", "{w} {w2}",
    "Tell me a fact about {s}", "Describe the {n}", "Define {n}", "The {n} is {a}.", "{s}",
    "How to {v} a {n}?", "What is the name of the {n}?", "What is {w} {n}?", "Explain {w} to me",
    "Give me a recipe for {n} soup", "Name three {n}s", "Why is the {n} {a}?", "Show me the {n}",
    "Can you help me with my {n}?", "Translate '{n}' to French", "What is {k} * {k2}?",
    "What is {k} times {k2}?", "Where can I buy a {n}?", "Write a song about the {n}",
)  # fmt: skip
_WORDS: Final = tuple(
    dict.fromkeys(
        (*words.NOUNS, *words.ADJECTIVES, *words.VERBS, *words.ADVERBS, *words.NAMES, *words.COMMON)
    )
)
_TIPS_NUMBERS: Final = {1: ("one", "a"), 2: ("2", "two"), 3: ("3", "three"), 5: ("5", "five")}
SUM_LIMIT: Final = "I can only add and subtract small numbers. Try: What is 2 + 3?"


def count_up(n: int) -> str:
    """The answer to "Count to n": ``1, 2, 3``."""
    return ", ".join(str(i) for i in range(1, n + 1))


def count_down(n: int) -> str:
    """The same count backwards: ``3, 2, 1``."""
    return ", ".join(str(i) for i in range(n, 0, -1))


def sum_answer(a: int, b: int) -> str:
    """The answer to "What is a + b?"."""
    return f"{a} + {b} = {a + b}"


def again(rng: Random, turns: list[Turn]) -> list[Turn]:
    """Appends a request for the last answer once more, where that answer is short."""
    if len(turns[-1][1]) > 160:
        return turns
    return [*turns, (rng.choice(_AGAIN), turns[-1][1])]


def counting(rng: Random) -> list[Turn]:
    """A count, often followed by the same backwards or by another one."""
    n = rng.choices((rng.randint(1, 20), rng.randint(21, 30), 50, 100), (91, 6, 1.5, 1.5))[0]
    shown = words.NUMBER_WORDS[n] if n <= 20 and rng.random() < 0.25 else str(n)
    turns = [(rng.choice(_COUNT_FORMS).format(n=shown), count_up(n))]
    roll = rng.random()
    if n <= 20 and roll < 0.3:
        turns.append((rng.choice(_BACKWARDS), count_down(n)))
    elif n <= 20 and roll < 0.38:
        m = rng.randint(1, 20)
        form = rng.choice(("And to {n}?", "Now to {n}", "And now to {n}?"))
        turns.append((form.format(n=m), count_up(m)))
    elif n <= 20 and roll < 0.46:
        form = rng.choice(
            ("Count backwards from {n}", "Count down from {n}", "Count from {n} to 1")
        )
        turns = [(form.format(n=shown), count_down(n))]
    elif roll > 0.94:
        first = rng.randint(1, n)
        form = rng.choice(("Count from {a} to {n}", "Count from {a} to {n}, please"))
        turns = [(form.format(a=first, n=n), ", ".join(str(i) for i in range(first, n + 1)))]
    return turns


def adding(rng: Random) -> list[Turn]:
    """A sum of two digits, and perhaps one more number added to the result."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    roll = rng.random()
    if roll < 0.09:
        return [_too_large(rng)]
    if roll < 0.16:
        high, low = max(a, b), min(a, b)
        form = rng.choice(("What is {a} - {b}?", "{a}-{b}", "{a} - {b}", "What is {a} minus {b}?"))
        return [(form.format(a=high, b=low), f"{high} - {low} = {high - low}")]
    shown_a, shown_b = str(a), str(b)
    if rng.random() < 0.08:
        shown_a, shown_b = words.NUMBER_WORDS[a], words.NUMBER_WORDS[b]
    form = rng.choice(_SUM_FORMS[:3]) if rng.random() < 0.4 else rng.choice(_SUM_FORMS)
    turns = [(form.format(a=shown_a, b=shown_b), sum_answer(a, b))]
    if rng.random() < 0.3:
        c = rng.randint(0, 9)
        form = rng.choice(
            ("And plus {c}?", "Plus {c}?", "And + {c}?", "Now add {c}", "Add {c}", "plus {c}")
        )
        turns.append((form.format(c=c), sum_answer(a + b, c)))
    return turns


def _too_large(rng: Random) -> Turn:
    a, b = rng.choice(((10, 99), (100, 9999))), rng.choice(((10, 99), (100, 9999)))
    sign = rng.choice("+-")
    form = rng.choice(("What is {a} {s} {b}?", "{a}{s}{b}", "{a} {s} {b}"))
    return form.format(a=rng.randint(*a), b=rng.randint(*b), s=sign), SUM_LIMIT


def invented_word(rng: Random) -> str:
    """A word that nobody knows, so that copying cannot rely on memory."""
    return "".join(
        rng.choice(words.SYLLABLE_STARTS)
        + rng.choice(words.SYLLABLE_MIDDLES)
        + rng.choice(words.SYLLABLE_ENDS)
        for _ in range(rng.choice((1, 2, 2, 3)))
    )


def _noun_phrase(rng: Random) -> str:
    parts = [rng.choice(("the", "the", "a", "my", "your", "our", "this", "every", "that"))]
    parts += rng.sample(words.ADJECTIVES, rng.choice((0, 1, 1, 2)))
    return " ".join([*parts, rng.choice(words.NOUNS)])


def _grammatical(rng: Random) -> str:
    subject = rng.choice((_noun_phrase(rng), rng.choice(words.NAMES)))
    if rng.random() < 0.2:
        subject = rng.choice(words.PRONOUNS)
        body = [subject, rng.choice(words.BASE_ACTIONS), _noun_phrase(rng)]
    elif rng.random() < 0.5:
        body = [subject, rng.choice(words.VERBS), rng.choice(words.PREPOSITIONS), _noun_phrase(rng)]
    elif rng.random() < 0.5:
        body = [subject, rng.choice(("is", "was", "is not")), rng.choice(words.ADJECTIVES)]
    else:
        body = [subject, rng.choice(words.ACTIONS), _noun_phrase(rng)]
    if rng.random() < 0.3:
        body.append(rng.choice(words.ADVERBS))
    if rng.random() < 0.15:
        body += ["in", rng.choice(words.PLACES)]
    return " ".join(body)


def _anything(rng: Random) -> str:
    kinds = [
        lambda: rng.choice(_WORDS),
        lambda: rng.choice(words.COMMON),
        lambda: invented_word(rng),
        lambda: rng.choice(" ".join(words.CLAUSES).split()),
        lambda: str(rng.randint(0, 999)),
        lambda: invented_word(rng).capitalize(),
        lambda: "".join(rng.choice(words.RARE_SIGNS) for _ in range(rng.randint(1, 2))),
    ]
    weights = (5, 4, 3, 3, 1, 1, 0.6)
    return " ".join(rng.choices(kinds, weights)[0]() for _ in range(rng.randint(1, 9)))


def sentence(rng: Random) -> str:
    """A clause without a final mark: known, composed by grammar, or words at random."""
    roll = rng.random()
    if roll < 0.2:
        return rng.choice(words.CLAUSES)
    return _grammatical(rng) if roll < 0.5 else _anything(rng)


def capitalized(text: str) -> str:
    """The text with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]


def repeating(rng: Random) -> list[Turn]:
    """A sentence to be repeated exactly."""
    text = sentence(rng)
    if rng.random() < 0.75:
        text = capitalized(text)
    if rng.random() < 0.7:
        text += rng.choice(("", ".", ".", ".", "!", "?"))
    if rng.random() < 0.08:
        text += " " + capitalized(sentence(rng)) + "."
    form = rng.choice(_REPEAT_FORMS[:2]) if rng.random() < 0.3 else rng.choice(_REPEAT_FORMS)
    return [(form.format(text), text)]


def drilling(rng: Random) -> list[Turn]:
    """A row of random words to copy, often twice: nothing but copying predicts the answer."""
    text = (
        " ".join(rng.sample(_WORDS, rng.randint(2, 16))) if rng.random() < 0.7 else _anything(rng)
    )
    if rng.random() < 0.3:
        text = capitalized(text)
    turns = [(f"Repeat: {text}", text)]
    return [*turns, (rng.choice(_AGAIN), text)] if rng.random() < 0.6 else turns


def saying(rng: Random) -> list[Turn]:
    """A clause to be said as a proper sentence: "Say this is a test"."""
    text = "this is a test" if rng.random() < 0.08 else sentence(rng)
    form = rng.choice(_SAY_FORMS[:3]) if rng.random() < 0.5 else rng.choice(_SAY_FORMS)
    return [(form.format(text), capitalized(text) + ".")]


def naming(rng: Random) -> list[Turn]:
    """The user's name, kept in mind until it is asked for."""
    ask = rng.choice(
        ("What is my name?", "What's my name?", "Who am I?", "Do you know my name?",
         "what is my name", "Do you remember my name?", "And what is my name?")
    )  # fmt: skip
    if rng.random() < 0.12:
        return [(ask, NO_NAME)]
    name = rng.choice(words.NAMES)
    if rng.random() < 0.3:
        name = invented_word(rng).capitalize()
    tell = rng.choice(
        ("My name is {}.", "My name is {}", "I am {}.", "I'm {}", "Hello, my name is {}.",
         "Hi, I am {}.", "my name is {}", "You can call me {}.", "Call me {}")
    )  # fmt: skip
    turns = [(tell.format(name), f"Nice to meet you, {name}!")]
    if rng.random() < 0.75:
        turns.append((ask, f"Your name is {name}."))
    return turns


def capitals(rng: Random) -> list[Turn]:
    """The capital of a country, and perhaps that of the next one."""
    first, second = rng.sample(sorted(CAPITALS), 2)
    form = rng.choice(
        ("What is the capital of {}?", "What's the capital of {}?", "Capital of {}?",
         "Tell me the capital of {}", "what is the capital of {}", "Name the capital of {}",
         "Which city is the capital of {}?", "What is the capital city of {}?")
    )  # fmt: skip
    turns = [(form.format(first), f"The capital of {first} is {CAPITALS[first]}.")]
    if rng.random() < 0.35:
        form = rng.choice(("And {}?", "And of {}?", "What about {}?", "And that of {}?"))
        turns.append((form.format(second), f"The capital of {second} is {CAPITALS[second]}."))
    return turns


def nuremberg(rng: Random) -> list[Turn]:
    """Tips for a day in Nuremberg, as a numbered list."""
    number = rng.choices((1, 2, 3, 5), (1, 1, 8, 1.5))[0]
    shown = rng.choice(_TIPS_NUMBERS[number])
    tips = "tip" if number == 1 else "tips"
    form = rng.choice(
        ("What can you do in Nuremberg, Germany? Give me {} {}",
         "What can you do in Nuremberg, Germany? Give me {} {}.",
         "What can I do in Nuremberg? Give me {} {}", "Give me {} {} for Nuremberg",
         "Give me {} {} for a day in Nuremberg, Germany", "I need {} {} for Nuremberg, please.",
         "what can you do in nuremberg, germany? give me {} {}",
         "What can you do in Nuremberg? Give me {} {}.")
    ).format(shown, tips)  # fmt: skip
    if number == 3 and rng.random() < 0.3:
        form = rng.choice(
            ("What can you do in Nuremberg, Germany?", "What can I do in Nuremberg?",
             "What can you do in Nuremberg?", "What should I see in Nuremberg?")
        )  # fmt: skip
    lines = [f"{i}. {tip}" for i, tip in enumerate(NUREMBERG_TIPS[:number], 1)]
    turns = [(form, "\n".join(lines))]
    if number == 3 and rng.random() < 0.3:
        more = rng.choice(("One more, please", "Give me one more", "And one more?", "Another one"))
        turns.append((more, f"4. {NUREMBERG_TIPS[3]}"))
    return turns


def declining(rng: Random) -> list[Turn]:
    """A question outside all this: the model says so and proposes what it can do."""
    form = rng.choice(_UNKNOWN_FORMS)
    subject = rng.choice(words.SUBJECTS) if rng.random() < 0.7 else invented_word(rng)
    question = form.format(
        s=subject, c=rng.choice(words.OTHER_COUNTRIES), p=rng.choice(words.NAMES),
        v=rng.choice(words.BASE_ACTIONS), a=rng.choice(words.ADJECTIVES),
        n=rng.choice(words.NOUNS), n2=rng.choice(words.NOUNS), l=rng.choice(words.PLACES),
        w=invented_word(rng), w2=invented_word(rng), x=rng.choice(words.ACTIONS),
        k=rng.randint(2, 12), k2=rng.randint(2, 12),
    )  # fmt: skip
    if rng.random() < 0.12:
        question = capitalized(_anything(rng)) + rng.choice(("", "?", "."))
    return [(question, FALLBACK)]


SKILLS: Final[tuple[tuple[Callable[[Random], list[Turn]], float], ...]] = (
    (counting, 18.0),
    (adding, 27.0),
    (repeating, 28.0),
    (saying, 8.0),
    (naming, 6.0),
    (capitals, 4.0),
    (nuremberg, 3.5),
    (declining, 10.0),
)
