"""Models whose steps run in C, and the logits that they compute."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from inference_worker.model.awq import AwqLinear
from inference_worker.model.batch import Span
from inference_worker.model.native.decoder import NativeDecoder
from inference_worker.model.runner import ModelRunner
from tests.worker.model.awq_checkpoints import round_to_nearest
from tests.worker.model.driver import Driver, new_runner, new_sequence

# with whole blocks of 64 outputs, as 4-bit weights are fused in
QUANTIZABLE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def native_runner(model: PreTrainedModel, block_size: int = 4) -> ModelRunner:
    runner = new_runner(model, block_size, native=True)
    assert isinstance(runner._forward, NativeDecoder)
    return runner


def logits_of(
    runner: ModelRunner, prompts: list[list[int]], chunk: int = 1000
) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each prompt, all computed together, in chunks."""
    driver = Driver(runner)
    sequences = [new_sequence(ids) for ids in prompts]
    for sequence in sequences:
        driver.reserve(sequence, len(sequence.token_ids))
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), chunk):
        spans = [
            (i, Span(s.token_ids, start, min(start + chunk, len(s.token_ids)), s.block_table))
            for i, s in enumerate(sequences)
            if start < len(s.token_ids)
        ]
        spans.sort(key=lambda pair: not pair[1].is_decode)
        sizes = [span.stop - span.start for _, span in spans]
        logits = runner.logits([span for _, span in spans], range(sum(sizes)))
        for (i, _), rows in zip(spans, torch.split(logits, sizes), strict=True):
            parts[i].append(rows)
    return [torch.cat(rows) for rows in parts]


def quantize(model: PreTrainedModel, group_size: int) -> None:
    """Give a model's layers 4-bit weights, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            weights = round_to_nearest(module.weight, group_size, zero_point=True)
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(name, AwqLinear.pack(weights, bias, model.dtype))
