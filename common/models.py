"""The networks of :mod:`fedveil.common.model_spec`, built with torch, and their flat vectors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.common.model_spec import ModelSpec


def build(spec: ModelSpec) -> nn.Module:
    """The network of ``spec`` with its public initialisation (same values at every site).

    Raises:
        ModelError: the spec is inconsistent.
    """
    if problem := spec.problem():
        raise ModelError(f"model {spec.name!r}: {problem}")
    if spec.name == "cnn":
        a, b = spec.hidden
        model: nn.Module = nn.Sequential(
            nn.Unflatten(1, (1, spec.side, spec.side)),
            nn.Conv2d(1, a, 5, padding=2),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(a, b, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(b * (spec.side // 4) ** 2, spec.classes),
        )
    else:
        layers: list[nn.Module] = []
        for i, o in zip(spec.widths, spec.widths[1:], strict=False):
            layers += [nn.Linear(i, o), nn.Tanh()]
        model = nn.Sequential(*layers[:-1])
    _initialise(model, spec.seed)
    return model


def _initialise(model: nn.Module, seed: int) -> None:
    """Weights N(0, 1/fan-in) from a public seed, biases and a logistic model zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = [p for p in model.parameters() if p.dim() > 1]
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and len(weights) > 1:
                p.normal_(0, (p[0].numel()) ** -0.5, generator=generator)
            else:
                p.zero_()


def flatten(model: nn.Module) -> NDArray[np.float32]:
    """``(D,)`` float32: all parameters in registration order."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).to("cpu", torch.float32).numpy()


def unflatten(model: nn.Module, values: NDArray[np.float32]) -> None:
    """Load ``(D,)`` values into ``model``, in registration order.

    Raises:
        ModelError: wrong length, or a value that is not finite.
    """
    total = sum(p.numel() for p in model.parameters())
    if values.shape != (total,):
        raise ModelError(f"{values.shape} values for a model of {total} parameters")
    if not np.isfinite(values).all():
        raise ModelError("the weights hold a NaN or an infinity", hint="a lower learning rate, or a smaller clip")
    at = 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(values[at : at + p.numel()].copy()).view_as(p))
            at += p.numel()


def predict(model: nn.Module, X: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(n, classes)`` probabilities."""
    parameter = next(model.parameters())
    with torch.no_grad():
        logits = model(torch.from_numpy(X).to(parameter.device, parameter.dtype))
        return torch.softmax(logits, 1).to("cpu", torch.float64).numpy()
