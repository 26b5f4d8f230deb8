"""The closed form of dense chains for small networks on a CPU, where torch's cost per call is most of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
_Layer = tuple[_Array, _Array | None]  # weight and bias
# activation -> the function, and its derivative from the function's own value
_FUNCTIONS: dict[type[nn.Module], tuple[Callable[[_Array], _Array], Callable[[_Array], _Array]]] = {
    nn.Tanh: (np.tanh, lambda a: 1 - a * a),
    nn.ReLU: (lambda z: np.maximum(z, 0), lambda a: (a > 0).astype(a.dtype)),
}


class SmallChain:
    """The same sum as :class:`fedveil.privacy.dp.clipping.direct.Chain`, in NumPy; one row for each place.

    Raises:
        ModelError: the network is no chain of Linear layers (or adapters) with Tanh or ReLU in between, on a CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        chain = Chain(model)
        if any(p.device.type != "cpu" for p in model.parameters()):
            raise ModelError("the engine 'numpy' works on a CPU", hint="the engine 'closed'")
        if any(type(a) not in _FUNCTIONS for a in chain.activations):
            raise ModelError("the engine 'numpy' knows Tanh and ReLU", hint="the engine 'closed'")
        self._linears, self._bases = chain.linears, [stage.base for stage in chain.stages]
        self._biased = np.array([[float(m.bias is not None)] for m in self._linears])
        self._functions = [_FUNCTIONS[type(a)] for a in chain.activations]

    def release(self) -> None:
        """See :class:`fedveil.privacy.dp.clipping.engines.Backend`: nothing is kept."""

    def operands(self, batch: Batch) -> list[torch.Tensor]:
        """See :class:`fedveil.privacy.dp.clipping.engines.Backend`."""
        inputs, deltas = self._passes(batch, 1)
        return [torch.from_numpy(t) for t in (*inputs, *deltas)]

    def add(self, batch: Batch, clip: float, out: torch.Tensor, *, fresh: bool = False) -> torch.Tensor:
        """See :class:`fedveil.privacy.dp.clipping.engines.Backend`."""
        return self.add_each(batch, clip, out[None], fresh=fresh)

    def add_each(self, batch: Batch, clip: float, out: torch.Tensor, *, fresh: bool = False) -> torch.Tensor:
        """As :meth:`add` for microbatches of one size that stand one after the other in ``batch``.

        Each is added to its own row of ``out``, ``(S, D)`` float64. Every product is one of a single microbatch: its
        bits are those that :meth:`add` gives.
        """
        inputs, deltas = self._passes(batch, len(out))
        squares = np.empty((2, len(inputs), len(batch.keep)))
        with np.errstate(all="ignore"):  # what overflows has no finite norm and is left out
            for at, pair in enumerate(zip(deltas, inputs, strict=True)):
                for one, values in zip(squares[:, at], pair, strict=True):
                    np.vecdot(values, values, out=one)
            # Beyond that the square of the other factor may have underflowed to nothing.
            small = squares.max((0, 1)) <= LARGEST_FACTOR**2
            norms = np.where(small, np.sqrt((squares[0] * (squares[1] + self._biased)).sum(0)), np.inf)
            keep = batch.keep.numpy() & np.isfinite(norms)
            factor = np.where(keep, np.minimum(clip / (norms + TINY), 1.0), 0.0)
        self._sum(inputs, deltas, keep, factor, out.numpy(), fresh=fresh)
        return torch.from_numpy(keep)

    def descend(
        self, X: _Array, y: NDArray[np.int64], parts: Iterable[slice], rate: float, pull: float = 0.0
    ) -> _Doubles:
        """``(S, D)``: by how much descent on the mean loss moves the weights, for each of S tables of n records.

        Args:
            X: ``(S, n, inputs)``, in the network's precision. y: ``(S, n)`` classes that the network has.
            parts: which of the n records each step takes.
            pull: of the proximal term: each step also goes ``rate · pull`` times the way back to the start.
        """
        many = len(X)
        start = [_values(m) for m in self._linears]
        own = [
            (np.repeat(w[None], many, 0), None if b is None else np.repeat(b[None, None], many, 0)) for w, b in start
        ]
        with np.errstate(all="ignore"):
            for part in parts:
                inputs, deltas = self._gradients(X[:, part], y[:, part], own)
                for (w, b), (w0, b0), a, delta in zip(own, start, inputs, deltas, strict=True):
                    mean = delta * w.dtype.type(1 / delta.shape[1])
                    _descend(w, w0, mean.transpose(0, 2, 1) @ a, rate, pull)
                    if b is not None and b0 is not None:
                        _descend(b, b0, mean.sum(1, keepdims=True), rate, pull)
            moved: list[_Doubles] = []
            for (w, b), (w0, b0) in zip(own, start, strict=True):
                moved.append((_wide(w0) - _wide(w)).reshape(many, -1))
                if b is not None and b0 is not None:
                    moved.append((_wide(b0) - _wide(b)).reshape(many, -1))
        return np.concatenate(moved, 1)

    def _passes(self, batch: Batch, many: int) -> tuple[list[_Doubles], list[_Doubles]]:
        """Each layer's input and the loss' gradient at its output, ``(B, width)`` both, widened to float64."""
        if batch.weights is not None:
            raise ModelError("the engine 'numpy' takes one row for each place", hint="the engine 'closed'")
        layers = [_values(m) for m in self._linears]
        X, y = batch.X.numpy(), batch.y.numpy()
        with np.errstate(all="ignore"):
            inputs, deltas = self._gradients(X.reshape(many, -1, X.shape[1]), y.reshape(many, -1), layers)
        flat = lambda t: t.astype(np.float64).reshape(len(X), -1)  # noqa: E731
        return [flat(a) for a in inputs], [flat(d) for d in deltas]

    def _gradients(self, X: _Array, y: NDArray[np.int64], layers: list[_Layer]) -> tuple[list[_Array], list[_Array]]:
        """Inputs and output gradients of every layer, ``(S, B, width)``; weights of all S tables, or of each."""
        bases = [None if m is None else _values(m) for m in self._bases]
        inputs, entries, x, rest = list[_Array](), list[_Array](), X, iter(layers)
        for at, base in enumerate(bases):
            entries.append(x)
            inputs.append(x)
            z = _linear(x, next(rest))
            if base is not None:
                inputs.append(z)
                z = _linear(z, next(rest))
                z += _linear(x, base)
            x = self._functions[at][0](z) if at < len(self._functions) else z
        largest = np.ascontiguousarray(x.reshape(-1, x.shape[2]).T).max(0)  # NumPy is slow along a short last axis
        delta = np.exp(np.maximum(x - largest.reshape(*x.shape[:2], 1), LEAST_EXPONENT))
        delta /= delta.sum(2, keepdims=True)
        delta.reshape(-1, delta.shape[2])[np.arange(y.size), y.reshape(-1)] -= 1
        deltas, weights = list[_Array](), [w for w, _ in layers]
        for at in range(len(bases) - 1, -1, -1):
            base, outer = bases[at], delta
            deltas.append(delta)
            if base is not None:
                deltas.append(delta := delta @ weights.pop())
            if at:
                delta = delta @ weights.pop()
                if base is not None:
                    delta += outer @ base[0]
                delta *= self._functions[at - 1][1](entries[at])
        return inputs, deltas[::-1]

    def _sum(
        self,
        inputs: list[_Doubles],
        deltas: list[_Doubles],
        keep: NDArray[np.bool_],
        factor: _Doubles,
        out: _Doubles,
        *,
        fresh: bool,
    ) -> None:
        """Inputs and deltas are this microbatch's own and are overwritten."""
        at, many, bits = 0, len(out), -keep.astype(np.int64)[:, None]
        for a, delta, layer in zip(inputs, deltas, self._linears, strict=True):
            select(a, bits)
            select(delta, bits)
            np.multiply(delta, factor[:, None], out=delta)
            scaled, seen = (t.reshape(many, -1, t.shape[1]) for t in (delta, a))
            height, width = scaled.shape[2], seen.shape[2]
            weight = out[:, at : at + height * width].reshape(many, height, width)  # a view
            if fresh:
                np.matmul(scaled.transpose(0, 2, 1), seen, out=weight)
            else:
                weight += scaled.transpose(0, 2, 1) @ seen
            at += height * width
            if layer.bias is not None:
                bias = out[:, at : at + height]
                bias[...] = scaled.sum(1) if fresh else bias + scaled.sum(1)
                at += height


def select(values: _Array, bits: NDArray[np.signedinteger[Any]]) -> None:
    """Keep rows where ``bits``, ``(B, 1)``, is -1 and make those zeros where it is 0, in place.

    Whatever the rows hold, NaN too, and in the same time: every word is combined with its row's bits.

    Args:
        values: ``(B, ...)``, of a type as wide as that of ``bits``.
    """
    words = values.view(bits.dtype)
    np.bitwise_and(words, bits, out=words)


def _values(layer: nn.Linear) -> _Layer:
    return layer.weight.detach().numpy(), None if layer.bias is None else layer.bias.detach().numpy()


def _descend(w: _Array, start: _Array, gradient: _Array, rate: float, pull: float) -> None:
    if pull:
        gradient = gradient + w.dtype.type(pull) * (w - start)
    np.subtract(w, w.dtype.type(rate) * gradient, out=w)


def _linear(x: _Array, layer: _Layer) -> _Array:
    weight, bias = layer
    z = x @ (weight.T if weight.ndim == 2 else weight.transpose(0, 2, 1))
    if bias is not None:
        z += bias
    return z


def _wide(a: _Array) -> _Doubles:
    return a.astype(np.float64, copy=False)
