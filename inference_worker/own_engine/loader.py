"""Finds, makes and initializes an engine that a user brought."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Final

from inference_worker.engine.observer import Observer
from inference_worker.own_engine.features import refuse_unhonoured
from inference_worker.own_engine.loop_thread import LoopThread
from inference_worker.own_engine.protocol import (
    FEATURES,
    EngineCard,
    OwnEngine,
    SamplingParams,
)
from inference_worker.own_engine.thread import OpenEngine, OwnEngineThread
from inference_worker.served_model import ModelInfo
from inference_worker.settings import WorkerSettings
from inference_worker.tokenizer import Tokenizer
from protos.sluice.v1 import generation_pb2 as pb

_METHODS: Final = ("initialize", "generate", "abort", "close")


class EngineUnusable(Exception):
    """The engine cannot be served. The message is one line."""

    def __init__(self, problem: str) -> None:
        super().__init__(" ".join(problem.split()))


@dataclass(frozen=True, slots=True)
class OwnServed:
    """A model that an engine of the user's own runs."""

    info: ModelInfo
    tokenizer: Tokenizer
    opened: OpenEngine

    @property
    def context_length(self) -> int:
        return self.info.context_length

    @property
    def takes_continuations(self) -> bool:
        return False

    def check_honoured(self, message: pb.GenerateRequest) -> None:
        refuse_unhonoured(message, self.opened.card)

    def new_engine(
        self,
        settings: WorkerSettings,
        on_crash: Callable[[BaseException], None],
        observer: Observer,
    ) -> OwnEngineThread:
        return OwnEngineThread(
            self.opened,
            self.tokenizer,
            self.info.vocabulary_size,
            settings.max_running,
            on_crash,
            observer,
        )


def load_own_engine(settings: WorkerSettings, name: str) -> OwnServed:
    """Make the engine that `name` ("module:factory") stands for, and initialize it on a thread of its own.

    Raises: EngineUnusable; OSError or UnsupportedTokenizer, if --model has no tokenizer.
    """
    engine = _make(name)
    tokenizer = Tokenizer.load(settings.model)
    thread = LoopThread()
    try:
        card = thread.run(lambda: engine.initialize(settings)).result()
    except BaseException as error:  # SystemExit, too: the code is not ours
        raise EngineUnusable(f"initialize failed: {_describe(error)}") from error
    _check_card(card, tokenizer)
    info = ModelInfo(
        name=settings.served_name,
        context_length=min(card.context_length, settings.context_length or card.context_length),
        vocabulary_size=card.vocabulary_size or tokenizer.vocabulary_size,
        architecture=card.architecture or type(engine).__name__,
        dtype=card.dtype,
        device=card.device,
        parameter_count=card.parameter_count,
        eos_token_ids=card.eos_token_ids,
        default_sampling=card.default_sampling,
        kv_cache="the engine's own",
    )
    return OwnServed(info, tokenizer, OpenEngine(engine, card, thread))


def _make(name: str) -> OwnEngine:
    module_name, _, factory_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:
        raise EngineUnusable(f"cannot import {module_name}: {_describe(error)}") from error
    factory = getattr(module, factory_name, None)
    if factory is None:
        raise EngineUnusable(f"{module_name} has no {factory_name}")
    if not callable(factory):
        raise EngineUnusable(f"{factory_name} is not callable: {_shorten(factory)}")
    try:
        engine: OwnEngine = factory()
    except BaseException as error:
        raise EngineUnusable(f"{factory_name}() failed: {_describe(error)}") from error
    _check_methods(engine, factory_name)
    return engine


def _check_methods(engine: object, factory_name: str) -> None:
    missing = [name for name in _METHODS if not callable(getattr(engine, name, None))]
    if missing:
        raise EngineUnusable(
            f"{factory_name}() gave {_shorten(engine)}, which has no {', '.join(missing)}"
        )
    for name in _METHODS:
        is_coroutine = inspect.iscoroutinefunction(getattr(engine, name))
        if name == "generate" and (is_coroutine or inspect.isgeneratorfunction(engine.generate)):  # type: ignore[attr-defined]
            raise EngineUnusable("generate must be an async generator: `async def` with `yield`")
        if name != "generate" and not is_coroutine:
            raise EngineUnusable(f"{name} must be `async def`")


def _check_card(card: EngineCard, tokenizer: Tokenizer) -> None:
    if not isinstance(card, EngineCard):
        raise EngineUnusable(f"initialize must give an EngineCard, got {_shorten(card)}")
    _check_types(card)
    if unknown := sorted(card.honours - FEATURES):
        known = ", ".join(sorted(FEATURES))
        raise EngineUnusable(f"the card's honours: unknown {unknown[0]!r}; there are {known}")
    if card.context_length < 2:
        raise EngineUnusable(f"the card's context_length must be 2 or more: {card.context_length}")
    size = card.vocabulary_size or tokenizer.vocabulary_size
    if any(not 0 <= token_id < size for token_id in card.eos_token_ids):
        raise EngineUnusable(f"the card's eos_token_ids must be below {size}")
    if "ignore_eos" in card.honours and not card.eos_token_ids:
        raise EngineUnusable("the card's honours: ignore_eos needs eos_token_ids")


def _check_types(card: EngineCard) -> None:
    """What a card is made of comes from checkpoints, where anything may be missing."""
    size = card.vocabulary_size
    for name, numbers in (
        ("context_length", [card.context_length]),
        ("parameter_count", [card.parameter_count]),
        ("vocabulary_size", [] if size is None else [size]),
        ("eos_token_ids", _elements(card, "eos_token_ids")),
    ):
        for number in numbers:
            if type(number) is not int:
                raise EngineUnusable(f"the card's {name}: {_shorten(number)} is no whole number")
    for name, texts in (
        ("architecture", [card.architecture]),
        ("dtype", [card.dtype]),
        ("device", [card.device]),
        ("honours", _elements(card, "honours")),
    ):
        for text in texts:
            if not isinstance(text, str):
                raise EngineUnusable(f"the card's {name}: {_shorten(text)} is no text")
    sampling: object = card.default_sampling
    if not isinstance(sampling, SamplingParams):
        raise EngineUnusable(
            f"the card's default_sampling: {_shorten(sampling)} is no SamplingParams"
        )


def _elements(card: EngineCard, name: str) -> Iterable[object]:
    elements: object = getattr(card, name)
    if not isinstance(elements, Set):
        raise EngineUnusable(f"the card's {name}: {_shorten(elements)} is no set")
    return elements


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
