"""The forward pass of a decoder over one packed batch."""

from __future__ import annotations

import inspect
from typing import Protocol

import torch
from transformers import PreTrainedModel

from inference_worker.model.attention import PAGED
from inference_worker.model.batch import Batch


class Forward(Protocol):
    """A decoder: packed tokens in, logits of the wanted ones out, keys and values written to the batch's cache."""

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        """Logits [wanted, vocabulary] of the packed tokens at indices `wanted`, in the model's dtype."""
        ...


class TransformersForward:
    """The model's own code, with its attention replaced by the paged one."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.set_attn_implementation(PAGED)
        self._model = model
        self._can_select = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        """See Forward."""
        selection = {"logits_to_keep": wanted} if self._can_select else {}
        output = self._model(
            input_ids=batch.input_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            batch=batch,
            **selection,
        )
        logits: torch.Tensor = output.logits[0]
        return logits if self._can_select else logits[wanted]
