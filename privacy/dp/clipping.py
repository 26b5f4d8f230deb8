"""The sum of per-record gradients, each clipped to L2 norm C over the whole model.

Two engines give the same sum. ``opacus`` uses Opacus' GradSampleModule hooks on any network whose records do
not meet; ``closed`` computes norms of dense networks in closed form (a layer's per-record gradient is an outer
product, whose norm factorises: Goodfellow 2015, arXiv:1510.01799) and never builds a per-record gradient.
:func:`choose` compares them on a few synthetic records and takes the faster one that agrees.

Arithmetic is float64, so that one record's rounding cannot depend on its neighbours by more than the
:data:`FLOAT_SLACK` that the plan adds to the sensitivity.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

from fedveil.common.errors import ModelError

Engine = Literal["opacus", "closed"]
FLOAT_SLACK = 1e-6
_TINY = 1e-30
_COUPLED = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the common base of every BatchNorm, lazy ones included


@dataclass(frozen=True)
class ClippedSum:
    """What one step makes of a site's sampled records. Only ``values`` goes on, and only with noise.

    Attributes:
        values: ``(D,)`` float64, the sum of clipped gradients; its norm is at most ``records * clip``.
        records: how many records entered (stays at the site).
        excluded: how many gave a NaN or an infinity and were left out (stays at the site).
    """

    values: NDArray[np.float64]
    records: int
    excluded: int


def refuse_coupled(model: nn.Module) -> None:
    """Raise :class:`ModelError` for layers through which records influence each other, naming a replacement."""
    for name, module in model.named_modules():
        if isinstance(module, _COUPLED):
            raise ModelError(
                f"layer {name!r} is {type(module).__name__}: it mixes the records of a batch, "
                "so that clipping one record's gradient does not bound its influence",
                hint="use nn.GroupNorm or nn.LayerNorm instead",
            )
    if errors := ModuleValidator.validate(model, strict=False):
        raise ModelError(f"Opacus cannot bound a record's influence: {type(errors[0]).__name__}: {errors[0]}")


class Clipper:
    """Computes clipped sums for one network; reused over steps.

    Args:
        model: the network; it is moved to float64 on ``device`` and its weights are the caller's to set.
        engine: which implementation.
        device: a torch device; CUDA is used by the callers when present.
    """

    def __init__(self, model: nn.Module, engine: Engine, device: str = "cpu") -> None:
        refuse_coupled(model)
        self.engine, self.device = engine, torch.device(device)
        self.model = model.to(self.device, torch.float64)
        self._dense = _dense_layers(self.model)
        if engine == "closed" and self._dense is None:
            raise ModelError("the closed form needs a chain of Linear and Tanh layers", hint="use the engine 'opacus'")
        self._hooked = GradSampleModule(self.model, loss_reduction="sum") if engine == "opacus" else None
        self._size = sum(p.numel() for p in self.model.parameters())

    def clipped_sum(self, X: NDArray[np.float32], y: NDArray[np.int64], clip: float) -> ClippedSum:
        """Sum over records of ``g · min(1, clip / ‖g‖)``.

        Args:
            X: ``(B, features)``; B may be 0.
            y: ``(B,)`` class indices.
            clip: C > 0.

        Guarantee: adding or removing one record changes ``values`` by at most ``clip`` in L2 norm (up to
        :data:`FLOAT_SLACK` relative), whatever the record holds. Records whose gradient is not finite are left
        out and the sum is taken again without them, since 0 · NaN is NaN; so are records whose class does not exist.
        """
        usable = np.isfinite(X).all(axis=1) & (y >= 0)
        if usable.any():
            usable &= y < self._classes(X[usable][:1])
        excluded = int((~usable).sum())
        if excluded:
            X, y = X[usable], y[usable]
        while len(X):
            values, bad = self._sum(torch.from_numpy(X), torch.from_numpy(y), clip)
            if not bad.any():
                break
            excluded += int(bad.sum())
            X, y = X[~bad], y[~bad]
        else:
            return ClippedSum(np.zeros(self._size), 0, excluded)
        if not np.linalg.norm(values) <= len(X) * clip * (1 + FLOAT_SLACK):
            raise ModelError("the clipped sum is longer than its bound", hint="a fault of the program: report it")
        return ClippedSum(values, len(X), excluded)

    @torch.no_grad()
    def _classes(self, X: NDArray[np.float32]) -> int:
        return self.model(torch.from_numpy(X).to(self.device, torch.float64)).shape[1]

    def _sum(self, X: torch.Tensor, y: torch.Tensor, clip: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        X, y = X.to(self.device, torch.float64), y.to(self.device)
        sums, norms = self._hooks(X, y, clip) if self._hooked is not None else self._closed(X, y, clip)
        bad = ~torch.isfinite(norms).cpu().numpy()
        return torch.cat([s.reshape(-1) for s in sums]).cpu().numpy(), bad

    def _hooks(self, X: torch.Tensor, y: torch.Tensor, clip: float) -> tuple[list[torch.Tensor], torch.Tensor]:
        hooked = self._hooked
        if hooked is None:
            raise ModelError("the engine 'opacus' was not set up")
        hooked.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # torch remarks that records need no gradient of their own; Opacus' hooks do not use it.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            nn.functional.cross_entropy(hooked(X), y, reduction="sum").backward()
        grads: list[torch.Tensor] = [getattr(p, "grad_sample") for p in hooked.parameters()]  # noqa: B009
        squares = torch.stack([g.reshape(len(X), -1).square().sum(1) for g in grads])
        norms = squares.sum(0).sqrt()
        factor = (clip / (norms + _TINY)).clamp(max=1.0)
        sums = [torch.einsum("b,b...->...", factor, g) for g in grads]
        hooked.zero_grad(set_to_none=True)  # Opacus' override also frees the per-record gradients
        return sums, norms

    @torch.no_grad()
    def _closed(self, X: torch.Tensor, y: torch.Tensor, clip: float) -> tuple[list[torch.Tensor], torch.Tensor]:
        layers = self._dense or []
        inputs = [X]
        for layer in layers[:-1]:
            inputs.append(torch.tanh(layer(inputs[-1])))
        delta = torch.softmax(layers[-1](inputs[-1]), 1)
        delta[torch.arange(len(y), device=self.device), y] -= 1
        deltas: list[torch.Tensor] = [delta]
        for layer, a in zip(reversed(layers), reversed(inputs[1:]), strict=False):
            deltas.insert(0, (deltas[0] @ layer.weight) * (1 - a.square()))
        squares = [d.square().sum(1) * (a.square().sum(1) + 1) for d, a in zip(deltas, inputs, strict=True)]
        norms = torch.stack(squares).sum(0).sqrt()
        factor = (clip / (norms + _TINY)).clamp(max=1.0)[:, None]
        sums = []
        for d, a in zip(deltas, inputs, strict=True):
            clipped = d * factor
            sums += [clipped.T @ a, clipped.sum(0)]
        return sums, norms


def _dense_layers(model: nn.Module) -> list[nn.Linear] | None:
    """The Linear layers of a ``Sequential(Linear, Tanh, Linear, ...)``, or None for any other network."""
    if not isinstance(model, nn.Sequential):
        return None
    modules = list(model)
    if len({id(m) for m in modules}) != len(modules) or any(m.bias is None for m in modules if type(m) is nn.Linear):
        return None
    expected = [nn.Linear if i % 2 == 0 else nn.Tanh for i in range(len(modules))]
    if len(modules) % 2 == 0 or any(type(m) is not e for m, e in zip(modules, expected, strict=True)):
        return None
    return [m for m in modules if isinstance(m, nn.Linear)]


def choose(make: Callable[[], nn.Module], inputs: int, classes: int, device: str = "cpu") -> Clipper:
    """Both engines on four synthetic records: those that agree to 1e-9 stay, the fastest of three runs wins.

    Args:
        make: builds a fresh network with the same weights each time it is called.
    """
    X = np.linspace(-1, 1, 4 * inputs, dtype=np.float32).reshape(4, inputs)
    y = np.arange(4, dtype=np.int64) % classes
    reference = Clipper(make(), "opacus", device)
    expected = reference.clipped_sum(X, y, 0.5).values
    if _dense_layers(make()) is None:
        return reference
    closed = Clipper(make(), "closed", device)
    if not np.allclose(closed.clipped_sum(X, y, 0.5).values, expected, rtol=1e-9, atol=1e-9):
        return reference
    return min((reference, closed), key=lambda c: _seconds(c, X, y))


def _seconds(clipper: Clipper, X: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        clipper.clipped_sum(X, y, 0.5)
        best = min(best, time.perf_counter() - start)
    return best
