"""Whether an engine computed the model: its greedy tokens, looked at by a plain float32 forward pass.

Two correct engines in low precision part ways at the first near-tie, so texts cannot be compared. But every token that
either takes has to be a greatest one of the model, given the tokens before it, or nearly so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

# Most that the greatest logit may exceed a chosen token's, in standard deviations of the position's logits. A token
# taken at random is some 4 below. What was seen: 0 in float32, but 0.0012 of llama.cpp; 0.13 in bfloat16.
_TOLERANCE: Final = {"float32": 0.01, "bfloat16": 0.25, "awq": 0.25}
_ROWS_AT_ONCE: Final = 8


class WrongAnswer(Exception):
    """An engine's tokens are not the model's."""


@dataclass(frozen=True)
class Agreement:
    """How near tokens are to the model's own."""

    share: float  # of the tokens that are the greatest
    shortfall: float  # of the worst token, in standard deviations


class AnswerCheck:
    """The model in float32 as transformers computes it, and how far others may be from it."""

    def __init__(self, folder: Path, weights: str) -> None:
        """`folder` is the dense checkpoint, `weights` what the engines make of it."""
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        self._model.train(False)
        self._tolerance = _TOLERANCE[weights]

    def check(
        self, name: str, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> Agreement:
        """Raises: WrongAnswer, which names the engine."""
        found = self.agreement(prompts, completions)
        if found.shortfall > self._tolerance:
            raise WrongAnswer(
                f"{name} took a token whose logit is {found.shortfall:.3g} standard deviations below the greatest"
            )
        return found

    @torch.inference_mode()
    def agreement(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> Agreement:
        """Of prompts of one length, and completions of one length."""
        length = len(completions[0])
        rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, completions, strict=True)]
        shortfalls: list[torch.Tensor] = []
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            ids = torch.tensor(rows[first : first + _ROWS_AT_ONCE])
            # position i scores token i + 1
            logits = self._model(ids, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
            chosen = logits.gather(2, ids[:, -length:, None])[..., 0]
            shortfalls.append((logits.amax(2) - chosen) / logits.std(2))
        every = torch.cat(shortfalls)
        return Agreement(float((every == 0).float().mean()), float(every.max()))
