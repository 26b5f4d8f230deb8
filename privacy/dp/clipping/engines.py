"""Three engines around torch and Opacus: vmap, hooks, ghost. Each adds a microbatch's clipped sum to a vector."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from fedveil.privacy.dp.clipping.gradient_factors import Dense, Limit, Piece, clip_pieces


class Backend(Protocol):
    """What every engine is: see :meth:`__call__`."""

    def __call__(self, X: torch.Tensor, y: torch.Tensor, limit: Limit, out: torch.Tensor) -> torch.Tensor:
        """Add the clipped sum of one microbatch, at least one record long, to ``out`` (``(D,)`` float64).

        Returns:
            ``(B,)`` norms. If one is not finite, ``out`` is left as it was: the caller takes the record out and calls
            again.
        """
        ...


class Mapped:
    """``vmap(grad)``: the network sees one record at a time, so records cannot meet. Materialises B·D gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._sizes = [p.numel() for p in self._parameters.values()]

        def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

        self._gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")

    def __call__(self, X: torch.Tensor, y: torch.Tensor, limit: Limit, out: torch.Tensor) -> torch.Tensor:
        """See :class:`Backend`."""
        gradients = self._gradients({n: p.detach() for n, p in self._parameters.items()}, X, y)
        return clip_pieces([Dense(gradients[n]) for n in self._parameters], self._sizes, limit, out)


class Hooked:
    """Opacus' hooks: an ordinary backward pass that also stores each record's gradient. Materialises B·D gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._model = GradSampleModule(model, loss_reduction="sum")
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]

    def __call__(self, X: torch.Tensor, y: torch.Tensor, limit: Limit, out: torch.Tensor) -> torch.Tensor:
        """See :class:`Backend`."""
        self._model.zero_grad(set_to_none=True)
        with quiet():
            functional.cross_entropy(self._model(X), y, reduction="sum").backward()
        pieces: list[Piece] = [Dense(getattr(p, "grad_sample")) for p in self._parameters]  # noqa: B009
        self._model.zero_grad(set_to_none=True)  # Opacus' override also frees the per-record gradients
        return clip_pieces(pieces, [p.numel() for p in self._parameters], limit, out)


class Ghost:
    """Opacus' ghost clipping (Li et al. 2022, arXiv:2110.05679): two backward passes over one forward pass.

    The first only takes norms; in the second each record's own loss is multiplied by its factor. No gradient of a
    single record is built for Linear and Embedding layers. The sum is the network's own backward pass, so it is
    accumulated in the network's precision: for float64 networks only.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", use_ghost_clipping=True)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]

    def __call__(self, X: torch.Tensor, y: torch.Tensor, limit: Limit, out: torch.Tensor) -> torch.Tensor:
        """See :class:`Backend`."""
        self._clear()
        with quiet():
            self._model.enable_hooks()
            losses = functional.cross_entropy(self._model(X), y, reduction="none")
            losses.sum().backward(retain_graph=True)
            norms = self._model.get_norm_sample().detach()
            self._clear()
            self._model.disable_hooks()
            if limit.finite(norms):
                (losses * limit.factor(norms)).sum().backward()
        for p, part in zip(self._parameters, out.split([p.numel() for p in self._parameters]), strict=True):
            if p.grad is not None:
                part.add_(p.grad.reshape(-1))
        self._clear()
        return norms

    def _clear(self) -> None:
        for p in self._parameters:
            p.grad = None


@contextmanager
def quiet() -> Iterator[None]:
    """Hides torch's remark that records need no gradient of their own: the hooks of Opacus do not use it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield
