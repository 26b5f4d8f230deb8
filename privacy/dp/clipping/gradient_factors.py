"""Per-record gradients of one parameter, in the shortest form in which a norm and a weighted sum can be taken.

Every piece answers ``squares()``, the ``(B,)`` squared norms, and ``add(f, out)``, which adds the sum over records of
f times the gradient to ``out``. Both are float64 and taken from the same stored values, whatever precision these were
computed in. So what is summed is exactly what was measured and bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

TINY = 1e-300
_CACHED = 1 << 17


class Piece(Protocol):
    """Gradients of one parameter for each record of a microbatch."""

    def squares(self) -> torch.Tensor:
        """``(B,)`` float64 squared L2 norms."""
        ...

    def add(self, factor: torch.Tensor, out: torch.Tensor) -> None:
        """Add the sum over records of ``factor`` (``(B,)`` float64) times the gradient to ``out``, flat float64."""
        ...


class Dense:
    """Written out: ``(B, *shape)``. Widened to float64 a few records at a time, so that copies stay in the cache."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.detach().reshape(len(values), -1)
        self._step = max(1, _CACHED // self._values.shape[1])

    def squares(self) -> torch.Tensor:
        """See :class:`Piece`."""
        return torch.cat([_norms(v.double()) for v in self._values.split(self._step)]).square()

    def add(self, factor: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Piece`."""
        for values, f in zip(self._values.split(self._step), factor.split(self._step), strict=True):
            out.addmv_(values.double().T, f)


class Outer:
    """The gradient of a Linear layer's weight used once per record: the outer product of two vectors.

    Args:
        out: ``(B, outputs)`` gradient at the layer's output.
        inward: ``(B, inputs)`` the layer's input.
    """

    def __init__(self, out: torch.Tensor, inward: torch.Tensor) -> None:
        self._out, self._inward = out.detach().double(), inward.detach().double()

    def squares(self) -> torch.Tensor:
        """See :class:`Piece`."""
        return (_norms(self._out) * _norms(self._inward)).square()

    def add(self, factor: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Piece`."""
        out.view(self._out.shape[1], -1).addmm_((self._out * factor[:, None]).T, self._inward)


class Rows:
    """The gradient of an embedding: a few rows of a table.

    Args:
        ids: ``(B, length)`` which row each position reads.
        out: ``(B, length, width)`` gradient at the layer's output.
        rows: height of the table.
    """

    def __init__(self, ids: torch.Tensor, out: torch.Tensor, rows: int) -> None:
        records, length = ids.shape
        keys = ids + rows * torch.arange(records, device=ids.device)[:, None]
        distinct, place = torch.unique(keys, return_inverse=True)
        self._rows, self._records = rows, records
        self._row, self._record = distinct % rows, distinct // rows
        flat = out.detach().double().reshape(records * length, -1)
        self._values = torch.zeros(len(distinct), flat.shape[1], dtype=flat.dtype, device=flat.device)
        self._values.index_add_(0, place.reshape(-1), flat)

    def squares(self) -> torch.Tensor:
        """See :class:`Piece`."""
        out = torch.zeros(self._records, dtype=torch.float64, device=self._values.device)
        return out.index_add_(0, self._record, _norms(self._values).square())

    def add(self, factor: torch.Tensor, out: torch.Tensor) -> None:
        """See :class:`Piece`."""
        out.view(self._rows, -1).index_add_(0, self._row, self._values * factor[self._record, None])


def _norms(values: torch.Tensor) -> torch.Tensor:
    """The norm of each row in one pass: squares written out would be fetched from memory anew for every batch."""
    return torch.linalg.vector_norm(values, dim=1)


@dataclass(frozen=True)
class Limit:
    """What a record may contribute in one microbatch.

    Attributes:
        clip: C.
        keep: ``(B,)`` bool, False for padding.
    """

    clip: float
    keep: torch.Tensor

    def factor(self, norms: torch.Tensor) -> torch.Tensor:
        """``(B,)`` float64: min(1, C / norm), and 0 for padding."""
        return (self.clip / (norms + TINY)).clamp(max=1.0) * self.keep

    def finite(self, norms: torch.Tensor) -> bool:
        """Whether every record that is kept has a norm. If not, nothing may be added: 0 · NaN is NaN."""
        return bool(torch.isfinite(norms).logical_or(~self.keep).all())


def clip_pieces(pieces: list[Piece], sizes: list[int], limit: Limit, out: torch.Tensor) -> torch.Tensor:
    """Add the clipped sum of ``pieces``, in parameter order, to ``out`` (``(D,)`` float64) and return the norms.

    Args:
        sizes: number of values of each parameter.

    Returns:
        ``(B,)`` float64 norms. If one of them is not finite, ``out`` is left as it was.
    """
    norms = torch.stack([p.squares() for p in pieces]).sum(0).sqrt()
    if limit.finite(norms):
        factor = limit.factor(norms)
        for piece, part in zip(pieces, out.split(sizes), strict=True):
            piece.add(factor, part)
    return norms
