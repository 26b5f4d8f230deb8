"""One interface in front of the engines: places, microbatches of one shape, records that cannot be used."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.common.workload.torch.networks import fill, trainable
from fedveil.privacy.dp.clipping.device import Resident, fits, free_bytes, rows_of, to_host
from fedveil.privacy.dp.clipping.direct import Book, Chain
from fedveil.privacy.dp.clipping.engines import Backend, Hooked, Mapped
from fedveil.privacy.dp.clipping.gradient_factors import Batch
from fedveil.privacy.dp.clipping.guard import refuse_coupled
from fedveil.privacy.dp.clipping.small import SmallChain, select
from fedveil.privacy.dp.debug_noise import replayed
from fedveil.privacy.dp.places import EMPTY
from fedveil.privacy.dp.rounding import LONGEST_BLOCK, MAX_MICROBATCH, margin

Engine = Literal["closed", "numpy", "book", "vmap", "opacus"]
Precision = Literal["float32", "float64"]
BACKENDS: dict[Engine, Callable[[nn.Module], Backend]] = {
    "closed": Chain,
    "numpy": SmallChain,
    "book": Book,
    "vmap": Mapped,
    "opacus": Hooked,
}
_USUAL = 64
_GRADIENT_BYTES = 1 << 28
_PART = 1 << 16
_FAULT = 2.0**-20  # more than rounding, less than any fault of the program


@dataclass(frozen=True)
class ClippedSum:
    """What one step makes of a site's sampled records. Only ``values`` goes on, and only with noise.

    Attributes:
        values: ``(D,)`` float64, the sum of clipped gradients; its norm is at most ``entered * clip``.
        entered: how many places were added (stays at the site).
        excluded: how many taken places could not be used (stays at the site).
    """

    values: NDArray[np.float64]
    entered: int
    excluded: int


class Clipper:
    """Computes clipped sums for one network; reused over steps. The loss is the cross-entropy of each record.

    Args:
        model: the network; it is moved to ``device`` and ``precision``, and its weights are the caller's to set.
        engine: which implementation (see the package's text).
        device: a torch device; CUDA is used by the callers when present.
        precision: of the forward and backward pass. Norms, and sums of what is added, are float64 in any case.
        microbatch: the most places at a time; by default 64 (32 for vmap), or as many as 256 MiB (on a GPU: half of
            its free memory) of gradients of single records allow.

    Raises:
        ModelError: the network couples records, or the engine cannot treat it.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        device: str = "cpu",
        *,
        precision: Precision = "float32",
        microbatch: int | None = None,
    ) -> None:
        refuse_coupled(model)
        if engine not in BACKENDS:
            raise ModelError(f"unknown engine {engine!r}", hint=", ".join(BACKENDS))
        if microbatch is not None and not 1 <= microbatch <= MAX_MICROBATCH:
            raise ModelError(f"a microbatch of {microbatch} records is outside 1..{MAX_MICROBATCH}")
        self.engine: Engine = engine
        self.precision: Precision = precision
        self.device = torch.device(device)
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.model = model.to(self.device, self.dtype)
        self.parameters = trainable(self.model)
        self.size = sum(p.numel() for p in self.parameters)
        self.microbatch = microbatch or fitting(engine, self.size, 32 if engine == "vmap" else _USUAL, self.device)
        self.wanted = self.microbatch  # the probe may have to lower it
        self._tables: dict[int, Resident] = {}
        self._classes = 0
        self._random = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())  # noqa: SLF001
        try:
            self.backend = BACKENDS[engine](self.model)
        except NotImplementedError as e:  # Opacus: a layer with buffers or without a rule
            raise ModelError(f"the engine {engine!r} cannot treat this network: {e}", hint="the engine 'auto'") from e

    def load(self, values: NDArray[np.float32]) -> None:
        """Set the trainable parameters to ``values``, ``(D,)`` in registration order.

        Raises:
            ModelError: wrong length, or a value that is not finite.
        """
        fill(self.parameters, values)

    def usable(self, X: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``(B,)`` mask of the records that the network can take: finite, a known class, known token ids."""
        with np.errstate(invalid="ignore"):  # zero times what is not finite is not a number
            mask = (np.vecdot(X, np.zeros(X.shape[1], X.dtype)) == 0) & (y >= 0)
        known = getattr(self.model, "usable", None)
        if known is not None:
            mask &= known(X)
        return mask & (y < self._outputs(X.shape[1]))

    def shape(self, places: int, rows: int = 1) -> tuple[int, int]:
        """How ``places`` of ``rows`` rows each are computed: (microbatches, places in each). No record decides it."""
        most = max(1, self.microbatch // rows)
        batches = max(1, math.ceil(places / most))
        return batches, max(1, math.ceil(places / batches))

    def clipped_sum(
        self,
        X: NDArray[np.float32],
        y: NDArray[np.int64],
        clip: float,
        seats: NDArray[np.int64] | None = None,
        persons: NDArray[np.int64] | None = None,
        capacity: int = 0,
    ) -> ClippedSum:
        """Sum over the taken places of ``g · min(1, clip / ‖g‖)``.

        Args:
            X: ``(n, inputs)``; n may be 0.
            y: ``(n,)`` class indices.
            clip: C > 0.
            seats: ``(P,)`` which record (or person) sits at each place, :data:`~fedveil.privacy.dp.places.EMPTY` for
                none (:func:`~fedveil.privacy.dp.places.seat`). By default each record at its own place, in order.
            persons: ``(n', R)`` the rows of each person, ``EMPTY`` for none. Then seats name persons, and g is the
                mean of a person's usable rows' gradients. By default each record is by itself.
            capacity: K, the most records (persons) that the table may ever hold. If it is given, a GPU keeps the table
                until :meth:`release` and takes memory for so many. ``X`` and ``y`` must not be changed in between.

        Guarantee: one record (person) more or less at a place that is empty otherwise changes ``values`` by at most
        ``clip`` times (1 + :func:`~fedveil.privacy.dp.rounding.relative`) in L2 norm, whatever it holds and whatever
        the weights are. Assumption: a row's result depends on shapes, its place and its own values (tested by
        :func:`~fedveil.privacy.dp.clipping.stand_alone.problem`). What cannot be used (a class or token that does not
        exist, a gradient that is not finite) is left out by itself, nobody moves and nothing is computed again.
        Dropout draws a mask for each place by itself, from a generator seeded by the operating system for every call.

        Raises:
            ModelError: the clip is not positive, or the bound on the sum does not hold (a fault of the program).
        """
        if not 0 < clip < float("inf"):
            raise ModelError(f"a clip of {clip!r} is not positive and finite")
        groups = np.arange(len(X))[:, None] if persons is None else persons
        seats = np.arange(len(groups)) if seats is None else seats
        batches, each = self.shape(len(seats), groups.shape[1])
        padded = np.full(batches * each, EMPTY, np.int64)
        padded[: len(seats)] = seats
        padded, table = padded.reshape(batches, each), (X, y, groups, persons is not None)
        held = self._resident(X, y, max(len(X), capacity * groups.shape[1])) if capacity else None
        with _fresh_randomness(self.device) if self._random else nullcontext():
            taken = (
                (self.batch(table, at) for at in padded)
                if held is None
                else held.batches(padded, groups, weighted=table[3])
            )
            out, entered = self._blocks(taken, clip * (1 - margin(self.size)))
        return ClippedSum(out, entered, int((seats >= 0).sum()) - entered)

    def release(self) -> None:
        """Give back the memory that steps keep from one to the next. A later step takes it again."""
        self._tables.clear()
        self.backend.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _resident(self, X: NDArray[np.float32], y: NDArray[np.int64], rows: int) -> Resident | None:
        """The table on the GPU, from the call before or uploaded now; None where it is to stay where it is."""
        held = self._tables.get(id(X))
        if held is not None and held.source[0] is X and held.source[1] is y:
            return held
        if not fits(rows, X.shape[1], self.device):
            return None
        parts = [slice(at, at + _PART) for at in range(0, len(X), _PART)]
        good = np.concatenate([np.zeros(0, np.bool_), *(self.usable(X[part], y[part]) for part in parts)])
        self._tables[id(X)] = Resident(X, y, good, rows, self.device, self.dtype)
        return self._tables[id(X)]

    @property
    def stacks(self) -> bool:
        """Whether :meth:`clipped_sums` works with this engine."""
        return isinstance(self.backend, SmallChain)

    def clipped_sums(
        self, X: NDArray[np.float32], y: NDArray[np.int64], clip: float, seats: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """``(S, D)``: for every row of ``seats``, ``(S, P)``, what :meth:`clipped_sum` has for it, in one go.

        Every row's microbatches have the shapes that they have there, so the bits are the same.

        Raises:
            ModelError: the engine is another one than ``numpy``; or as :meth:`clipped_sum`.
        """
        if not 0 < clip < float("inf"):
            raise ModelError(f"a clip of {clip!r} is not positive and finite")
        sites, places = seats.shape
        batches, each = self.shape(places)
        if not isinstance(self.backend, SmallChain) or batches > LONGEST_BLOCK:
            raise ModelError(f"the engine {self.engine!r} computes one sum at a time", hint="the engine 'numpy'")
        padded = np.full((sites, batches * each), EMPTY, np.int64)
        padded[:, :places] = seats
        table = (X, y, np.arange(len(X))[:, None], False)
        total, entered = torch.empty(sites, self.size, dtype=torch.float64), np.zeros(sites, np.int64)
        for at in range(0, batches * each, each):
            batch = self.batch(table, padded[:, at : at + each].reshape(-1))
            added = self.backend.add_each(batch, clip * (1 - margin(self.size)), total, fresh=at == 0)
            entered += added.numpy().reshape(sites, each).sum(1)
        out = total.numpy()
        if not (np.sqrt(np.einsum("ij,ij->i", out, out)) <= entered * clip * (1 + _FAULT)).all():
            raise ModelError("the clipped sum is longer than its bound", hint="a fault of the program: report it")
        return out

    def descents(
        self, X: NDArray[np.float32], y: NDArray[np.int64], parts: Iterable[slice], rate: float, pull: float = 0.0
    ) -> NDArray[np.float64]:
        """``(S, D)``: by how much descent on the mean loss moves the weights, for each of S tables by itself.

        Args:
            X: ``(S, n, inputs)``. y: ``(S, n)`` classes that the network has.
            parts: the records of each step (:func:`passes`).
            pull: how strongly each step is drawn back towards the start (FedProx).

        Raises:
            ModelError: the engine is another one than ``numpy``.
        """
        if not isinstance(self.backend, SmallChain):
            raise ModelError(f"the engine {self.engine!r} does not descend", hint="the engine 'numpy'")
        return self.backend.descend(X.astype(self.precision, copy=False), y, parts, rate, pull)

    def _blocks(self, batches: Iterable[Batch], clip: float) -> tuple[NDArray[np.float64], int]:
        """The sum over all microbatches and how many places entered; two levels, so that rounding adds up slowly.

        On a GPU nothing waits before the last line but one.
        """
        total = out = torch.empty(self.size, dtype=torch.float64, device=self.device)
        entered = torch.zeros((), dtype=torch.int64, device=self.device)
        for turn, batch in enumerate(batches):
            if fresh := turn % LONGEST_BLOCK == 0:
                out = self._next_block(total, out, turn)
            entered += self.backend.add(batch, clip, out, fresh=fresh).sum()
        if out is not total:
            total += out
        norm = torch.linalg.vector_norm(total)
        if total.is_cuda:
            whole = to_host(torch.cat([total, torch.stack([norm, entered.double()])]))
            values, length, count = whole[:-2], whole[-2], whole[-1]
        else:
            values, length, count = total.numpy(), norm, entered
        if not float(length) <= int(count) * clip * (1 + _FAULT):
            raise ModelError("the clipped sum is longer than its bound", hint="a fault of the program: report it")
        return values, int(count)

    @staticmethod
    def _next_block(total: torch.Tensor, out: torch.Tensor, turn: int) -> torch.Tensor:
        """A vector to write to, once the finished block is in the total (the first block is the total)."""
        if out is total:
            return torch.empty_like(total) if turn else total
        total += out
        return out

    def batch(self, table: _Table, seats: NDArray[np.int64]) -> Batch:
        """One microbatch. Empty places, and rows that cannot be used, hold the constant record: zeros of class 0."""
        X, y, groups, weighted = table
        # The same work for every place, whoever sits there: time must not tell how many do.
        empty = not len(X)
        rows = rows_of(seats, groups) if weighted else seats[:, None]
        flat = rows.reshape(-1)
        at = np.maximum(flat, 0)
        held = torch.empty((len(flat), X.shape[1]), dtype=torch.float32)
        features = held.numpy()
        if empty:
            features[:] = 0
        else:
            np.take(X, at, 0, out=features, mode="clip")
        classes = np.zeros(len(flat), np.int64) if empty else y[at]
        good = (flat >= 0) & self.usable(features, classes)
        select(features, -good.astype(np.int32)[:, None])
        classes = np.where(good, classes, 0)
        counts = good.reshape(rows.shape).sum(1)
        weights = None
        if weighted:
            shares = good.reshape(rows.shape) / np.maximum(counts, 1)[:, None]
            weights = torch.from_numpy(shares).to(self.device)
        return Batch(
            held.to(self.device, self.dtype), self._aligned(classes, torch.int64),
            self._aligned(counts > 0, torch.bool), weights,
        )  # fmt: skip

    def _aligned(self, values: NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
        """A copy in torch's own memory, which starts at a multiple of 64 bytes. NumPy's start differs by the call."""
        return torch.empty(values.shape, dtype=dtype, device=self.device).copy_(torch.from_numpy(values))

    @torch.no_grad()
    def _outputs(self, inputs: int) -> int:
        """Number of classes: asked from the network once, with a record of zeros."""
        if not self._classes:
            self._classes = self.model(torch.zeros(1, inputs, dtype=self.dtype, device=self.device)).shape[1]
        return self._classes


# features, classes, the rows of each record or person, and whether a place's gradient is a mean
_Table = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], bool]


def passes(records: int, times: int, batch: int = 0) -> list[slice]:
    """The records of each step of so many passes over a table: all of them, or ``batch`` at most.

    A pass in batches takes m = ⌈records / batch⌉ steps, and the j-th takes every m-th record from the j-th on. So a
    table that is sorted by class gives mixed batches, and the same each time.
    """
    steps = max(1, math.ceil(records / batch)) if batch else 1
    return [slice(j, None, steps) for j in range(steps)] * times


def fitting(engine: Engine, size: int, wanted: int, device: torch.device) -> int:
    """``wanted`` places at a time, or fewer where their gradients (of ``size`` values) would not fit."""
    if engine in ("closed", "numpy"):  # hold activations, no gradient of a single record
        return wanted
    room = free_bytes(device) // 2 if device.type == "cuda" else _GRADIENT_BYTES
    return max(1, min(wanted, room // (16 * size)))


@contextmanager
def _fresh_randomness(device: torch.device) -> Iterator[None]:
    """Dropout masks that nobody can predict. Otherwise a known position would give each record a known mask."""
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(replayed(8) or os.urandom(8), "little") >> 1)
        yield
