"""What every engine is, and two of them around torch and Opacus: vmap and hooks."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedveil.privacy.dp.clipping.gradient_factors import Batch, Dense, Piece, Workspace, clip_pieces


class Backend(Protocol):
    """One way to compute a microbatch's clipped sum. No shape in it depends on what the records hold."""

    def operands(self, batch: Batch) -> list[torch.Tensor]:
        """All numbers, each ``(B, ...)``, from which the norms and the sum follow place by place."""
        ...

    def add(self, batch: Batch, clip: float, out: torch.Tensor, *, fresh: bool = False) -> torch.Tensor:
        """Add the clipped sum of one microbatch to ``out`` (``(D,)`` float64); ``fresh``: write it there instead.

        Returns:
            ``(B,)`` bool: the places that were added: those to keep whose norm is finite.
        """
        ...

    def release(self) -> None:
        """Give back the memory that is kept from one microbatch to the next."""
        ...


class InPieces(ABC):
    """An engine that gives one :class:`Piece` for each parameter, in order.

    Args:
        sizes: number of values of each parameter.
    """

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self._workspace = Workspace()

    def release(self) -> None:
        """See :class:`Backend`."""
        self._workspace.release()

    @abstractmethod
    def pieces(self, batch: Batch) -> list[Piece]:
        """The gradients of ``batch``."""

    def operands(self, batch: Batch) -> list[torch.Tensor]:
        """See :class:`Backend`."""
        return [t.clone() for piece in self.pieces(batch) for t in piece.operands()]

    def add(self, batch: Batch, clip: float, out: torch.Tensor, *, fresh: bool = False) -> torch.Tensor:
        """See :class:`Backend`."""
        return clip_pieces(self.pieces(batch), self._sizes, batch.keep, clip, out, fresh=fresh)


class Mapped(InPieces):
    """``vmap(grad)``: the network sees one record at a time, so records cannot meet. Materialises all gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        super().__init__([p.numel() for p in self._parameters.values()])

        def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

        self._gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")

    def pieces(self, batch: Batch) -> list[Piece]:
        """See :class:`InPieces`."""
        gradients = self._gradients({n: p.detach() for n, p in self._parameters.items()}, batch.X, batch.y)
        return [Dense(gradients[n], batch.weights) for n in self._parameters]


class Hooked(InPieces):
    """Opacus' hooks: an ordinary backward pass that also stores each row's gradient. Materialises all gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._model = GradSampleModule(model, loss_reduction="sum")
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        super().__init__([p.numel() for p in self._parameters])

    def pieces(self, batch: Batch) -> list[Piece]:
        """See :class:`InPieces`."""
        self._model.zero_grad(set_to_none=True)
        with _quiet():
            functional.cross_entropy(self._model(batch.X), batch.y, reduction="sum").backward()
        pieces: list[Piece] = [Dense(getattr(p, "grad_sample"), batch.weights) for p in self._parameters]  # noqa: B009
        self._model.zero_grad(set_to_none=True)  # Opacus' override also frees the gradients of single rows
        return pieces


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides torch's remark that records need no gradient of their own: the hooks of Opacus do not use it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield
