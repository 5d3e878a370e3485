"""Muon for the hidden matrices: momentum whose update is made orthogonal.

It needs about half the steps of AdamW on this model, which is what fits training into minutes.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_ITERATIONS: Final = 5


def orthogonalized(batch: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, by a quintic Newton-Schulz iteration."""
    a, b, c = _COEFFICIENTS
    tall = batch.size(-2) > batch.size(-1)
    x: Tensor = batch.mT if tall else batch
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum SGD (Nesterov) with orthogonalized updates, for two-dimensional weights only."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody passes a closure
        """One update of every weight; equal shapes go through the iteration together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                updates = [self._momentum(p, group["momentum"]) for p in parameters]
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(
                    parameters, orthogonalized(torch.stack(updates)), strict=True
                ):
                    parameter.mul_(1 - group["lr"] * group["decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        gradient = parameter.grad
        if gradient is None:
            raise RuntimeError("every trained weight needs a gradient")
        state = self.state[parameter]
        buffer: Tensor = state.setdefault("buffer", torch.zeros_like(parameter))
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)
