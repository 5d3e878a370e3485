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

_log = logging.getLogger(__name__)
# Up to this many C takes several threads. It was measured at 10 million alone, where it is faster than torch; the place
# where torch overtakes it was not sought.
_FEW_PARAMETERS = 100_000_000


def fast_forwards(
    model: PreTrainedModel, cache: KVCache, context_length: int, *, native: bool
) -> Iterator[Forward]:
    """Forward passes that are faster than the model's own code, the fastest first; none for most models.

    `native` allows the one in C, which is there for one thread, and for small models on several.
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
    if native and cache.device.type == "cpu" and (num_threads == 1 or _is_small(model)):
        try:
            yield NativeDecoder(fused, cache, context_length, num_threads)
        except (Unfit, NotSuited) as reason:
            _log.info("steps run in torch, not in C: %s", reason)
        except CannotCompile as error:
            _log.warning("steps run in torch, not in C: %s", error)
    yield fused


def _is_small(model: PreTrainedModel) -> bool:
    packed = sum(m.num_weights for m in model.modules() if isinstance(m, AwqLinear))
    return packed + sum(p.numel() for p in model.parameters()) < _FEW_PARAMETERS
