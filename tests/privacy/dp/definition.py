"""The oracle of every engine: the definition of a clipped sum, one record after the other, in float64."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional


def reference(
    model: nn.Module, records: tuple[NDArray[np.float32], NDArray[np.int64]], clip: float
) -> NDArray[np.float64]:
    """``(D,)``: one backward pass for each record by itself, in float64, without dropout."""
    model = model.double().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = np.zeros(sum(p.numel() for p in parameters))
    for x, label in zip(*records, strict=True):
        loss = functional.cross_entropy(model(torch.from_numpy(x[None]).double()), torch.tensor([int(label)]))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        g = torch.cat([w.reshape(-1) for w in whole]).numpy()
        total += g * min(1.0, clip / (float(np.linalg.norm(g)) + 1e-300))
    return total
