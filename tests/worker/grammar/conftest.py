"""Noise engines over both kinds of tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from inference_worker.default_model import CHECKPOINT
from inference_worker.tokenizer import Tokenizer
from tests.worker.grammar.noise import Noise
from tests.worker.test_tokenizer import save, sentencepiece

END = 2  # of the embedded model


@pytest.fixture(scope="session")
def noise() -> Iterator[Noise]:
    """Over the embedded model's tokenizer: byte-level, with special tokens."""
    noise = Noise(Tokenizer.load(str(CHECKPOINT)), [END])
    yield noise
    noise.compiler.close()


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Noise]:
    """SentencePiece with byte fallback; its last letter serves as the end."""
    directory: Path = tmp_path_factory.mktemp("sentencepiece")
    tokenizer = save(directory, sentencepiece())
    noise = Noise(tokenizer, [tokenizer.vocabulary_size + 1])
    yield noise
    noise.compiler.close()
