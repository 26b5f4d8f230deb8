"""One interface in front of the engines: microbatches, records that cannot be used, the bound that is checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedveil.common.errors import ModelError
from fedveil.common.workload.torch.networks import fill, trainable
from fedveil.privacy.dp.clipping.direct import Book, Chain
from fedveil.privacy.dp.clipping.engines import Backend, Ghost, Hooked, Mapped
from fedveil.privacy.dp.clipping.gradient_factors import Limit
from fedveil.privacy.dp.clipping.guard import refuse_coupled
from fedveil.privacy.dp.clipping.small import SmallChain

Engine = Literal["closed", "numpy", "book", "vmap", "opacus", "ghost"]
Precision = Literal["float64", "float32"]
FLOAT_SLACK = 1e-6
MAX_MICROBATCH = 1024
BACKENDS: dict[Engine, Callable[[nn.Module], Backend]] = {
    "closed": Chain,
    "numpy": SmallChain,
    "book": Book,
    "vmap": Mapped,
    "opacus": Hooked,
    "ghost": Ghost,
}
_BLOCK = 1024
_USUAL = 64
_GRADIENT_BYTES = 1 << 28
_MARGIN = 2.0**-40  # more than float64 rounds away in a product of factor and gradient


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


class Clipper:
    """Computes clipped sums for one network; reused over steps. The loss is the cross-entropy of each record.

    Args:
        model: the network; it is moved to ``device`` and ``precision``, and its weights are the caller's to set.
        engine: which implementation (see the package's text).
        device: a torch device; CUDA is used by the callers when present.
        precision: of the forward and backward pass; sums and norms are float64 in any case. float32 holds the claim
            under an assumption that :func:`fedveil.privacy.dp.clipping.position_free` checks.
        microbatch: records at a time, to which a shorter rest is filled up; by default 64 (32 for vmap), or as many
            as 256 MiB of per-record gradients allow.

    Raises:
        ModelError: the network couples records, or the engine cannot treat it.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        device: str = "cpu",
        *,
        precision: Precision = "float64",
        microbatch: int | None = None,
    ) -> None:
        refuse_coupled(model)
        if engine not in BACKENDS:
            raise ModelError(f"unknown engine {engine!r}", hint=", ".join(BACKENDS))
        if precision == "float32" and engine == "ghost":
            raise ModelError("ghost clipping adds up in the network's own precision", hint="float64, or another engine")
        if microbatch is not None and not 1 <= microbatch <= MAX_MICROBATCH:
            raise ModelError(f"a microbatch of {microbatch} records is outside 1..{MAX_MICROBATCH}")
        self.engine: Engine = engine
        self.precision: Precision = precision
        self.device = torch.device(device)
        self._dtype = torch.float64 if precision == "float64" else torch.float32
        self.model = model.to(self.device, self._dtype)
        self.parameters = trainable(self.model)
        self.size = sum(p.numel() for p in self.parameters)
        self.microbatch = microbatch or fitting(engine, self.size, 32 if engine == "vmap" else _USUAL)
        self._classes = 0
        self._places = torch.arange(self.microbatch, device=self.device)
        self._random = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())  # noqa: SLF001
        try:
            self._backend = BACKENDS[engine](self.model)
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
        mask = np.isfinite(X).all(1) & (y >= 0)
        known = getattr(self.model, "usable", None)
        if known is not None:
            mask &= known(X)
        return mask & (y < self._outputs(X.shape[1]))

    def clipped_sum(self, X: NDArray[np.float32], y: NDArray[np.int64], clip: float) -> ClippedSum:
        """Sum over records of ``g · min(1, clip / ‖g‖)``.

        Args:
            X: ``(B, inputs)``; B may be 0.
            y: ``(B,)`` class indices.
            clip: C > 0.

        Guarantee: adding or removing one record changes ``values`` by at most ``clip`` in L2 norm (up to
        :data:`FLOAT_SLACK` relative), whatever the record holds; for float32 see ``precision``. Records whose class or
        token ids do not exist are left out. So are records whose gradient is not finite: their microbatch is summed
        again without them, since 0 · NaN is NaN. Dropout draws a mask for each record by itself, from a generator that
        the operating system's randomness seeds anew for every call.

        Raises:
            ModelError: the clip is not positive, or the bound on the sum does not hold (a fault of the program). Never
                for the number of records: a limit on it would let one record switch off the sum of all others.
        """
        if not 0 < clip < float("inf"):
            raise ModelError(f"a clip of {clip!r} is not positive and finite")
        usable = self.usable(X, y)
        excluded = 0 if usable.all() else len(X) - int(usable.sum())
        if excluded:
            X, y = X[usable], y[usable]
        if self._random:
            with _fresh_randomness(self.device):
                total, entered = self._blocks(X, y, clip * (1 - _MARGIN))
        else:
            total, entered = self._blocks(X, y, clip * (1 - _MARGIN))
        excluded += len(X) - entered
        out = total.cpu().numpy()
        if not float(torch.linalg.vector_norm(total)) <= entered * clip * (1 + FLOAT_SLACK):
            raise ModelError("the clipped sum is longer than its bound", hint="a fault of the program: report it")
        return ClippedSum(out, entered, excluded)

    def _blocks(self, X: NDArray[np.float32], y: NDArray[np.int64], clip: float) -> tuple[torch.Tensor, int]:
        """The sum over all microbatches and how many records entered; two levels, so that rounding adds up slowly."""
        total, entered = torch.zeros(self.size, dtype=torch.float64, device=self.device), 0
        out = total
        for turn, at in enumerate(range(0, len(X), self.microbatch), 1):
            entered += self._add(X[at : at + self.microbatch], y[at : at + self.microbatch], clip, out)
            if turn % _BLOCK == 0:
                out = self._next_block(total, out)
        return (total if out is total else total.add_(out)), entered

    @staticmethod
    def _next_block(total: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """A fresh vector to add to, once the finished block is in the total (the first block is the total)."""
        if out is total:
            return torch.zeros_like(total)
        total += out
        return out.zero_()

    def _add(self, X: NDArray[np.float32], y: NDArray[np.int64], clip: float, out: torch.Tensor) -> int:
        """Add the sum over the records with a finite gradient to ``out``; returns their number."""
        while len(X):
            good = np.isfinite(self._run(X, y, clip, out).cpu().numpy()[: len(X)])
            if good.all():
                return len(X)
            X, y = X[good], y[good]
        return 0

    def _run(self, X: NDArray[np.float32], y: NDArray[np.int64], clip: float, out: torch.Tensor) -> torch.Tensor:
        records = len(X)
        if records < self.microbatch:
            # one shape for all, so that the batch size changes no kernel: filled up with copies of the first record,
            # with a factor of 0 (they are finite if it is)
            fill = np.arange(self.microbatch)
            fill[records:] = 0
            X, y = X[fill], y[fill]
        if len(self._places) != len(X):
            self._places = torch.arange(len(X), device=self.device)
        keep = self._places < records
        features = torch.from_numpy(X).to(self.device, self._dtype)
        return self._backend(features, torch.from_numpy(y).to(self.device), Limit(clip, keep), out)

    @torch.no_grad()
    def _outputs(self, inputs: int) -> int:
        """Number of classes: asked from the network once, with a record of zeros."""
        if not self._classes:
            self._classes = self.model(torch.zeros(1, inputs, dtype=self._dtype, device=self.device)).shape[1]
        return self._classes


def fitting(engine: Engine, size: int, wanted: int) -> int:
    """``wanted`` records at a time, or fewer where their gradients (of ``size`` values) would not fit."""
    if engine in ("closed", "numpy", "ghost"):  # hold activations, no gradient of a single record
        return wanted
    return max(1, min(wanted, _GRADIENT_BYTES // (16 * size)))


@contextmanager
def _fresh_randomness(device: torch.device) -> Iterator[None]:
    """Dropout masks that nobody can predict. Otherwise a known position would give each record a known mask."""
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
        yield
