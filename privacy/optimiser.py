"""The step on an opened sum, the same bits at server, sites and auditor: post-processing, so it costs nothing.

Everything is float64 and elementwise: + - * / and roots in a fixed order, each correctly rounded by IEEE 754. NumPy
fuses no two of them into one. So the state after a step does not depend on the machine, its vector units or threads.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedveil.common.buffers import Filled
from fedveil.common.errors import RunAborted, StoreError
from fedveil.common.threads import mapped, spans
from fedveil.common.wire import sha256
from fedveil.privacy.plan import Optimizer, PrivacyPlan

_DOMAIN = b"fedveil/state/2\n"
_HEAD = struct.Struct("<QQQQ")
_VALUES = len(_DOMAIN) + _HEAD.size  # where they begin
_CHUNK = 1 << 16  # values at a time: they stay in the cache
_MOST_MOMENTS = 2


@dataclass(frozen=True)
class ModelState:
    """Everything that the next step depends on.

    Attributes:
        weights: ``(D,)`` float64.
        moments: what the optimiser keeps, each ``(D,)`` float64: the velocity of ``sgd``, or the first and second
            moment.
        steps: how many sums were applied.
        average: ``(D,)`` float64, the weights' average; None where the plan has none.
    """

    weights: NDArray[np.float64]
    moments: tuple[NDArray[np.float64], ...]
    steps: int = 0
    average: NDArray[np.float64] | None = None

    @classmethod
    def start(cls, weights: NDArray[np.float32], optimizer: Optimizer) -> ModelState:
        """The public initialisation."""
        first, nothing = weights.astype(np.float64), np.zeros(weights.size)
        return cls(first, (nothing,) * optimizer.moments, 0, first if optimizer.averaging else None)

    @property
    def vectors(self) -> tuple[NDArray[np.float64], ...]:
        """Weights, moments and average, as they stand in :attr:`data`."""
        return self.weights, *self.moments, *(() if self.average is None else (self.average,))

    @property
    def length(self) -> int:
        """How many bytes :attr:`data` has: those of every state of this model."""
        return _VALUES + 8 * len(self.vectors) * self.weights.size

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return all(bool(np.isfinite(v).all()) for v in self.vectors)

    def fits(self, other: ModelState) -> bool:
        """Whether both are states of one model under one optimiser."""
        shape = lambda s: (s.weights.size, len(s.moments), s.average is None)  # noqa: E731
        return shape(self) == shape(other)

    @cached_property
    def data(self) -> bytes:
        """The whole state, little-endian: a domain; steps, D, how many moments and averages (8 bytes each); vectors."""
        head = _head(self.steps, self.weights.size, len(self.moments), self.average is not None)
        return b"".join((head, *(v.astype("<f8").data for v in self.vectors)))

    @classmethod
    def load(cls, data: bytes) -> ModelState:
        """The state of :attr:`data`, which it looks into; :class:`StoreError` for bytes that are none."""
        if len(data) < _VALUES or not data.startswith(_DOMAIN):
            raise StoreError("a stored model state is damaged", hint="restore the file, or begin a new run")
        steps, size, moments, averages = _HEAD.unpack_from(data, len(_DOMAIN))
        whole = 1 <= moments <= _MOST_MOMENTS and averages <= 1
        if not whole or len(data) != _VALUES + 8 * size * (1 + moments + averages):
            raise StoreError("a stored model state is damaged", hint="restore the file, or begin a new run")
        values = np.frombuffer(data, "<f8", offset=_VALUES)
        weights, *others = (values[i * size : (i + 1) * size] for i in range(1 + moments + averages))
        state = cls(weights, tuple(others[:moments]), steps, others[moments] if averages else None)
        state.__dict__["data"] = data  # what the cached property would join again
        return state

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of :attr:`data`: the name of the state in contributions, ledgers and journals."""
        return sha256(self.data)

    def sent(self) -> bytes:
        """The weights from which gradients are computed: D little-endian float32."""
        return self._sent

    @cached_property
    def _sent(self) -> bytes:
        return _single(self.weights)

    @property
    def result(self) -> NDArray[np.float64]:
        """``(D,)``: the weights that are evaluated and given out, averaged where the plan says so."""
        return self.weights if self.average is None else self.average

    def model(self) -> bytes:
        """:attr:`result` as it is kept and given out: D little-endian float32."""
        return self.sent() if self.average is None else _single(self.average)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of :meth:`model`: the model's name in journals and reports."""
        return sha256(self.model())

    def after(self, plan: PrivacyPlan, opened: NDArray[np.int64]) -> ModelState:
        """:meth:`step` on an opened sum in grid units, as it comes out of the secure sum.

        What was last computed from a sum that cannot be written to is remembered: the server and the sites of one
        process take the same step, and share the state.
        """
        asked = (plan.hash, self.digest)
        for before, values, known in _last:
            if before == asked and (values is opened or np.array_equal(values, opened)):
                return known
        state = self.step(plan, opened, plan.grid)
        if not opened.flags.writeable:
            _last[:] = [(asked, opened, state)]
        return state

    def step(self, plan: PrivacyPlan, opened: NDArray[np.float64 | np.int64], unit: float = 1.0) -> ModelState:
        """The plan's optimiser on ``opened · unit / (q·N)``, chunk by chunk over threads.

        In mode ``client`` the sum holds model updates, not gradients: they are averaged, and applied as they are unless
        the plan has a server rate. Statistics are their own result: the opened sum is added to zeros.

        Raises:
            RunAborted: the weights would not be finite.
        """
        size, many = self.weights.size, len(self.moments)
        out = Filled(self.length)
        out.room[:_VALUES] = _head(self.steps + 1, size, many, self.average is not None)
        stats, move = plan.task == "stats", _Move.of(plan, self.steps + 1)

        def moved(part: slice) -> bool:
            count, before = part.stop - part.start, [v[part] for v in self.vectors]
            first = range(_VALUES + 8 * part.start, self.length, 8 * size)
            after = [np.frombuffer(out.room, "<f8", count, at) for at in first]
            gradient = opened[part] * unit
            if stats:
                np.add(before[0], gradient, out=after[0])
                after[1][:] = before[1]
                return True
            gradient /= plan.divisor
            move(gradient, before[: 1 + many], after[: 1 + many])
            if self.average is not None:
                np.multiply(before[-1], move.kept, out=after[-1])
                after[-1] += (1 - move.kept) * after[0]
            return bool(np.isfinite(after[0]).all())

        if not all([*mapped(moved, spans(size, _CHUNK))]):
            raise RunAborted("the model diverged", hint="choose a lower learning rate or a smaller clip")
        return ModelState.load(out.value())


