"""The closed form of dense chains for small networks on a CPU, where torch's cost per call is most of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.privacy.dp.clipping.direct import LEAST_EXPONENT, Chain
from fedveil.privacy.dp.clipping.gradient_factors import LARGEST_FACTOR, TINY, Batch

_Array = NDArray[Any]  # in the network's precision
_Doubles = NDArray[np.float64]
# activation -> the function, and its derivative from the function's own value
_FUNCTIONS: dict[type[nn.Module], tuple[Callable[[_Array], _Array], Callable[[_Array], _Array]]] = {
    nn.Tanh: (np.tanh, lambda a: 1 - a * a),
    nn.ReLU: (lambda z: np.maximum(z, 0), lambda a: (a > 0).astype(a.dtype)),
}


class SmallChain:
    """The same sum as :class:`fedveil.privacy.dp.clipping.direct.Chain`, in NumPy; one row for each place.

    Raises:
        ModelError: the network is no chain of Linear layers with Tanh or ReLU in between, on a CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        chain = Chain(model)
        if any(p.device.type != "cpu" for p in model.parameters()):
            raise ModelError("the engine 'numpy' works on a CPU", hint="the engine 'closed'")
        if any(type(a) not in _FUNCTIONS for a in chain.activations):
            raise ModelError("the engine 'numpy' knows Tanh and ReLU", hint="the engine 'closed'")
        self._linears = chain.linears
        self._functions = [_FUNCTIONS[type(a)] for a in chain.activations]

    def operands(self, batch: Batch) -> list[torch.Tensor]:
        """See :class:`fedveil.privacy.dp.clipping.engines.Backend`."""
        inputs, deltas = self._passes(batch)
        return [torch.from_numpy(t) for t in (*inputs, *deltas)]

    def add(self, batch: Batch, clip: float, out: torch.Tensor) -> torch.Tensor:
        """See :class:`fedveil.privacy.dp.clipping.engines.Backend`."""
        inputs, deltas = self._passes(batch)
        with np.errstate(all="ignore"):  # what overflows has no finite norm and is left out
            pairs = [(_squares(d), _squares(a)) for d, a in zip(deltas, inputs, strict=True)]
            total = np.zeros(len(deltas[0]))
            for (d, a), layer in zip(pairs, self._linears, strict=True):
                total += d * (a if layer.bias is None else a + 1)
            # Beyond that the square of the other factor may have underflowed to nothing.
            small = np.max(pairs, axis=(0, 1)) <= LARGEST_FACTOR**2
            norms = np.where(small, np.sqrt(total), np.inf)
            keep = batch.keep.numpy() & np.isfinite(norms)
            factor = np.where(keep, np.minimum(clip / (norms + TINY), 1.0), 0.0)
        self._sum(inputs, deltas, keep[:, None], factor, out.numpy())
        return torch.from_numpy(keep)

    def _passes(self, batch: Batch) -> tuple[list[_Doubles], list[_Doubles]]:
        """Each layer's input and the loss' gradient at its output, ``(B, width)`` both, widened to float64."""
        if batch.weights is not None:
            raise ModelError("the engine 'numpy' takes one row for each place", hint="the engine 'closed'")
        weights = [m.weight.detach().numpy() for m in self._linears]
        inputs: list[_Array] = [batch.X.numpy()]
        with np.errstate(all="ignore"):
            for at, layer in enumerate(self._linears):
                z = inputs[at] @ weights[at].T
                if layer.bias is not None:
                    z += layer.bias.detach().numpy()
                inputs.append(self._functions[at][0](z) if at < len(self._functions) else z)
            z = inputs.pop()
            delta = np.exp(np.maximum(z - z.max(1, keepdims=True), LEAST_EXPONENT))
            delta /= delta.sum(1, keepdims=True)
            delta[np.arange(len(delta)), batch.y.numpy()] -= 1
            deltas: list[_Array] = [delta]
            for at in range(len(weights) - 1, 0, -1):
                deltas.append((deltas[-1] @ weights[at]) * self._functions[at - 1][1](inputs[at]))
        return [_wide(a) for a in inputs], [_wide(d) for d in reversed(deltas)]

    def _sum(
        self, inputs: list[_Doubles], deltas: list[_Doubles], keep: NDArray[np.bool_], factor: _Doubles, out: _Doubles
    ) -> None:
        at = 0
        for a, delta, layer in zip(inputs, deltas, self._linears, strict=True):
            scaled = np.where(keep, delta, 0.0) * factor[:, None]
            weight = scaled.T @ np.where(keep, a, 0.0)
            out[at : at + weight.size] += weight.reshape(-1)
            at += weight.size
            if layer.bias is not None:
                out[at : at + scaled.shape[1]] += scaled.sum(0)
                at += scaled.shape[1]


def _wide(a: _Array) -> _Doubles:
    return a.astype(np.float64, copy=False)


def _squares(a: _Doubles) -> _Doubles:
    """``(B,)``: the squared norm of each row."""
    return np.einsum("ij,ij->i", a, a)
