"""Per-record gradients of one parameter, in the shortest form in which a norm and a weighted sum can be taken.

Every piece answers ``squares()``, the ``(B,)`` squared norms, and ``weighted(f)``, the sum over records of f times
its gradient. Both are float64 and taken from the same stored values, whatever precision these were computed in:
the sum of what was measured is what was bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

TINY = 1e-300


class Piece(Protocol):
    """Gradients of one parameter for each record of a microbatch."""

    def squares(self) -> torch.Tensor:
        """``(B,)`` float64 squared L2 norms."""
        ...

    def weighted(self, factor: torch.Tensor) -> torch.Tensor:
        """Sum over records of ``factor`` (``(B,)`` float64) times the gradient: float64, the parameter's shape."""
        ...


class Dense:
    """Written out: ``(B, *shape)``."""

    def __init__(self, values: torch.Tensor) -> None:
        self._shape = values.shape[1:]
        self._values = values.detach().reshape(len(values), -1).double()

    def squares(self) -> torch.Tensor:
        """See :class:`Piece`."""
        return torch.linalg.vector_norm(self._values, dim=1).square()

    def weighted(self, factor: torch.Tensor) -> torch.Tensor:
        """See :class:`Piece`."""
        return (factor @ self._values).view(self._shape)


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
        return self._out.square().sum(1) * self._inward.square().sum(1)

    def weighted(self, factor: torch.Tensor) -> torch.Tensor:
        """See :class:`Piece`."""
        return (self._out * factor[:, None]).T @ self._inward


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
        return out.index_add_(0, self._record, self._values.square().sum(1))

    def weighted(self, factor: torch.Tensor) -> torch.Tensor:
        """See :class:`Piece`."""
        out = torch.zeros(self._rows, self._values.shape[1], dtype=torch.float64, device=self._values.device)
        return out.index_add_(0, self._row, self._values * factor[self._record, None])


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


def clip_pieces(pieces: list[Piece], limit: Limit) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat ``(D,)`` clipped sum and the ``(B,)`` norms, both float64, of pieces in parameter order."""
    norms = torch.stack([p.squares() for p in pieces]).sum(0).sqrt()
    factor = limit.factor(norms)
    return torch.cat([p.weighted(factor).reshape(-1) for p in pieces]), norms
