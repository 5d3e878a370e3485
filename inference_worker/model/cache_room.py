"""How much of the memory the KV cache gets, and what is kept free for steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Protocol

from transformers import PreTrainedModel

from inference_worker.engine.runner import OutOfMemory
from inference_worker.model import largest_step
from inference_worker.model.fast_forward import fast_forwards
from inference_worker.model.forward import Forward, TransformersForward
from inference_worker.model.kv_cache import KVCache, LayerShape, bytes_per_token, count_blocks
from inference_worker.model.largest_step import Meter, Sizes
from inference_worker.model.memory import free_bytes
from inference_worker.model.runner import ModelRunner

_log = logging.getLogger(__name__)
_MIB = 2**20
# The host keeps some hundred bytes for each block: what a small model and a large GPU would have room for is too many.
_MOST_BLOCKS = 2**18


class CacheSettings(Protocol):
    """What decides about the cache's size; a part of the worker's settings."""

    @property
    def native(self) -> bool: ...  # whether steps may run in C
    @property
    def max_running(self) -> int: ...  # sequences
    @property
    def max_batch_tokens(self) -> int: ...  # tokens of a step
    @property
    def block_size(self) -> int: ...  # tokens
    @property
    def deterministic(self) -> bool: ...  # no token's logits may depend on others by a bit
    @property
    def kv_cache_mib(self) -> int | None: ...  # None: by fraction
    @property
    def kv_cache_fraction(
        self,
    ) -> float: ...  # of the memory that is free then, but for what a step takes


class CacheRoom:
    """The memory of a device whose model is loaded, and the caches that may be made in it."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[int, LayerShape],
        context_length: int,
        settings: CacheSettings,
        *,
        uses_kernels: bool,
        meter: Meter | None,
    ) -> None:
        """Without a `meter` nothing is kept free for steps beyond what the settings leave.

        `uses_kernels`: see KVCache.
        """
        self._model = model
        self._layers = layers
        self._context_length = context_length
        self._settings = settings
        self._uses_kernels = uses_kernels
        self._token_bytes = bytes_per_token(layers, model.dtype)
        self.step_bytes = 0  # kept free for the largest step
        if meter is not None and settings.kv_cache_mib is None:
            self.step_bytes = self._measure(meter)

    @property
    def num_bytes(self) -> int:
        """Most bytes that the cache may take."""
        settings = self._settings
        if settings.kv_cache_mib is not None:
            return settings.kv_cache_mib * _MIB
        free = free_bytes(self._model.device) - self.step_bytes
        return int(max(0, free) * settings.kv_cache_fraction)

    def make_cache(self) -> KVCache:
        """As many blocks as there may be. Raises: LoadError, if that is too few; RuntimeError, MemoryError."""
        settings = self._settings
        # A CPU's memory is everyone's: there, take no more than all slots at full length could use. On a GPU what is
        # left is worth keeping prefixes in.
        is_shared = self._model.device.type == "cpu" and settings.kv_cache_mib is None
        num_blocks = count_blocks(
            num_bytes=self.num_bytes,
            block_size=settings.block_size,
            token_bytes=self._token_bytes,
            most_tokens=settings.max_running * self._context_length
            if is_shared
            else _MOST_BLOCKS * settings.block_size,
        )
        return self._new_cache(num_blocks)

    def _measure(self, meter: Meter) -> int:
        settings = self._settings
        room = max(2, self.num_bytes // self._token_bytes)  # a longer sequence would not fit anyway
        sizes = Sizes(
            settings.max_batch_tokens, settings.max_running, min(self._context_length, room)
        )
        cache = self._new_cache(1)
        for forward in self._forwards(cache):
            runner = ModelRunner(forward, cache, is_steady=settings.deterministic)
            try:
                return largest_step.measure(runner, sizes, meter)
            except OutOfMemory:
                _log.warning(
                    "%s does not fit on %s and will be made in smaller ones; lower --max-batch-tokens or "
                    "--max-running",
                    sizes,
                    self._model.device,
                )
                return 0
            except Exception as error:  # what serves is decided by the check, which comes later
                _log.debug("%s was not measured: %s", type(forward).__name__, error)
        return 0

    def _forwards(self, cache: KVCache) -> Iterator[Forward]:
        """What may serve, in the order in which it is tried."""
        yield from fast_forwards(
            self._model, cache, self._context_length, native=self._settings.native
        )
        yield TransformersForward(self._model)

    def _new_cache(self, num_blocks: int) -> KVCache:
        return KVCache(
            self._layers,
            num_blocks=num_blocks,
            block_size=self._settings.block_size,
            dtype=self._model.dtype,
            device=self._model.device,
            uses_kernels=self._uses_kernels,
        )
