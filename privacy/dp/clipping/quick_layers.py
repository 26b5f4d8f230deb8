"""Tanh and pooling of a network's copy on a CPU, where torch's own take several times as long.

The functions are the same up to rounding. Like every engine, one that uses them is compared with the definition before
it is chosen, and tested for the independence of rows (:mod:`fedveil.privacy.dp.clipping.stand_alone`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def quicken(model: nn.Module) -> None:
    """Replace such layers within ``model``, which has to be its caller's own copy and on a CPU."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Tanh:
                setattr(parent, name, _Tanh())
            elif type(child) is nn.AvgPool2d and _halves(child):
                setattr(parent, name, _Halved())


def _halves(pool: nn.AvgPool2d) -> bool:
    sizes = {pool.kernel_size, pool.stride} - {2, (2, 2)}
    return not sizes and pool.padding in (0, (0, 0)) and pool.divisor_override is None and not pool.ceil_mode


class _Tanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _TanhOf.apply(x)


class _TanhOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        np.tanh(x.numpy(), out=out.numpy())
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (out,) = ctx.saved_tensors
        return grads[0] * (1 - out.square())


class _Halved(nn.Module):
    """The mean of each two by two places; of an image with an odd side, as torch computes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % 2 or x.shape[-2] % 2:
            return functional.avg_pool2d(x, 2)
        return _HalvedOf.apply(x)


class _HalvedOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        *outer, height, width = x.shape
        rows = x.reshape(-1, 2, width)
        pairs = (rows[:, 0] + rows[:, 1]).view(-1, 2)
        return ((pairs[:, 0] + pairs[:, 1]) * 0.25).view(*outer, height // 2, width // 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        *outer, height, width = grads[0].shape
        quarter = (grads[0] * 0.25).reshape(-1, width, 1)
        row = quarter.expand(-1, width, 2).reshape(-1, 1, 2 * width)
        return row.expand(-1, 2, 2 * width).reshape(*outer, 2 * height, 2 * width)
