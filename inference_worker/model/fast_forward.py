"""Which forward passes a model has beside its own code."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from inference_worker.model.awq import AwqLinear
from inference_worker.model.decoder import fuse
from inference_worker.model.forward import Forward
from inference_worker.model.kv_cache import KVCache
from inference_worker.model.native.compiler import CannotCompile
from inference_worker.model.native.decoder import NativeDecoder
from inference_worker.model.native.library import NotSuited
from inference_worker.model.native.matrix import Unfit
from inference_worker.model.native.prebuilt import has_tiles

_log = logging.getLogger(__name__)
# C takes any number of threads for models with fewer parameters than the first number. With few threads it takes models
# up to the second: with two, at 220 million, it needed 0.2 to 0.95 of torch's time for 1 to 32 rows and prompts of 512
# tokens, in float32, bfloat16 and 4 bits, and 0.2 to 0.6 for one row. With many threads, or beside a torch that
# multiplies tiles of bfloat16, it was not measured at such sizes.
_FEW_PARAMETERS, _MANY_PARAMETERS = 100_000_000, 2_000_000_000
_FEW_THREADS = 8


def fast_forwards(
    model: PreTrainedModel, cache: KVCache, context_length: int, *, native: bool
) -> Iterator[Forward]:
    """Forward passes that are faster than the model's own code, the fastest first; none for most models.

    `native` allows the one in C, which is there for one thread, and on several for models that are not too large.
    """
    if (fused := fuse(model)) is None:
        return
    if cache.uses_kernels:
        # triton need not be installed where there is no GPU
        from inference_worker.model.kernel_decoder import KernelDecoder

        try:
            decoder = KernelDecoder(fused, context_length)
        except ValueError as reason:
            _log.warning("the layers are not computed by kernels: %s", reason)
        else:
            yield decoder
        return
    num_threads = torch.get_num_threads()
    if native and cache.device.type == "cpu" and _is_faster_in_c(model, num_threads):
        try:
            yield NativeDecoder(fused, cache, context_length, num_threads)
        except (Unfit, NotSuited) as reason:
            _log.info("steps run in torch, not in C: %s", reason)
        except CannotCompile as error:
            _log.warning("steps run in torch, not in C: %s", error)
    yield fused


def _is_faster_in_c(model: PreTrainedModel, num_threads: int) -> bool:
    packed = sum(m.num_weights for m in model.modules() if isinstance(m, AwqLinear))
    size = packed + sum(p.numel() for p in model.parameters())
    if num_threads == 1 or size < _FEW_PARAMETERS:
        return True
    torch_has_tiles = model.dtype == torch.bfloat16 and not packed and has_tiles()
    return num_threads <= _FEW_THREADS and size < _MANY_PARAMETERS and not torch_has_tiles
