"""Turns samples into padded batches of token ids and marks the tokens to learn."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Final

import torch
from tokenizers import Tokenizer

from inference_worker.default_model.corpus import Sample
from inference_worker.default_model.train_tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    SPECIAL_TOKENS,
    token_id,
)

IGNORED: Final = -100
MAX_TOKENS: Final = 640
_POOL_BATCHES: Final = 24
_EARLY_TOKEN_DRILLS: Final = 0.25
_LATE_TOKEN_DRILLS: Final = 0.03


@dataclass(frozen=True, slots=True)
class Encoded:
    """The ids of one sample; ``learned`` marks the ids that the model has to predict."""

    ids: list[int]
    learned: list[bool]


class Encoder:
    """Encodes samples exactly as the chat template renders them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start = token_id(tokenizer, IM_START)
        self._end = token_id(tokenizer, IM_END)
        self._stop = token_id(tokenizer, END_OF_TEXT)

    def _text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _message(self, role: str, content: str) -> Encoded:
        head = [self._start, *self._text(f"{role}\n")]
        body = [*self._text(content), self._end]
        tail = self._text("\n")
        learned = [False] * len(head) + [role == "assistant"] * len(body) + [False] * len(tail)
        return Encoded(head + body + tail, learned)

    def __call__(self, sample: Sample) -> Encoded:
        """The sample's ids, cut to ``MAX_TOKENS``."""
        if not (sample.turns or sample.messages):
            prompt = self._text(sample.prompt)
            completion = [*self._text(sample.completion), self._stop]
            return Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion))
        messages = [self._message("system", sample.system)] if sample.system else []
        for question, answer in sample.turns:
            messages += [self._message("user", question), self._message("assistant", answer)]
        messages += [self._message(role, content) for role, content in sample.messages]
        ids = [i for message in messages for i in message.ids]
        learned = [flag for message in messages for flag in message.learned]
        return Encoded(ids[:MAX_TOKENS], learned[:MAX_TOKENS])

    def token_drill(self, rng: Random) -> Encoded:
        """Tokens at random to copy, so that rare tokens are copied as surely as common ones."""
        first = len(SPECIAL_TOKENS)
        row = [
            rng.randrange(first, self._tokenizer.get_vocab_size())
            for _ in range(rng.randint(3, 20))
        ]
        question = [self._start, *self._text("user\nRepeat:"), *row, self._end, *self._text("\n")]
        opening = [self._start, *self._text("assistant\n")]
        ids = [*question, *opening, *row, self._end]
        return Encoded(ids, [False] * (len(ids) - len(row) - 1) + [True] * (len(row) + 1))


def batches(
    tokenizer: Tokenizer,
    stream: Iterator[Sample],
    seed: int,
    tokens_per_batch: int,
    drills: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches ``(ids, labels)`` of samples of similar length, in random order."""
    encoder = Encoder(tokenizer)
    samples = enumerate(stream)
    rng = Random(seed)
    while True:
        pool: list[Encoded] = []
        while sum(len(encoded.ids) for encoded in pool) < _POOL_BATCHES * tokens_per_batch:
            for index, sample in islice(samples, 100):
                share = _EARLY_TOKEN_DRILLS if index < drills else _LATE_TOKEN_DRILLS
                drilled = rng.random() < share
                pool.append(encoder.token_drill(rng) if drilled else encoder(sample))
        pool.sort(key=lambda encoded: len(encoded.ids))
        groups = list(_grouped(pool, tokens_per_batch))
        rng.shuffle(groups)
        yield from map(_padded, groups)


def _grouped(pool: list[Encoded], tokens_per_batch: int) -> Iterator[list[Encoded]]:
    group: list[Encoded] = []
    for encoded in pool:
        if group and (len(group) + 1) * len(encoded.ids) > tokens_per_batch:
            yield group
            group = []
        group.append(encoded)
    yield group


def _padded(group: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(encoded.ids) for encoded in group)
    ids = torch.zeros(len(group), width, dtype=torch.long)
    labels = torch.full((len(group), width), IGNORED, dtype=torch.long)
    for row, encoded in enumerate(group):
        length = len(encoded.ids)
        ids[row, :length] = torch.tensor(encoded.ids)
        targets = [
            i if flag else IGNORED for i, flag in zip(encoded.ids, encoded.learned, strict=True)
        ]
        # A position predicts the next token, so labels move one to the left.
        labels[row, : length - 1] = torch.tensor(targets[1:])
    return ids, labels
