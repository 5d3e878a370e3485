"""The one model of a worker, as the parts that know nothing of torch see it."""

from __future__ import annotations

from dataclasses import dataclass

from inference_worker.engine.request import SamplingParams
from inference_worker.engine.runner import Runner
from inference_worker.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is told about the model."""

    name: str
    context_length: int  # most tokens of prompt and completion together
    vocabulary_size: int
    architecture: str
    dtype: str
    device: str
    parameter_count: int
    eos_token_ids: frozenset[int]
    default_sampling: SamplingParams  # of the checkpoint; its seed means nothing
    kv_cache: str  # one line: how many blocks, and what memory they take


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model ready to serve."""

    info: ModelInfo
    tokenizer: Tokenizer
    runner: Runner
