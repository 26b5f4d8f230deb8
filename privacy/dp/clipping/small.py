"""The closed form of dense chains for small networks on a CPU, where torch's cost per call is most of the time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.privacy.dp.clipping.direct import Chain
from fedveil.privacy.dp.clipping.gradient_factors import TINY, Limit

_Array = NDArray[np.float64]
# activation -> the function, and its derivative from the function's own value
_FUNCTIONS: dict[type[nn.Module], tuple[Callable[[_Array], _Array], Callable[[_Array], _Array]]] = {
    nn.Tanh: (np.tanh, lambda a: 1 - a * a),
    nn.ReLU: (lambda z: np.maximum(z, 0.0), lambda a: (a > 0).astype(np.float64)),
}


class SmallChain:
    """The same sum as :class:`fedveil.privacy.dp.clipping.direct.Chain`, in NumPy.

    Raises:
        ModelError: the network is no chain of Linear layers with Tanh or ReLU in between, in float64 on a CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        chain = Chain(model)
        parameters = list(model.parameters())
        if any(p.device.type != "cpu" or p.dtype != torch.float64 for p in parameters):
            raise ModelError("the engine 'numpy' works in float64 on a CPU", hint="the engine 'closed'")
        if any(type(a) not in _FUNCTIONS for a in chain.activations):
            raise ModelError("the engine 'numpy' knows Tanh and ReLU", hint="the engine 'closed'")
        self._linears = chain.linears
        self._functions = [_FUNCTIONS[type(a)] for a in chain.activations]

    def __call__(self, X: torch.Tensor, y: torch.Tensor, limit: Limit, out: torch.Tensor) -> torch.Tensor:
        """See :class:`fedveil.privacy.dp.clipping.engines.Backend`."""
        weights = [m.weight.detach().numpy() for m in self._linears]
        biases = [None if m.bias is None else m.bias.detach().numpy() for m in self._linears]
        with np.errstate(all="ignore"):  # what overflows has no finite norm and is left out by the caller
            inputs, deltas = self._passes(X.numpy(), y.numpy(), weights, biases)
            squares = [
                _squares(d) * (_squares(a) if b is None else _squares(a) + 1)
                for d, a, b in zip(deltas, inputs, biases, strict=True)
            ]
            norms = np.sqrt(sum(squares[1:], squares[0]))
        keep = limit.keep.numpy()
        if (np.isfinite(norms) | ~keep).all():
            self._add(inputs, deltas, biases, np.minimum(limit.clip / (norms + TINY), 1.0) * keep, out.numpy())
        return torch.from_numpy(norms)

    def _passes(
        self, X: _Array, y: NDArray[np.int64], weights: list[_Array], biases: list[_Array | None]
    ) -> tuple[list[_Array], list[_Array]]:
        """Each layer's input and the loss' gradient at its output, ``(B, width)`` both."""
        inputs = [X]
        for at, weight in enumerate(weights):
            z = inputs[at] @ weight.T
            if (bias := biases[at]) is not None:
                z += bias
            inputs.append(self._functions[at][0](z) if at < len(self._functions) else z)
        z = inputs.pop()
        delta = np.exp(z - z.max(1, keepdims=True))
        delta /= delta.sum(1, keepdims=True)
        delta[np.arange(len(y)), y] -= 1
        deltas = [delta]
        for at in range(len(weights) - 1, 0, -1):
            deltas.append((deltas[-1] @ weights[at]) * self._functions[at - 1][1](inputs[at]))
        return inputs, deltas[::-1]

    @staticmethod
    def _add(
        inputs: list[_Array], deltas: list[_Array], biases: list[_Array | None], factor: _Array, out: _Array
    ) -> None:
        at = 0
        for a, delta, bias in zip(inputs, deltas, biases, strict=True):
            scaled = delta * factor[:, None]
            weight = scaled.T @ a
            out[at : at + weight.size] += weight.reshape(-1)
            at += weight.size
            if bias is not None:
                out[at : at + bias.size] += scaled.sum(0)
                at += bias.size


def _squares(a: _Array) -> _Array:
    """``(B,)``: the squared norm of each row."""
    return np.einsum("ij,ij->i", a, a)