@dataclass(frozen=True)
class _Move:
    """One step of a plan's optimiser, elementwise.

    Attributes:
        optimizer: the plan's.
        rate: of this step.
        first, second: what undoes that the moments began at zero: 1 / (1 - beta^k).
        kept: of the average.
    """

    optimizer: Optimizer
    rate: float
    first: float
    second: float
    kept: float

    @classmethod
    def of(cls, plan: PrivacyPlan, number: int) -> _Move:
        """The step that makes ``number`` of them."""
        o = plan.optimizer
        base = o.server_rate if plan.mode == "client" else o.learning_rate
        beta = o.second_moment if o.name in ("adam", "yogi") else 0.0
        first, second = (1 / (1 - _power(b, number)) for b in (o.momentum, beta))
        return cls(o, base * o.factor(number), first, second, min(o.averaging, (1 + number) / (10 + number)))

    def __call__(
        self, gradient: NDArray[np.float64], before: list[NDArray[np.float64]], after: list[NDArray[np.float64]]
    ) -> None:
        """Write weights and moments; ``gradient`` is overwritten."""
        o = self.optimizer
        np.multiply(before[1], o.momentum, out=after[1])
        if o.name == "sgd":
            after[1] += gradient
            np.multiply(after[1], self.rate, out=gradient)
        else:
            after[1] += (1 - o.momentum) * gradient
            _SECOND[o.name](before[2], gradient * gradient, o.second_moment, after[2])
            root = np.sqrt(after[2] * self.second)
            root += o.stabiliser
            np.multiply(after[1], self.rate * self.first, out=gradient)
            gradient /= root
        np.subtract(before[0], gradient, out=after[0])


_Second = Callable[[NDArray[np.float64], NDArray[np.float64], float, NDArray[np.float64]], None]


def _adam(before: NDArray[np.float64], square: NDArray[np.float64], beta: float, after: NDArray[np.float64]) -> None:
    np.multiply(before, beta, out=after)
    after += (1 - beta) * square


def _yogi(before: NDArray[np.float64], square: NDArray[np.float64], beta: float, after: NDArray[np.float64]) -> None:
    np.subtract(before, (1 - beta) * np.sign(before - square) * square, out=after)


def _adagrad(before: NDArray[np.float64], square: NDArray[np.float64], _: float, after: NDArray[np.float64]) -> None:
    np.add(before, square, out=after)


_SECOND: dict[str, _Second] = {"adam": _adam, "yogi": _yogi, "adagrad": _adagrad}


def _power(base: float, exponent: int) -> float:
    """By multiplications in a fixed order: a library's ``pow`` may differ in the last bit from machine to machine."""
    out = 1.0
    for bit in bin(exponent)[2:]:
        out *= out
        if bit == "1":
            out *= base
    return out


def _single(values: NDArray[np.float64]) -> bytes:
    out = Filled(4 * values.size)
    np.copyto(np.frombuffer(out.room, "<f4"), values, casting="same_kind")
    return out.value()


_last: list[tuple[tuple[str, str], NDArray[np.int64], ModelState]] = []  # one step


def _head(steps: int, size: int, moments: int, averages: int) -> bytes:
    return _DOMAIN + _HEAD.pack(steps, size, moments, averages)
