"""The one model of a worker, as the parts that know nothing of torch see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.engine_thread import EngineThread
from inference_worker.engine.observer import Observer
from inference_worker.engine.request import SamplingParams
from inference_worker.engine.runner import Runner
from inference_worker.engine.serving import ServingEngine
from inference_worker.settings import WorkerSettings
from inference_worker.tokenizer import Tokenizer
from protos.sluice.v1 import generation_pb2 as pb


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
    kv_cache_bytes: int = 0  # of the whole cache; 0: not known
    kv_bytes_per_token: int = 0  # 0: not known
    step_bytes: int = 0  # kept free for the largest step; 0: not measured


class Served(Protocol):
    """A model ready to serve, whatever runs it."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion together, the memory for them considered."""
        ...

    @property
    def takes_continuations(self) -> bool:
        """Whether its engine goes on with what another one began."""
        ...

    def check_honoured(self, message: pb.GenerateRequest) -> None:
        """Check a valid request against what this engine can do. Raises: UnsupportedField."""
        ...

    def new_engine(
        self,
        settings: WorkerSettings,
        on_crash: Callable[[BaseException], None],
        observer: Observer,
    ) -> ServingEngine:
        """The engine that runs it; there is one."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that the worker's own engine runs."""

    info: ModelInfo
    tokenizer: Tokenizer
    runner: Runner

    @property
    def context_length(self) -> int:
        return min(self.info.context_length, self.runner.num_blocks * self.runner.block_size)

    @property
    def takes_continuations(self) -> bool:
        return True

    def check_honoured(self, message: pb.GenerateRequest) -> None:
        """Whatever is valid is honoured."""

    def new_engine(
        self,
        settings: WorkerSettings,
        on_crash: Callable[[BaseException], None],
        observer: Observer,
    ) -> EngineThread:
        options = EngineOptions(
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            context_length=self.context_length,
            prefix_cache=settings.prefix_cache,
            prefix_cache_across_keys=settings.prefix_cache_across_keys,
        )
        engine = Engine(self.runner, self.tokenizer.new_detokenizer, options)
        return EngineThread(engine, on_crash, observer)
