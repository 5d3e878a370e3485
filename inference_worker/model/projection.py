"""Linear layers that read the same input, as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import nn

from inference_worker.model.awq import AwqLinear

Projection: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def fuse_projections(parts: Sequence[nn.Module]) -> Projection | None:
    """One projection that gives the outputs of several side by side; None for kinds that it does not know.

    The parts go on working: their weights become views of the fused one, so that nothing is kept twice.
    """
    packed = [part for part in parts if isinstance(part, AwqLinear)]
    if len(packed) == len(parts):
        return AwqLinear.fuse(packed)
    linears = [part for part in parts if type(part) is nn.Linear]
    if len(linears) != len(parts) or len({linear.bias is None for linear in linears}) != 1:
        return None
    first, sizes = linears[0], [linear.out_features for linear in linears]
    fused = nn.Linear(first.in_features, sum(sizes), bias=False, device="meta")
    fused.requires_grad_(False)
    for name in ("weight",) if first.bias is None else ("weight", "bias"):
        joined = torch.cat([getattr(linear, name).detach() for linear in linears])
        setattr(fused, name, nn.Parameter(joined, requires_grad=False))
        for linear, view in zip(linears, torch.split(joined, sizes), strict=True):
            setattr(linear, name, nn.Parameter(view, requires_grad=False))
    return fused
